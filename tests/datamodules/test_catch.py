"""Catch: what falls, where, and what it earns."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from datamodules.envs.catch import BALL_COLOUR, PADDLE_WIDTH, STEPS_PER_BALL, Catch
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from datamodules.spec import Spec

STAY, LEFT, RIGHT = 0, 1, 2


def towards(env: Catch) -> int:
    """The move that brings the paddle's middle to the ball's."""
    off = env.ball[0] + env.side / 2 - (env.paddle[0] + PADDLE_WIDTH * env.scale / 2)
    return STAY if abs(off) < env.scale else (LEFT if off < 0 else RIGHT)


@pytest.mark.parametrize("options", [{}, {"size": 64, "ball": 1, "balls": 2}])
def test_is_an_environment(options: dict[str, int]) -> None:
    check_env(Catch(**options), skip_render_check=True)


@pytest.mark.parametrize("options", [{}, {"ball": 1, "fall": 1}, {"size": 64, "ball": 4}])
def test_every_ball_can_be_caught(options: dict[str, int]) -> None:
    env = Catch(balls=40, **options)
    env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        _, reward, over, truncated, info = env.step(towards(env))
        total += reward
        assert not truncated
    assert total == info["caught"] == 40


def test_random_actions_catch_about_one_in_four() -> None:
    env = Catch(balls=2000)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    over = False
    while not over:
        *_, over, _, info = env.step(int(rng.integers(3)))
    assert 0.2 < info["caught"] / 2000 < 0.3


def test_an_episode_of_two_balls() -> None:
    env = Catch(balls=2)
    _, info = env.reset(seed=3)
    rewards, rows, overs = [], [info["ball"][1]], []
    for _ in range(2 * STEPS_PER_BALL + 1):
        image, reward, over, _, info = env.step(STAY)
        rewards.append(reward)
        rows.append(info["ball"][1])
        overs.append(over)
        x, y = info["ball"]
        assert (image == BALL_COLOUR).all(-1).sum() == 4
        assert (image[y : y + 2, x : x + 2] == BALL_COLOUR).all()
    fall = list(range(0, 31, 2))
    assert rows == fall + fall
    landings = [STEPS_PER_BALL - 1, 2 * STEPS_PER_BALL]
    assert [i for i, reward in enumerate(rewards) if reward] == landings
    assert set(np.abs(rewards)) == {0.0, 1.0}
    assert [i for i, over in enumerate(overs) if over] == [landings[1]]


def test_walls_reflect_the_ball() -> None:
    env = Catch(balls=1)
    env.reset(seed=0)
    env.ball[:], env.drift = (29, 0), 1
    seen = []
    for _ in range(3):
        *_, info = env.step(STAY)
        seen.append(int(info["ball"][0]))
    assert seen == [30, 29, 28]


def test_a_slow_ball_takes_twice_the_steps() -> None:
    env = Catch(fall=1)
    _, info = env.reset(seed=0)
    rows, over = [info["ball"][1]], False
    while not over:
        *_, over, _, info = env.step(STAY)
        rows.append(info["ball"][1])
    assert rows == list(range(2 * STEPS_PER_BALL + 1))


def test_the_factory_makes_it_and_draws_it_to_size() -> None:
    env = make_env("zoo/Catch-v0", size=64, ball=3)
    obs, _ = env.reset(seed=0)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    assert spec.obs["image"].shape == obs["image"].shape == (64, 64, 3)
    assert spec.action.n == 3


@pytest.mark.parametrize("bad", [{"size": 48}, {"ball": 3}, {"ball": 0}, {"balls": 0}, {"fall": 3}])
def test_refuses(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Catch(**bad)


@pytest.mark.parametrize("action", [-1, 3])
def test_actions_that_there_are_not_are_refused(action: int) -> None:
    env = Catch()
    env.reset(seed=0)
    with pytest.raises(UserError, match=f"Catch has no action {action}: choose from 0 to 2"):
        env.step(action)
