from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from datamodules.envs import ActionRepeat, Resize, frames_per_step, make_env
from datamodules.envs.wrappers import area_resize
from datamodules.errors import MissingExtra, UserError
from datamodules.spec import Spec
from datamodules.workers import EnvPool, Transition

EXTRAS = {
    "ale/": "ale_py",
    "ALE/": "ale_py",
    "Vizdoom": "vizdoom",
    "MiniGrid": "minigrid",
    "CarRacing": "Box2D",
}
FAMILIES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("CartPole-v1", {}, {"vector"}),
    ("dm_control/ball_in_cup-catch-v0", {}, {"position", "velocity"}),
    ("dm_control/cartpole-balance_sparse", {"obs": "both"}, {"image", "position", "velocity"}),
    ("ale/Breakout", {}, {"image"}),
    ("ale/ms_pacman", {"grey": True, "resize": "bilinear", "size": 84}, {"image"}),
    ("ALE/Pong-v5", {}, {"image"}),
    ("VizdoomTakeCover-v1", {"frame_skip": 4, "screen_rows": 200}, {"image"}),
    ("VizdoomDefendCenter-v1", {"frame_skip": 4, "variables": True}, {"image", "gamevariables"}),
    ("MiniGrid-DoorKey-6x6-v0", {}, {"image"}),
    ("MiniGrid-DoorKey-6x6-v0", {"view": "partial", "size": 32}, {"image"}),
]


class Countdown(gym.Env):
    """Ends after `length` steps; the observation and the reward are the step number."""

    observation_space = Box(-np.inf, np.inf, (), np.float64)
    action_space = Discrete(2)

    def __init__(self, length: int = 5) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.float64(0), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return np.float64(self.t), float(self.t), self.t == self.length, False, {}


def made(name: str, **kwargs: Any) -> gym.Env:
    for prefix, module in EXTRAS.items():
        if name.startswith(prefix) and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    try:
        return make_env(name, **kwargs)
    except UserError as error:
        if "need OpenGL" in str(error):
            pytest.skip(str(error))
        raise


def episode(env: gym.Env, seed: int, steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    action_spec = Spec.from_spaces(env.observation_space, env.action_space).action
    record = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(action_spec.sample(rng))
        record.append({**obs, "reward": np.float64(reward)})
        if terminated or truncated:
            break
    return record


def same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a
    )


# Sets have no fixed order: with them in the ids, test processes would not agree on the names.
@pytest.mark.parametrize(
    ("name", "kwargs", "keys"), FAMILIES, ids=lambda x: None if isinstance(x, set) else str(x)
)
def test_observations_match_the_spec_and_seeds_reproduce(
    name: str, kwargs: dict[str, Any], keys: set[str]
) -> None:
    env = made(name, **kwargs)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    assert set(spec.obs) == keys
    steps = 40 if name.startswith("Vizdoom") else 8  # games of Doom begin alike
    episode(env, 3, 4)
    used = episode(env, 7, steps)
    for obs in used:
        for key, array in spec.obs.items():
            assert obs[key].shape == array.shape
            assert obs[key].dtype == array.dtype
    fresh = made(name, **kwargs)
    assert same(used, episode(fresh, 7, steps))
    assert not same(used, episode(fresh, 8, steps))
    env.close()
    fresh.close()


def test_float64_scalars_become_float32_of_shape_one() -> None:
    env = make_env(Countdown)
    obs, _ = env.reset()
    assert obs["vector"].shape == (1,)
    assert obs["vector"].dtype == np.float32
    assert env.observation_space["vector"].shape == (1,)
    with EnvPool([partial(make_env, Countdown)]) as pool:
        assert pool.spec == Spec.from_spaces(env.observation_space, env.action_space)
        assert isinstance(pool.reset(0), Transition), "the pool compares with its spec"


def test_observations_belong_to_the_caller() -> None:
    class Reusing(Countdown):
        observation_space = Box(-1, 9, (1,), np.float32)
        buffer = np.zeros(1, np.float32)

        def step(self, action: int) -> Any:
            result = super().step(action)
            self.buffer[:] = self.t
            return self.buffer, *result[1:]

    env = make_env(Reusing)
    env.reset()
    first = env.step(0)[0]["vector"]
    env.step(0)
    assert first == 1


def test_action_repeat_sums_rewards_and_stops_at_the_end() -> None:
    env = make_env(Countdown, action_repeat=3)
    env.reset()
    obs, reward, terminated, *_ = env.step(0)
    assert (obs["vector"].item(), reward, terminated) == (3, 1 + 2 + 3, False)
    obs, reward, terminated, *_ = env.step(0)
    assert (obs["vector"].item(), reward, terminated) == (5, 4 + 5, True)


