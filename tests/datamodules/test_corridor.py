"""The key, the corridor and the door."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from datamodules.envs.corridor import LEFT, RIGHT, USE, KeyCorridor
from datamodules.envs.factory import make_env
from datamodules.errors import UserError


def play(env: KeyCorridor, seed: int, key: bool = True, door: bool = True) -> list[float]:
    """Rewards of one who goes for the key, for the door, or for both."""
    obs, _ = env.reset(seed=seed)
    rewards = []
    over = False
    while not over:
        wanted = key if obs[0] else door
        side, cell = obs[6], int(obs[3:6].argmax()) - 1
        action = USE if cell == side or not wanted else RIGHT if side > 0 else LEFT
        obs, reward, over, _, _ = env.step(action)
        rewards.append(reward)
    return rewards


@pytest.mark.parametrize("length", [1, 20, 100])
def test_only_the_key_and_the_door_together_are_paid_and_only_at_the_end(length: int) -> None:
    env = KeyCorridor(length)
    for seed in range(4):
        assert play(env, seed) == [0.0] * (length + 7) + [1.0]
        assert not any(play(env, seed, key=False))
        assert not any(play(env, seed, door=False))


def test_about_one_random_episode_in_fifteen_is_paid() -> None:
    env, rng = KeyCorridor(2), np.random.default_rng(0)
    paid = 0.0
    for seed in range(1000):
        env.reset(seed=seed)
        over = False
        while not over:
            _, reward, over, _, _ = env.step(int(rng.integers(3)))
            paid += reward
    assert 0.045 < paid / 1000 < 0.09


def test_what_it_shows() -> None:
    env = KeyCorridor(3, remember=True)
    obs, _ = env.reset(seed=0)
    side = obs[6]
    np.testing.assert_array_equal(obs[[0, 4]], 1)
    env.step(RIGHT if side > 0 else LEFT)
    obs, *_ = env.step(USE)
    assert (obs[6], obs[7]) == (0, 1)  # the key has gone from its place to the hand
    for _ in range(2):
        obs, *_ = env.step(USE)
    np.testing.assert_array_equal(obs[:8], [0, 1, 0, 0, 1, 0, 0, 1])
    forgetful = KeyCorridor(3)
    forgetful.reset(seed=0)
    for action in (RIGHT if side > 0 else LEFT, USE, USE, USE):
        obs, *_ = forgetful.step(action)
    assert obs[7] == 0


def test_it_is_an_environment_of_the_factory() -> None:
    check_env(KeyCorridor(5), skip_render_check=True)
    env = make_env("zoo/KeyCorridor-v0", length=50)
    assert env.unwrapped.steps == 58  # type: ignore[attr-defined]
    env = make_env("zoo/KeyCorridorSeen100-v0")
    assert (env.unwrapped.length, env.unwrapped.remember) == (100, True)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="length of at least 1, got 0"):
        make_env("zoo/KeyCorridor-v0", length=0)
