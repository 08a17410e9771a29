"""What a reader of recorded data is, and the one door through which its episodes come in.

A reader (`Source`) says what the data looks like and hands out one episode after the other as it
was recorded: n actions, n rewards, n + 1 observations. Video has neither actions nor rewards: n + 1
observations then, and a spec whose action is None. `steps` turns such an episode into our time-step
convention, and refuses whatever is wrong with it by file and episode.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from datamodules.errors import UserError
from datamodules.mapped_rows import MappedRows
from datamodules.spec import ActionSpec, Spec
from datamodules.store import Field

# Actions so far outside of their bounds, in parts of their range, are rounding errors.
ROUNDING = 1e-4

S = TypeVar("S", bound="Source")


class Recorded(NamedTuple):
    """An episode of n actions as it was recorded.

    Attributes:
        obs: {key: (n + 1, ...)}.
        action: (n, ...), what was done at each observation but the last; None of video.
        reward: (n,), what each action earned; None of video.
        terminal: whether the task ended, and not only the recording.
    """

    obs: Mapping[str, np.ndarray]
    action: np.ndarray | None
    reward: np.ndarray | None
    terminal: bool


class Source(ABC):
    """Recorded episodes.

    Attributes:
        name: what error messages call it: a path or an id.
        spec: its observations and actions.
        inferred: whether `spec` was guessed from the data.
        lengths: (E,) int64, actions of each episode (of video: frames but one), all at least 1.
        fps: (E,) float64, frames per second of each episode, NaN where unknown; None where all are.
        env: id of the environment that it was recorded in, if it says so.
        notes: what the user should know, each one sentence.
    """

    name: str
    spec: Spec
    inferred: bool = False
    lengths: np.ndarray
    fps: np.ndarray | None = None
    env: str | None = None

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.casts: dict[str, str] = {}  # what comes in with more digits than it keeps

    @abstractmethod
    def read(self, episode: int) -> Recorded:
        """One episode.

        Raises:
            UserError: something of it is missing or damaged.
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """The files of the data, from whose sizes and times a copy of it is known to be old."""

    def where(self, episode: int) -> str:
        """How error messages call an episode."""
        return f"{self.name}, episode {episode}"

    def in_place(self) -> tuple[Source, dict[str, MappedRows]]:
        """What need not be copied to be read at random.

        Returns:
            The source of all the rest, and the images that lie on disk as they are kept: {key: rows
            (N, H, W, C) of all episodes, one after the other}.
        """
        return self, {}

    def without(self: S, keys: Iterable[str]) -> S:
        """A copy that does not show some of the observations."""
        rest = copy.copy(self)
        kept = {key: array for key, array in self.spec.obs.items() if key not in set(keys)}
        rest.spec = Spec(kept, self.spec.action)
        return rest

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.lengths)

    @property
    def num_actions(self) -> int:
        """Actions of all episodes."""
        return int(self.lengths.sum())

    def adopt(self, spec: Spec, owner: str) -> None:
        """Takes the spec of an environment or of weights, where the data agrees with it.

        Raises:
            UserError: it does not: they belong to something else.
        """
        fits = dict(self.spec.obs) == dict(spec.obs)
        if spec.action is not None:  # who has no use for actions takes any
            fits = fits and self.spec.action is not None and self._agrees(spec.action)
        if not fits:
            raise unlike(self.name, self.spec, owner, spec)
        self.spec, self.inferred = spec, False

    def _agrees(self, theirs: ActionSpec) -> bool:
        mine = self.spec.action
        if not self.inferred:
            return mine.agrees(theirs)
        # A recording need not hold all actions.
        like = mine.kind == theirs.kind and mine.shape == theirs.shape
        return like and bool((np.array(mine.nvec) <= np.array(theirs.nvec)).all())