def test_time_limit_counts_agent_steps_and_truncates() -> None:
    env = make_env(partial(Countdown, 100), action_repeat=2, time_limit=3)
    env.reset()
    flags = [env.step(0)[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]


def test_time_limit_replaces_the_registered_one() -> None:
    env = make_env("Pendulum-v1", time_limit=250)  # registered with 200
    env.reset(seed=0)
    flags = [env.step(np.zeros(1, np.float32))[3] for _ in range(250)]
    assert flags.index(True) == 249


def test_frames_per_step_multiplies_repeat_and_frame_skip() -> None:
    assert frames_per_step(make_env("CartPole-v1")) == 1
    assert frames_per_step(make_env("CartPole-v1", action_repeat=2)) == 2
    assert frames_per_step(made("ale/Breakout", action_repeat=2)) == 8


def test_area_resize_weighs_pixels_by_their_share() -> None:
    image = np.array([0, 90, 240], np.uint8).reshape(1, 3, 1).repeat(3, 0)
    # each of two columns covers one and a half pixels: (0 + 90/2) / 1.5 and (90/2 + 240) / 1.5
    np.testing.assert_array_equal(area_resize(image, 2)[..., 0], [[30, 190], [30, 190]])


def test_resize_leaves_vectors_of_a_dict_alone() -> None:
    class Both(Countdown):
        observation_space = Dict(
            {"camera": Box(0, 255, (8, 6, 3), np.uint8), "speed": Box(-1, 1, (2,))}
        )

        def reset(self, **kwargs: Any) -> Any:
            return self.observation_space.sample(), {}

    env = make_env(Both, size=4)
    obs, _ = env.reset()
    assert {key: value.shape for key, value in obs.items()} == {"camera": (4, 4, 3), "speed": (2,)}


def test_dm_control_ends_by_its_time_limit_as_truncated() -> None:
    env = made("dm_control/cartpole-balance", action_repeat=8)
    env.reset(seed=0)
    flags = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(125)]
    assert set(flags[:-1]) == {(False, False)}
    assert flags[-1] == (False, True)


def test_dm_control_ends_with_discount_zero_as_terminated() -> None:
    env = made("dm_control/cartpole-balance")
    env.reset(seed=0)
    task = env.unwrapped._env.task  # type: ignore[attr-defined]
    task.get_termination = lambda physics: 0.0
    assert env.step(np.zeros(1, np.float32))[2:4] == (True, False)


def test_doom_time_out_is_truncated_and_death_terminated() -> None:
    timed_out = made("VizdoomBasic-v1", frame_skip=100, episode_timeout=150)
    timed_out.reset(seed=0)
    assert [timed_out.step(0)[2:4] for _ in range(2)][-1] == (False, True)
    dying = made("VizdoomTakeCover-v1", frame_skip=50)
    dying.reset(seed=0)
    for _ in range(200):
        _, _, terminated, truncated, _ = dying.step(0)
        if terminated or truncated:
            break
    assert (terminated, truncated) == (True, False)


def test_doom_leaves_no_settings_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = made("VizdoomBasic-v1")
    env.reset(seed=0)
    env.close()
    assert list(tmp_path.glob("*.ini")) == []


def breakout_flags(env: gym.Env, steps: int) -> tuple[list[int], list[int]]:
    """Steps at which episodes end, and lives at each end; firing, then waiting, loses lives."""
    ends, lives = [], []
    env.reset(seed=0)
    for step in range(steps):
        _, _, terminated, truncated, info = env.step(1 if step % 2 else 0)
        if terminated or truncated:
            ends.append(step)
            lives.append(info["lives"])
            env.reset()
    return ends, lives


def test_atari_life_loss_ends_episodes_without_a_new_game() -> None:
    _, lives = breakout_flags(made("ale/Breakout", life_loss=True), 250)
    assert lives[:5] == [4, 3, 2, 1, 0]
    _, lives = breakout_flags(made("ale/Breakout"), 250)
    assert set(lives) == {0}


def test_atari_seed_starts_a_new_game_after_a_lost_life() -> None:
    env = made("ale/Breakout", life_loss=True)
    first = episode(env, 5, 200)
    assert same(first, episode(env, 5, 200))


def test_atari_shows_the_maximum_of_the_last_two_frames() -> None:
    options: dict[str, Any] = {"noop_min": 3, "noop_max": 3, "size": 210, "grey": True}
    single = made("ale/Pong", frame_skip=1, **options)
    skipping = made("ale/Pong", frame_skip=4, **options)
    frames = np.stack([obs["image"] for obs in episode_of(single, [2] * 100)])
    shown = np.stack([obs["image"] for obs in episode_of(skipping, [2] * 25)])
    np.testing.assert_array_equal(shown[0], frames[0])
    np.testing.assert_array_equal(shown[1:], np.maximum(frames[3::4], frames[4::4]))
    assert (frames[3::4] != frames[4::4]).any()


