"""Turns the Gymnasium spaces of a data set into a `Spec`, and its arrays into those of the spec.

An environment can be wrapped where a space is not supported; a recording cannot, so more is done
for it here: nested dicts are flattened, discrete observations become one-hot vectors, grey images
get a channel, images with the channels first are turned, and texts are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from datamodules.envs.wrappers import area_resize
from datamodules.errors import UserError
from datamodules.spec import CHANNELS, IMAGE_KEY, VECTOR_KEY, ActionSpec, ArraySpec

Convert = Callable[[np.ndarray], np.ndarray]


class Column(NamedTuple):
    """One observation key.

    Attributes:
        path: keys that lead to its array through nested dicts; none for a single array.
        space: as recorded.
        array: what it becomes.
        convert: makes that of a recorded array (T, ...).
    """

    path: tuple[str, ...]
    space: gym.Space
    array: ArraySpec
    convert: Convert


def columns(
    space: gym.Space, only: Sequence[str] | None = None, size: int | None = None
) -> tuple[dict[str, Column], list[str]]:
    """The observation keys of a space; nested ones are joined by `_`.

    Args:
        space: of the recorded observations.
        only: keys to read; by default all.
        size: side in pixels to which images are resized.

    Returns:
        The keys, and the names of those that are left out because no model reads them (texts).

    Raises:
        UserError: an unsupported space, or unknown keys in `only`.
    """
    found: dict[str, Column] = {}
    texts = []
    for path, leaf in _leaves(space, ()):
        key = "_".join(path).replace(".", "_").replace("/", "_")
        if isinstance(leaf, gym.spaces.Text):
            texts.append(key)
            continue
        if only is not None and path and key not in only:
            continue
        column = _column(path, leaf, f"observation '{key}'" if key else "the observation", size)
        if not key:
            key = IMAGE_KEY if column.array.is_image else VECTOR_KEY
        if key in found:
            raise UserError(f"two observations are both called '{key}' once their dict is flat")
        found[key] = column
    unknown = sorted(set(only or []) - found.keys())
    if unknown or not found:
        known, _ = columns(space) if only else (found, [])
        raise UserError(f"there is no observation {unknown}: the data has {sorted(known)}")
    return found, texts


def action_space(space: gym.Space) -> tuple[ActionSpec | None, Convert]:
    """The spec of an action space and what turns recorded actions into it.

    The spec is None where a box has no finite bounds: they must be found in the data.

    Raises:
        UserError: an unsupported space.
    """
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        start = np.asarray(space.start)
        if isinstance(space, gym.spaces.Discrete):
            spec = ActionSpec("discrete", nvec=(int(space.n),))
            return spec, lambda a: a - start
        spec = ActionSpec("multi_discrete", nvec=tuple(int(n) for n in space.nvec.flatten()))
        return spec, lambda a: (a - start).reshape(len(a), -1)
    if isinstance(space, gym.spaces.MultiBinary):
        size = int(np.prod(space.shape))
        return ActionSpec("multi_discrete", nvec=(2,) * size), _flat
    if isinstance(space, gym.spaces.Box):
        bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
        if not bounded or (space.low >= space.high).any():
            return None, _flat
        low, high = space.low.flatten().astype(float), space.high.flatten().astype(float)
        return ActionSpec("box", low=tuple(low.tolist()), high=tuple(high.tolist())), _flat
    raise UserError(
        f"the action space is {type(space).__name__}: supported are Box, Discrete, MultiDiscrete "
        "and MultiBinary; record the data in an environment with one of these"
    )


def _flat(actions: np.ndarray) -> np.ndarray:
    return actions.reshape(len(actions), -1)


def _leaves(space: gym.Space, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], gym.Space]]:
    if isinstance(space, gym.spaces.Dict):
        for key, sub in space.spaces.items():
            yield from _leaves(sub, (*path, key))
    else:
        yield path, space


def _column(path: tuple[str, ...], space: gym.Space, name: str, size: int | None) -> Column:
    if isinstance(space, gym.spaces.Discrete):
        n, start = int(space.n), int(space.start)
        one_hot = np.eye(n, dtype=np.float32)
        return Column(path, space, ArraySpec((n,), "float32"), lambda x: one_hot[x - start])
    if isinstance(space, gym.spaces.MultiBinary):
        return Column(path, space, ArraySpec((int(np.prod(space.shape)),), "float32"), _flat)
    if not isinstance(space, gym.spaces.Box):
        raise UserError(
            f"{name} is a {type(space).__name__} space: supported are Box, Discrete, MultiBinary "
            "and dicts of them; leave it out by naming the `observations` to read"
        )
    shape = tuple(int(n) for n in space.shape)
    if space.dtype == np.uint8 and len(shape) == 2:
        return _image(path, space, (*shape, 1), lambda x: x[..., None], size)
    if space.dtype == np.uint8 and len(shape) == 3:
        if shape[-1] not in CHANNELS and shape[0] in CHANNELS:
            turned = (*shape[1:], shape[0])
            return _image(path, space, turned, lambda x: np.moveaxis(x, 1, -1), size)
        if shape[-1] in CHANNELS:
            return _image(path, space, shape, lambda x: x, size)
    if len(shape) > 2:
        raise UserError(
            f"{name} has dtype {space.dtype} and shape {shape}: images must be uint8 (H, W, C) "
            "and other observations at most two-dimensional"
        )
    if not shape:
        return Column(path, space, ArraySpec((1,), "float32"), lambda x: x.reshape(-1, 1))
    return Column(path, space, ArraySpec(shape, "float32"), lambda x: x)


def _image(
    path: tuple[str, ...],
    space: gym.Space,
    shape: tuple[int, ...],
    convert: Convert,
    size: int | None,
) -> Column:
    if size is None or shape[:2] == (size, size):
        return Column(path, space, ArraySpec(shape, "uint8"), convert)

    def resized(images: np.ndarray) -> np.ndarray:
        return np.stack([area_resize(image, size) for image in convert(images)])

    return Column(path, space, ArraySpec((size, size, shape[-1]), "uint8"), resized)