class Joined(Source):
    """Several sources one after the other.

    Raises:
        UserError: they do not look alike.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        super().__init__()
        if all(part.inferred for part in parts):
            _share_guess(parts)
        first = next((part for part in parts if not part.inferred), parts[0])
        for part in parts:
            if part.inferred and not first.inferred:
                part.adopt(first.spec, first.name)
            elif part.spec != first.spec:
                raise UserError(
                    f"{first.name} has {first.spec}, but {part.name} has {part.spec}: data that is "
                    "joined must look alike"
                )
        self.parts = list(parts)
        self.name = " + ".join(part.name for part in parts)
        self.spec, self.inferred, self.env = first.spec, first.inferred, first.env
        self.lengths = np.concatenate([part.lengths for part in parts])
        if any(part.fps is not None for part in parts):
            unknown = [np.full(part.num_episodes, np.nan) for part in parts]
            fps = zip(parts, unknown, strict=True)
            self.fps = np.concatenate([u if part.fps is None else part.fps for part, u in fps])
        self._ends = np.cumsum([part.num_episodes for part in parts])
        self.notes = [note for part in parts for note in part.notes]

    def read(self, episode: int) -> Recorded:
        """One episode, counted over all parts."""
        part, number = self._find(episode)
        return part.read(number)

    def files(self) -> list[Path]:
        """The files of all parts."""
        return [file for part in self.parts for file in part.files()]

    def in_place(self) -> tuple[Source, dict[str, MappedRows]]:
        """Where it is so in all parts."""
        parts = [part.in_place() for part in self.parts]
        keys = parts[0][1].keys()
        if any(found.keys() != keys for _, found in parts):
            return self, {}
        rest = self.without(keys)
        rest.parts = [part for part, _ in parts]
        views = {key: [view for _, found in parts for view in found[key].parts] for key in keys}
        return rest, {key: MappedRows(views[key]) for key in keys}

    def where(self, episode: int) -> str:
        """The part and the number there."""
        part, number = self._find(episode)
        return part.where(number)

    def _find(self, episode: int) -> tuple[Source, int]:
        index = int(np.searchsorted(self._ends, episode, side="right"))
        before = int(self._ends[index - 1]) if index else 0
        return self.parts[index], episode - before


def _share_guess(parts: Sequence[Source]) -> None:
    """Gives sources that all guessed their actions the space that holds those of all of them."""
    first = parts[0].spec
    for part in parts:
        action = part.spec.action
        alike = action.kind == first.action.kind and action.shape == first.action.shape
        if not alike or dict(part.spec.obs) != dict(first.obs):
            raise unlike(part.name, part.spec, parts[0].name, first)
    actions = [part.spec.action for part in parts]
    joined = ActionSpec(
        first.action.kind,
        nvec=tuple(max(n) for n in zip(*(a.nvec for a in actions), strict=True)),
        low=tuple(min(x) for x in zip(*(a.low for a in actions), strict=True)),
        high=tuple(max(x) for x in zip(*(a.high for a in actions), strict=True)),
    )
    for part in parts:
        part.spec = Spec(part.spec.obs, joined)


def unlike(source: str, recorded: Spec, owner: str, spec: Spec) -> UserError:
    """What to say of data that does not look like an environment or weights."""
    return UserError(
        f"the data of {source} has {recorded}, but {owner} has {spec}: they do not belong together"
    )


def step_fields(spec: Spec) -> dict[str, Field]:
    """The arrays of a time step by name; video has neither action nor reward."""
    fields = {f"obs/{key}": Field(a.shape, a.dtype) for key, a in spec.obs.items()}
    if spec.action is not None:
        fields["action"] = Field(spec.action.shape, spec.action.dtype)
        fields["reward"] = Field((), "float32")
    for key in ("is_first", "is_last", "is_terminal"):
        fields[key] = Field((), "bool")
    return fields


def steps(source: Source, episode: int, clip: bool = False) -> dict[str, np.ndarray]:
    """The n + 1 time steps of an episode: arrays (n + 1, ...) of `step_fields`.

    `reward[t]` was earned by `action[t - 1]`, and `action` is zeros at the last step. Video has
    neither.

    Args:
        source: where the episode is.
        episode: its number.
        clip: bring actions that are out of bounds to the bounds.

    Raises:
        UserError: arrays whose lengths or shapes do not agree, NaN, an action out of bounds.
    """
    given, where, spec = source.read(episode), source.where(episode), source.spec
    n = int(source.lengths[episode]) if given.reward is None else len(given.reward)
    for key in spec.obs:
        rows = len(given.obs[key])
        if rows != n + 1:
            raise UserError(
                f"{where}: the observation '{key}' has {rows} rows and there are {n} rewards; an "
                "episode of n actions has n rewards and n + 1 observations"
            )
    out = {}
    for key, array in spec.obs.items():
        out[f"obs/{key}"] = _array(source, where, key, given.obs[key], array.shape, array.dtype)
    if spec.action is not None:
        if given.action is None or given.reward is None or len(given.action) != n:
            raise UserError(
                f"{where}: there are {0 if given.action is None else len(given.action)} actions "
                f"and {n} rewards; each action has one"
            )
        action = _action(source, where, given.action, clip)
        reward = _array(source, where, "reward", given.reward, (), "float32")
        out["action"] = np.concatenate([action, np.zeros_like(action[:1])])
        out["reward"] = np.concatenate([np.zeros(1, np.float32), reward])
    out["is_first"], out["is_last"] = np.zeros((2, n + 1), bool)
    out["is_terminal"] = np.zeros(n + 1, bool)
    out["is_first"][0] = out["is_last"][-1] = True
    out["is_terminal"][-1] = given.terminal
    return out


def said(source: Source) -> list[str]:
    """The notes of a source, with one on what was cast while its episodes were read."""
    parts = source.parts if isinstance(source, Joined) else [source]
    casts = {key: dtype for part in [source, *parts] for key, dtype in part.casts.items()}
    if not casts:
        return source.notes
    kinds = ", ".join(f"{key} ({dtype})" for key, dtype in sorted(casts.items()))
    return [*source.notes, f"{source.name}: {kinds} is kept as float32"]


def fingerprint(source: Source, **options: object) -> str:
    """What a copy of the data, made with these options, is recognised by."""
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files()]
    return json.dumps([files, source.spec.to_dict(), options], sort_keys=True)


def note_empty(source: Source, empty: Sequence[int]) -> None:
    """Says which episodes are left out because nothing was done in them.

    Raises:
        UserError: none is left.
    """
    if not len(source.lengths):
        raise UserError(f"{source.name} holds no episode with an action: there is nothing to learn")
    if len(empty):
        source.notes.append(
            f"{source.name}: {len(empty)} of {len(empty) + source.num_episodes} episodes have no "
            f"action and are left out, the first is episode {empty[0]}"
        )


def inferred_action(source: str, actions: np.ndarray) -> tuple[ActionSpec, str]:
    """Guesses an action space from recorded actions (N,) or (N, A).

    Returns:
        The space, and a sentence that says what was guessed.

    Raises:
        UserError: actions none of which is finite, or neither numbers of actions nor vectors.
    """
    # `steps` refuses the others, by their episode.
    finite = np.isfinite(actions.reshape(len(actions), -1)).all(1)
    if not finite.any():
        raise UserError(f"{source}: all actions are NaN or infinite: mend the recording")
    actions = actions[finite]
    if actions.ndim == 1 and actions.dtype.kind in "iu":
        n = int(actions.max()) + 1
        if actions.min() < 0:
            raise UserError(
                f"{source}: the action {actions.min()} is below 0: number the actions from 0"
            )
        return ActionSpec("discrete", nvec=(max(n, 2),)), f"{max(n, 2)} discrete actions"
    if actions.ndim == 1:
        actions = actions[:, None]
    if actions.ndim != 2:
        raise UserError(
            f"{source}: actions of shape {actions.shape[1:]} are neither numbers nor vectors: "
            "store them as (N,) integers or (N, A) floats"
        )
    if actions.dtype.kind in "iu":
        nvec = tuple(int(n) + 1 for n in actions.max(0))
        return ActionSpec("multi_discrete", nvec=nvec), f"multi-discrete actions {list(nvec)}"
    low, high = actions.min(0).astype(float), actions.max(0).astype(float)
    if (np.abs(actions) <= 1 + ROUNDING).all():
        low, high = -np.ones_like(low), np.ones_like(high)
    high = np.where(high > low, high, low + 1)
    spec = ActionSpec("box", low=tuple(low.tolist()), high=tuple(high.tolist()))
    return spec, f"{len(low)} actions in [{low.min():g}, {high.max():g}]"


def _array(
    source: Source, where: str, key: str, value: np.ndarray, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """One array of an episode, with the shape and dtype of the spec and without NaN."""
    value = np.asarray(value)
    if value.shape[1:] != shape:
        raise UserError(
            f"{where}: '{key}' has the shape {value.shape[1:]} at each step, and {shape} is said "
            "of this data"
        )
    if value.dtype.kind not in "biuf":
        raise UserError(f"{where}: '{key}' is {value.dtype}, not numbers")
    if value.dtype.kind == "f" and value.dtype.itemsize > 4:
        source.casts[key] = value.dtype.name
    with np.errstate(over="ignore"):  # what does not fit becomes infinity, and is refused as such
        value = value.astype(dtype, copy=False)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        row = int(np.flatnonzero(~np.isfinite(value.reshape(len(value), -1)).all(1))[0])
        raise UserError(
            f"{where}: NaN or infinity in '{key}' at step {row}: mend the recording or leave this "
            "episode out"
        )
    return value


def _action(source: Source, where: str, value: np.ndarray, clip: bool) -> np.ndarray:
    """Actions (n, ...) as the spec has them, within their bounds."""
    spec = source.spec.action
    value = np.asarray(value)
    if spec.kind == "box":
        value = value.reshape(len(value), -1) if value.ndim != 2 else value
        value = _array(source, where, "action", value, spec.shape, "float32")
        low, high = np.array(spec.low, np.float32), np.array(spec.high, np.float32)
        slack = ROUNDING * (high - low)
        outside = (value < low - slack) | (value > high + slack)
    else:
        if spec.kind == "discrete":
            value = value.reshape(len(value))
        if value.dtype.kind == "f" and not np.array_equal(value, np.floor(value)):
            raise UserError(f"{where}: the actions are not whole numbers, but the space is {spec}")
        value = _array(source, where, "action", value, spec.shape, "int64")
        low, high = np.zeros(len(spec.nvec), np.int64), np.array(spec.nvec) - 1
        if spec.kind == "discrete":
            low, high = low[0], high[0]
        outside = (value < low) | (value > high)
    if outside.any() and not (clip and spec.kind == "box"):
        row = int(np.flatnonzero(outside.reshape(len(value), -1).any(1))[0])
        mend = "clip_actions=True brings such actions to their bounds" if spec.kind == "box" else ""
        raise UserError(
            f"{where}: the action {value[row].tolist()} at step {row} is out of its bounds "
            f"{np.asarray(low).tolist()} to {np.asarray(high).tolist()}: "
            f"{mend or 'it belongs to another environment'}"
        )
    return np.clip(value, low, high)
