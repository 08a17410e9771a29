"""A trained stable-baselines3 model as a policy, to record what it does."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import MissingExtra, UserError
from datamodules.spec import Spec
from zoo.base import State


class Sb3Policy:
    """Acts as a stable-baselines3 model does.

    Loading runs code that the file holds, as stable-baselines3 always does: open only files that
    you trust.

    Args:
        path: the zip file that `model.save` wrote (A2C, DDPG, DQN, PPO, SAC or TD3).
        spec: of the environment.

    Raises:
        UserError: no such file, another algorithm, or a model for other observations or actions.
        MissingExtra: stable-baselines3 is not installed.
    """

    def __init__(self, path: Path, spec: Spec) -> None:
        self._model = _load(path)
        self._spec = spec
        space = self._model.observation_space
        inner = dict(space.spaces) if hasattr(space, "spaces") else None
        wanted = inner if inner is not None else {next(iter(spec.obs)): space}
        self._single = inner is None
        self._turned = {key for key, sub in wanted.items() if _is_turned(sub, spec, key)}
        fits = wanted.keys() == spec.obs.keys() and (inner is not None or len(spec.obs) == 1)
        for key in wanted if fits else ():
            shape = spec.obs[key].shape
            shape = (shape[-1], *shape[:-1]) if key in self._turned else shape
            fits = fits and wanted[key].shape == shape
        actions = Spec.from_spaces(_any_box(), self._model.action_space).action
        if not fits or (actions.kind, actions.shape, actions.nvec) != (
            spec.action.kind,
            spec.action.shape,
            spec.action.nvec,
        ):
            raise UserError(
                f"the model '{path}' reads {space} and does {self._model.action_space}, but the "
                f"environment has {spec}: it was trained on another one"
            )

    def initial_state(self, batch_size: int) -> State:
        """Nothing is remembered."""
        return {}

    def act(
        self, obs: Mapping[str, Tensor], state: State, *, explore: bool
    ) -> tuple[Tensor, State]:
        """Actions in environment units; exploring ones are samples of the policy."""
        arrays = {key: value.numpy() for key, value in obs.items()}
        for key in self._turned:
            arrays[key] = np.moveaxis(arrays[key], -1, 1)
        seen: Any = next(iter(arrays.values())) if self._single else arrays
        action, _ = self._model.predict(seen, deterministic=not explore)
        dtype = self._spec.action.dtype
        return torch.from_numpy(np.asarray(action, dtype)), state


def _load(path: Path) -> Any:
    try:
        import stable_baselines3
    except ImportError as error:
        raise MissingExtra(f"the policy '{path}'", "baselines") from error
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    name = _algorithm(path)
    try:
        return getattr(stable_baselines3, name).load(path, device="cpu")
    except Exception as error:  # it raises whatever a damaged file makes it
        raise UserError(f"'{path}' cannot be loaded as a {name} model: {error}") from error


def _algorithm(path: Path) -> str:
    """Which class saved a file, by the module of its policy and by its settings."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
        module = data["policy_class"]["__module__"]
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"'{path}' is not a file that stable-baselines3 saved") from error
    named = {"dqn": "DQN", "sac": "SAC", "td3": "TD3", "ddpg": "DDPG"}
    for part, name in named.items():
        if f".{part}." in module:
            return name
    if "on_policy" in module or "common.policies" in module:
        return "PPO" if "clip_range" in data else "A2C"
    raise UserError(f"'{path}' was saved by {module}: known are A2C, DDPG, DQN, PPO, SAC and TD3")


def _is_turned(space: Any, spec: Spec, key: str) -> bool:
    """Whether the model reads images with the channels first."""
    array = spec.obs.get(key)
    if array is None or not array.is_image:
        return False
    return space.shape != array.shape and space.shape == (array.shape[-1], *array.shape[:-1])


def _any_box() -> Any:
    import gymnasium as gym

    return gym.spaces.Box(0, 1, (1,))
