"""What an environment or a data set looks like, as plain data.

A `Spec` names the observation keys with their shapes and dtypes, and the action space. A datamodule
has one, a model is built from one, and a checkpoint keeps its `to_dict()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from datamodules.errors import UserError

IMAGE_KEY = "image"
VECTOR_KEY = "vector"
CHANNELS = (1, 2, 3, 4)  # that an image can have


@dataclass(frozen=True)
class ArraySpec:
    """Shape (of one time step) and dtype of one observation key."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_image(self) -> bool:
        """Whether this is a uint8 image (H, W, C)."""
        return self.dtype == "uint8" and len(self.shape) == 3

    @property
    def size(self) -> int:
        """Number of elements of one time step."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ActionSpec:
    """An action space.

    `discrete` has `nvec = (n,)`, `multi_discrete` one entry per component, `box` has the bounds
    `low` and `high` of its flattened components.
    """

    kind: Literal["discrete", "box", "multi_discrete"]
    nvec: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        """Number of actions of a discrete space."""
        if self.kind != "discrete":
            raise AttributeError(f"a {self.kind} action space has no single number of actions")
        return self.nvec[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one action in a batch: () for discrete, (A,) otherwise."""
        return () if self.kind == "discrete" else (len(self.nvec) or len(self.low),)

    @property
    def dtype(self) -> str:
        """dtype of one action in a batch."""
        return "float32" if self.kind == "box" else "int64"

    @property
    def encoded_size(self) -> int:
        """Length of the vector a network sees: one-hot parts, or the box scaled to [-1, 1]."""
        return sum(self.nvec) or len(self.low)

    def agrees(self, other: ActionSpec) -> bool:
        """Whether it is the same space, but for rounded bounds."""
        if (self.kind, self.nvec, self.shape) != (other.kind, other.nvec, other.shape):
            return False
        return np.allclose([self.low, self.high], [other.low, other.high], 1e-5, 1e-5)

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Draws one uniformly random action in the units of the environment."""
        if self.kind == "box":
            return rng.uniform(self.low, self.high).astype(np.float32)
        action = rng.integers(0, self.nvec)
        return action[0] if self.kind == "discrete" else action


@dataclass(frozen=True)
class Spec:
    """Observation keys and action space; what a model is built from.

    Example:
        >>> import gymnasium as gym
        >>> env = gym.make("CartPole-v1")
        >>> spec = Spec.from_spaces(env.observation_space, env.action_space)
        >>> spec.obs["vector"].shape, spec.action.n
        ((4,), 2)
        >>> Spec.from_dict(spec.to_dict()) == spec
        True
    """

    obs: Mapping[str, ArraySpec]
    # None for video without actions; models that need some refuse it when they are built.
    action: ActionSpec = None  # type: ignore[assignment]

    @classmethod
    def from_spaces(cls, observation_space: gym.Space, action_space: gym.Space) -> Spec:
        """Describes Gymnasium spaces.

        A single Box becomes the key `image` (uint8, H x W x C) or `vector`; a Dict keeps its keys;
        floats are float32.

        Raises:
            UserError: an unsupported space, by name, with the wrapper that would help.
        """
        return cls(_observations(observation_space), _action(action_space))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        obs = {k: {"shape": list(v.shape), "dtype": v.dtype} for k, v in self.obs.items()}
        if self.action is None:
            return {"obs": obs, "action": None}
        action = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.action).items()}
        return {"obs": obs, "action": action}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """The inverse of `to_dict`."""
        obs = {k: ArraySpec(tuple(v["shape"]), v["dtype"]) for k, v in data["obs"].items()}
        action = data["action"]
        if action is None:
            return cls(obs)
        parts = {k: tuple(action[k]) for k in ("nvec", "low", "high")}
        return cls(obs, ActionSpec(action["kind"], **parts))

    @property
    def images(self) -> list[str]:
        """Keys of the images, sorted."""
        return sorted(k for k, v in self.obs.items() if v.is_image)

    @property
    def vectors(self) -> list[str]:
        """Keys of the other observations, sorted."""
        return sorted(k for k, v in self.obs.items() if not v.is_image)

    def __str__(self) -> str:
        obs = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in self.obs.items())
        act = self.action
        if act is None:
            return f"observations {obs}; no actions"
        box = f"{len(act.low)} in [{min(act.low)}, {max(act.high)}]" if act.low else ""
        size = list(act.nvec) if act.nvec else box
        return f"observations {obs}; {act.kind} action {size}"


def _observations(space: gym.Space) -> dict[str, ArraySpec]:
    if isinstance(space, gym.spaces.Dict):
        return {key: _array(f"observation '{key}'", sub) for key, sub in space.spaces.items()}
    array = _array("the observation", space)
    return {IMAGE_KEY if array.is_image else VECTOR_KEY: array}


def _array(name: str, space: gym.Space) -> ArraySpec:
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        raise UserError(
            f"{name} is {space}, which no model reads: wrap the environment in "
            "gymnasium.wrappers.FlattenObservation, which makes it a one-hot vector"
        )
    if isinstance(space, gym.spaces.Tuple | gym.spaces.Dict):
        raise UserError(
            f"{name} is a nested {type(space).__name__} space: wrap the environment in "
            "gymnasium.wrappers.FlattenObservation, or make it one Dict of Box spaces"
        )
    if not isinstance(space, gym.spaces.Box):
        raise UserError(
            f"{name} is a {type(space).__name__} space: supported are Box and Dict of Box; "
            "gymnasium.wrappers.TransformObservation can turn it into one"
        )
    shape = tuple(int(n) for n in space.shape)
    if space.dtype == np.uint8 and len(shape) == 3:
        if shape[-1] not in CHANNELS:
            raise UserError(
                f"{name} is an image of shape {shape}, but channels come last here: wrap the "
                "environment in gymnasium.wrappers.TransformObservation with a transpose"
            )
        return ArraySpec(shape, "uint8")
    if space.dtype == np.uint8 and len(shape) == 2:
        raise UserError(
            f"{name} is a grey image of shape {shape} without a channel: wrap the environment in "
            f"gymnasium.wrappers.ReshapeObservation(env, {(*shape, 1)})"
        )
    if len(shape) > 2:
        raise UserError(
            f"{name} has dtype {space.dtype} and shape {shape}: images must be uint8 (H, W, C) and "
            "other observations at most two-dimensional; use gymnasium.wrappers.RescaleObservation "
            "or TransformObservation"
        )
    return ArraySpec(shape, "float32")


def _action(space: gym.Space) -> ActionSpec:
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        start = np.asarray(space.start)
        if start.any():
            raise UserError(
                f"the action space {space} does not start at 0: wrap the environment in "
                "gymnasium.wrappers.TransformAction with action + start"
            )
        if isinstance(space, gym.spaces.Discrete):
            return ActionSpec("discrete", nvec=(int(space.n),))
        return ActionSpec("multi_discrete", nvec=tuple(int(n) for n in space.nvec.flatten()))
    if isinstance(space, gym.spaces.Box):
        low, high = space.low.flatten().astype(float), space.high.flatten().astype(float)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise UserError(
                f"the action space {space} has infinite bounds: wrap the environment in "
                "gymnasium.wrappers.RescaleAction or ClipAction over a bounded Box"
            )
        if (low >= high).any():
            raise UserError(f"the action space {space} has an empty range: drop that component")
        if len(space.shape) != 1:
            raise UserError(
                f"the action space {space} is not one-dimensional: wrap the environment in "
                "gymnasium.wrappers.TransformAction with a reshape"
            )
        return ActionSpec("box", low=tuple(low.tolist()), high=tuple(high.tolist()))
    raise UserError(
        f"the action space is {type(space).__name__}: supported are Discrete, Box and "
        "MultiDiscrete; gymnasium.wrappers.TransformAction can translate it"
    )
