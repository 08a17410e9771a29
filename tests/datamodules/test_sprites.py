"""The sprite that obeys, and those that bounce."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.envs.factory import make_env
from datamodules.envs.sprites import (
    COLOURS,
    MOVES,
    Sprites,
    bounce,
    bounds,
    move_agent,
    render_sprites,
)
from datamodules.errors import UserError
from datamodules.spec import Spec


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([32, 64]),
    step=st.integers(1, 40),
)
def test_the_effective_action_says_what_moved(seed: int, size: int, step: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = bounds(size)
    positions = low + rng.integers(round(high - low) + 1, size=(50, 2))
    actions = rng.integers(5, size=50)
    moved, effective = move_agent(positions, actions, step, size)
    shift = moved - positions
    assert ((moved >= low) & (moved <= high)).all()
    for row in range(50):
        if shift[row].any():
            assert effective[row] == actions[row]
            assert np.array_equal(np.sign(shift[row]), MOVES[actions[row]])
            wanted = positions[row] + step * MOVES[actions[row]]
            assert (
                np.abs(shift[row]).max() == step or not ((wanted >= low) & (wanted <= high)).all()
            )
        else:
            assert effective[row] == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([32, 64]))
def test_distractors_stay_inside_and_turn_only_at_the_edges(seed: int, size: int) -> None:
    env = Sprites(size, distractors=6)
    env.reset(seed=seed)
    low, high = bounds(size)
    turned = 0
    for _ in range(60):
        before, velocity = env.distractors, env.velocities
        env.step(0)
        assert ((env.distractors >= low) & (env.distractors <= high)).all()
        wanted = before + velocity
        inside = (wanted >= low) & (wanted <= high)
        assert np.array_equal(env.distractors[inside], wanted[inside])
        assert np.array_equal(env.velocities, np.where(inside, velocity, -velocity))
        # What it goes beyond the edge, it comes back from there.
        edge = np.where(wanted < low, low, high)
        assert np.array_equal((env.distractors - edge)[~inside], (edge - wanted)[~inside])
        turned += (~inside).sum()
    assert turned > 0
    assert (np.abs(env.velocities) >= 1).all()


@pytest.mark.parametrize("size", [32, 64])
def test_each_is_drawn_where_it_is(size: int) -> None:
    rng = np.random.default_rng(0)
    low, high = bounds(size)
    places = low + rng.integers(round(high - low) + 1, size=(40, 4, 2))
    agent, others = places[:, 0], places[:, 1:]
    images = render_sprites(agent, others, size)
    assert images.shape == (40, size, size, 3) and images.dtype == np.uint8
    pixels = np.arange(size)
    for image, (x, y) in zip(images, agent, strict=True):
        white = (image == COLOURS[0]).all(-1)
        assert white.sum() == 25 * (size // 32) ** 2  # whole, for it is on top
        assert (white.sum(0) @ pixels / white.sum(), white.sum(1) @ pixels / white.sum()) == (x, y)
    corner = np.full((1, 2), low)
    for kind in range(1, 4):  # each alone, with the others under the agent
        place = np.full((1, 3, 2), low)
        place[:, kind - 1] = [[high, (low + high) // 1 / 2 + low % 1]]
        image = render_sprites(corner, place, size)[0]
        own = (image == COLOURS[kind]).all(-1)
        middle = own.sum(0) @ pixels / own.sum(), own.sum(1) @ pixels / own.sum()
        assert own.any() and np.abs(np.array(middle) - place[0, kind - 1]).max() <= 0.5
    # In a batch as alone.
    assert np.array_equal(images[7], render_sprites(agent[7], others[7], size))


@pytest.mark.parametrize("options", [{}, {"size": 64}, {"distractors": 0}, {"distractors": 9}])
def test_it_is_a_sound_environment(options: dict[str, int]) -> None:
    check_env(Sprites(**options), skip_render_check=True)


def test_an_episode_step_by_step() -> None:
    env = Sprites(max_steps=20)
    obs, info = env.reset(seed=5)
    assert info["effective_action"] == 0
    rng = np.random.default_rng(0)
    agent, others, velocities = env.position, env.distractors, env.velocities
    for t in range(20):
        action = int(rng.integers(5))
        obs, reward, terminated, truncated, info = env.step(action)
        agent, effective = move_agent(agent, np.asarray(action))
        others, velocities = bounce(others, velocities)
        assert np.array_equal(info["position"], agent)
        assert np.array_equal(info["distractors"], others)
        assert info["effective_action"] == effective
        assert np.array_equal(obs, render_sprites(agent, others))
        assert (reward, terminated, truncated) == (0.0, False, t == 19)


def test_the_same_seed_the_same_episode() -> None:
    first, again, other = (Sprites().reset(seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_it_is_an_environment_of_the_factory() -> None:
    env = make_env("zoo/Sprites-v0", size=64, distractors=3, step=2)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    assert spec.obs["image"].shape == (64, 64, 3) and spec.action.n == 5
    _, info = env.reset(seed=0)
    before = info["position"]
    *_, info = env.step(1 if before[0] > 10 else 2)
    assert np.abs(info["position"] - before).sum() == 2
    assert info["distractors"].shape == (3, 2)
    for options, message in (
        ({"size": 48}, "must be one of"),
        ({"distractors": -1}, "distractors=-1"),
        ({"step": 0}, "step=0"),
        ({"max_steps": 0}, "max_steps=0"),
    ):
        with pytest.raises(UserError, match=message):
            Sprites(**options)