def episode_of(env: gym.Env, actions: list[int]) -> list[dict[str, np.ndarray]]:
    return [env.reset(seed=1)[0], *(env.step(action)[0] for action in actions)]


def test_atari_clips_rewards_to_their_sign() -> None:
    env = made("ale/MsPacman", clip_reward=True)
    env.reset(seed=0)
    assert {env.step(3)[1] for _ in range(120)} == {0.0, 1.0}


def test_car_racing_draws_only_what_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = made("CarRacing-v3", action_repeat=4, size=64)
    frames = made("CarRacing-v3")
    for env in (quick, frames):
        env.reset(seed=3)
    drawn = Counter[gym.Env]()
    car_racing: Any = type(quick.unwrapped)
    draw = car_racing._render

    def counted(game: gym.Env, mode: str) -> Any:
        drawn.update([game])
        return draw(game, mode)

    monkeypatch.setattr(car_racing, "_render", counted)
    for i in range(6):
        action = np.array([0.3 if i > 2 else -0.3, 1, 0], np.float32)
        steps = [frames.step(action) for _ in range(4)]
        obs, reward, terminated, truncated, _ = quick.step(action)
        np.testing.assert_array_equal(obs["image"], area_resize(steps[-1][0]["image"], 64))
        assert reward == pytest.approx(sum(float(step[1]) for step in steps), abs=1e-5)
        assert (terminated, truncated) == steps[-1][2:4]
    assert drawn == {quick.unwrapped: 6, frames.unwrapped: 24}


def test_minigrid_views_differ() -> None:
    full = made("MiniGrid-Empty-8x8-v0").reset(seed=0)[0]["image"]
    partial_view = made("MiniGrid-Empty-8x8-v0", view="partial").reset(seed=0)[0]["image"]
    assert full.shape == partial_view.shape == (64, 64, 3)
    assert (full != partial_view).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CartPol-v1", "CartPole-v1"),
        ("CartPole-v7", "CartPole-v1"),
        ("not an id", "Malformed"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("dm_control/cartpole-balanc-v0", "dm_control/cartpole-balance-v0"),
        ("dm_control/zzz", "ball_in_cup"),
        ("ale/Brekout", "ale/Breakout"),
    ],
)
def test_unknown_ids_are_user_errors(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(name)


def test_unsupported_spaces_name_the_environment_and_the_wrapper() -> None:
    class Numbered(Countdown):
        observation_space = Discrete(3)

    with pytest.raises(UserError, match=r"Numbered.*FlattenObservation"):
        make_env(Numbered)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"size": 64}, "hold none"),
        ({"action_repeat": 0}, "action_repeat=0"),
        ({"time_limit": 0}, "time_limit=0"),
        ({"size": -1}, "size=-1"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_arguments_are_user_errors(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_env("CartPole-v1", **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("dm_control/cartpole-balance", {"obs": "picture"}, "proprio"),
        ("dm_control/cartpole-balance", {"size": 64}, "hold none"),
        ("ale/Pong", {"resize": "cubic"}, "bilinear"),
        ("ale/Pong", {"noop_min": 5, "noop_max": 2}, "noop_max=2"),
        ("ale/Pong", {"colour": 1}, "colour"),
        ("MiniGrid-Empty-5x5-v0", {"view": "top"}, "partial"),
        ("VizdoomBasic-v1", {"screen_rows": 1000}, "240"),
    ],
)
def test_bad_family_options_are_user_errors(name: str, kwargs: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(name, **kwargs)


def test_a_callable_must_return_an_environment() -> None:
    with pytest.raises(UserError, match="returned int"):
        make_env(lambda: 3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("ale/Pong", "ale_py", "atari"),
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("VizdoomBasic-v1", "vizdoom.gymnasium_wrapper", "vizdoom"),
        ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
        ("LunarLander-v3", "Box2D", "box2d"),
    ],
)
def test_missing_extras_name_the_pip_command(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for imported in [m for m in sys.modules if m.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, imported)  # which would not ask for Box2D again
    with pytest.raises(MissingExtra, match=rf"pip install 'world-model-zoo\[{extra}\]'"):
        make_env(name)


def test_wrappers_of_a_made_environment_can_be_stacked() -> None:
    env = make_env(partial(make_env, "CartPole-v1"), action_repeat=2)
    assert frames_per_step(env) == 2
    assert set(env.reset(seed=0)[0]) == {"vector"}


def test_wrappers_are_exported_lazily() -> None:
    assert issubclass(ActionRepeat, gym.Wrapper)
    assert issubclass(Resize, gym.Wrapper)
    import datamodules.envs

    with pytest.raises(AttributeError, match="no_such"):
        _ = datamodules.envs.no_such
