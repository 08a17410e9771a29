"""Wrappers that every environment of the factory goes through.

`ActionRepeat` and `Resize` are what world-model papers do to any environment; `DictObservation` is
the door between Gymnasium's spaces and our `Spec`, and always the outermost wrapper.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from datamodules.errors import UserError
from datamodules.resizing import area_resize
from datamodules.spec import IMAGE_KEY, VECTOR_KEY, Spec

StepResult = tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]


class ActionRepeat(gym.Wrapper):
    """Applies each action `repeat` times, sums the rewards, and stops where the episode ends."""

    def __init__(self, env: gym.Env, repeat: int) -> None:
        super().__init__(env)
        self.frames_per_step = repeat

    def step(self, action: Any) -> StepResult:
        """One agent step, at most `repeat` environment steps."""
        total = 0.0
        for _ in range(self.frames_per_step):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Resize(gym.ObservationWrapper):
    """Scales every uint8 image (H, W, C), alone or in a Dict, to (size, size, C).

    Raises:
        UserError: no image among the observations.
    """

    def __init__(self, env: gym.Env, size: int) -> None:
        super().__init__(env)
        self._size = size
        space = env.observation_space
        if isinstance(space, Dict):
            self._keys = [key for key, sub in space.spaces.items() if _is_image(sub)]
            resized = {key: _resized(space[key], size) for key in self._keys}
            self.observation_space = Dict({**space.spaces, **resized})
            found = bool(self._keys)
        else:
            self._keys = []
            found = _is_image(space)
            if found:
                self.observation_space = _resized(space, size)
        if not found:
            raise UserError(
                f"size={size} resizes images, but the observations ({space}) hold none: leave "
                "size out"
            )

    def observation(self, observation: Any) -> Any:
        """Resizes the images of one observation."""
        if not self._keys:
            return area_resize(observation, self._size)
        images = {key: area_resize(observation[key], self._size) for key in self._keys}
        return {**observation, **images}


class DictObservation(gym.Wrapper):
    """Makes observations and actions exactly what the environment's `Spec` says.

    Observations become a dict of arrays that the caller owns: a single Box is the key `image`
    (uint8, H x W x C) or `vector`, numbers other than uint8 images are float32, and a scalar has
    shape (1,). A uint8 image of another dtype is left as it is, for the checks of `EnvPool` to
    report. Actions are one row of a batch of that Spec (a 0-d or (A,) array).

    Args:
        env: any environment with supported spaces.
        name: what error messages call it; its id by default.

    Raises:
        UserError: an unsupported space, with the wrapper that would help.
    """

    def __init__(self, env: gym.Env, name: str | None = None) -> None:
        super().__init__(env)
        self.name = name or env_name(env)
        space = env.observation_space
        self._single: str | None = None
        if not isinstance(space, Dict):
            self._single = IMAGE_KEY if _is_image(space) else VECTOR_KEY
            space = Dict({self._single: space})
        try:
            Spec.from_spaces(space, env.action_space)
        except UserError as error:
            raise UserError(f"environment {self.name}: {error}") from None
        self.observation_space = Dict({k: _as_stored(sub) for k, sub in space.spaces.items()})
        self.spec_of_arrays = Spec.from_spaces(self.observation_space, env.action_space)
        self._images = frozenset(self.spec_of_arrays.images)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Resets, see `gymnasium.Env.reset`."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._arrays(obs), info

    def step(self, action: Any) -> StepResult:
        """Steps with an action of the Spec."""
        obs, reward, terminated, truncated, info = self.env.step(self._native(action))
        return self._arrays(obs), reward, terminated, truncated, info

    def _arrays(self, obs: Any) -> dict[str, np.ndarray]:
        if self._single is not None:
            obs = {self._single: obs}
        return {key: self._array(key, value) for key, value in obs.items()}

    def _array(self, key: str, value: Any) -> np.ndarray:
        # Copies, because environments may reuse their buffers.
        array = np.array(value) if key in self._images else np.array(value, np.float32)
        return array.reshape(1) if array.ndim == 0 else array

    def _native(self, action: Any) -> Any:
        space = self.action_space
        if isinstance(space, Discrete):
            return int(action)
        return np.asarray(action, space.dtype).reshape(space.shape)


def frames_per_step(env: gym.Env) -> int:
    """Game frames one agent step causes: action repeat times the frame skip of `ale/` or Doom.

    The ids of other packages (`ALE/...-v5`, MuJoCo) count as one frame a step.
    """
    frames = 1
    while True:
        frames *= vars(env).get("frames_per_step", 1)
        if not isinstance(env, gym.Wrapper):
            return frames
        env = env.env


def env_name(env: gym.Env) -> str:
    """The registered id of an environment, or the name of its class."""
    spec = env.unwrapped.spec
    return spec.id if spec is not None else type(env.unwrapped).__name__


def _is_image(space: gym.Space) -> bool:
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3


def _resized(space: gym.Space, size: int) -> Box:
    assert space.shape is not None
    return Box(0, 255, (size, size, space.shape[-1]), np.uint8)


def _as_stored(space: gym.Space) -> gym.Space:
    assert isinstance(space, Box)
    if _is_image(space):
        return space
    shape = space.shape or (1,)
    with np.errstate(over="ignore"):  # float64 bounds may become infinite
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return Box(low.reshape(shape), high.reshape(shape), shape, np.float32)
