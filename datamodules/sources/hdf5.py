"""Reads HDF5 files in the manner of D4RL: flat arrays, one row for each action.

`observations` (N, ...), or a group of such arrays, `actions` (N,) or (N, A), `rewards` (N,),
`terminals` (N,) where the task ended, and `timeouts` (N,) where only the recording did. With
`next_observations` the last observation of each episode is known; without, the one before stands
in for it, so that no reward is lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from datamodules.errors import UserError
from datamodules.sources.hdf5_files import open_hdf5, reading
from datamodules.sources.source import Recorded, Source, inferred_action, note_empty
from datamodules.sources.spaces import columns
from datamodules.spec import Spec

REQUIRED = ("observations", "actions", "rewards", "terminals")
SPEC = "spec"  # an attribute that our own files have
ENV = "env"


class Hdf5Source(Source):
    """A file of flat arrays.

    Args:
        path: the file.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.

    Raises:
        UserError: missing or unequal arrays, or a damaged file.
    """

    def __init__(
        self, path: Path, only: Sequence[str] | None = None, size: int | None = None
    ) -> None:
        super().__init__()
        self.path, self.name = path, str(path)
        self._file = open_hdf5(path)
        with reading(self.name):
            missing = [key for key in REQUIRED if key not in self._file]
            if missing:
                raise UserError(
                    f"{self.name} lacks {missing}: it has {sorted(self._file)}, and such files "
                    f"need {list(REQUIRED)} and `timeouts` or `next_observations`"
                )
            self._action = self._flat("actions")
            self._reward = self._flat("rewards").reshape(-1)
            self._terminal = self._flat("terminals").reshape(-1).astype(bool)
            space = _space_of(self._file["observations"])
            try:
                self._columns, _ = columns(space, only, size)
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from None
            self._obs = {k: self._open("observations", c.path) for k, c in self._columns.items()}
            self._next = {}
            if "next_observations" in self._file:
                self._next = {
                    k: self._open("next_observations", c.path) for k, c in self._columns.items()
                }
            self._must_be_equally_long()
            last = self._terminal | self._timeouts()
            self.env = _text(self._file.attrs.get(ENV))
            self.spec = self._find_spec()
        self._find_episodes(last)

    def read(self, episode: int) -> Recorded:
        """One episode."""
        start, n = int(self._starts[episode]), int(self.lengths[episode])
        obs = {}
        with reading(self.where(episode)):
            for key, array in self._obs.items():
                last = self._next.get(key, array)[start + n - 1 : start + n]
                recorded = np.concatenate([array[start : start + n], last])
                obs[key] = self._columns[key].convert(recorded)
        rows = slice(start, start + n)
        terminal = bool(self._terminal[start + n - 1])
        return Recorded(obs, self._action[rows], self._reward[rows], terminal)

    def files(self) -> list[Path]:
        """The one file."""
        return [self.path]

    def _flat(self, name: str) -> np.ndarray:
        array = self._file[name]
        if not hasattr(array, "shape"):
            raise UserError(f"{self.name}: '{name}' is a group, not an array")
        return np.asarray(array[()])

    def _open(self, group: str, path: tuple[str, ...]) -> Any:
        """Images stay in the file; other arrays are read whole: slices of chunks are slow."""
        array = self._file[group]
        for key in path:
            if key not in array:
                raise UserError(f"{self.name}: '{group}' lacks '{key}'")
            array = array[key]
        return array if array.ndim == 4 else np.asarray(array[()])

    def _must_be_equally_long(self) -> None:
        lengths = {"actions": len(self._action), "rewards": len(self._reward)}
        lengths["terminals"] = len(self._terminal)
        lengths |= {f"observations '{k}'": len(v) for k, v in self._obs.items()}
        lengths |= {f"next_observations '{k}'": len(v) for k, v in self._next.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{key} {n}" for key, n in lengths.items())
            raise UserError(
                f"the arrays of {self.name} are not equally long ({listed}): each action has one "
                "observation, reward and terminal"
            )

    def _timeouts(self) -> np.ndarray:
        """Where a recording ends without the task's end, (N,) bool."""
        if "timeouts" in self._file:
            timeouts = self._flat("timeouts").reshape(-1).astype(bool)
            if len(timeouts) != len(self._reward):
                raise UserError(
                    f"the arrays of {self.name} are not equally long (timeouts {len(timeouts)}, "
                    f"rewards {len(self._reward)})"
                )
            return timeouts
        if not self._next:
            raise UserError(
                f"{self.name} lacks 'timeouts', so nobody knows where an episode was cut: add that "
                "array (True at the last row of each cut episode), or next_observations"
            )
        jumps = np.zeros(len(self._reward), bool)
        jumps[-1:] = True
        for key, after in self._next.items():
            rows, here = np.asarray(after[()]), np.asarray(self._obs[key][()])
            same = (rows[:-1] == here[1:]).reshape(len(rows) - 1, -1).all(1)
            jumps[:-1] |= ~same
        return jumps

    def _find_spec(self) -> Spec:
        stored = _text(self._file.attrs.get(SPEC))
        obs = {key: column.array for key, column in self._columns.items()}
        if stored is not None:
            return Spec(obs, Spec.from_dict(json.loads(stored)).action)
        if not len(self._action):
            raise UserError(f"{self.name} is empty: there is nothing to learn")
        action, guess = inferred_action(self.name, self._action)
        self.inferred = True
        self.notes.append(f"{self.name} does not describe its actions; they look like {guess}")
        return Spec(obs, action)

    def _find_episodes(self, last: np.ndarray) -> None:
        ends = np.flatnonzero(last) + 1
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
        self._starts, self.lengths = starts, ends - starts
        if not len(ends):
            raise UserError(
                f"no episode of {self.name} ends: set 'terminals' or 'timeouts' at the last row of "
                "each"
            )
        note_empty(self, [])
        left = len(last) - int(ends[-1])
        if left:
            self.notes.append(
                f"{self.name}: the last episode does not end, and its {left} rows are left out"
            )
        if not self._next:
            self.notes.append(
                f"{self.name} has no next_observations: the last observation of each episode is "
                "the one before it"
            )


def _space_of(part: Any) -> gym.Space:
    """The space that an array (N, ...), or a group of them, seems to have."""
    if hasattr(part, "keys"):
        return gym.spaces.Dict({key: _space_of(sub) for key, sub in part.items()})
    if part.dtype == np.uint8:
        return gym.spaces.Box(0, 255, part.shape[1:], np.uint8)
    return gym.spaces.Box(-np.inf, np.inf, part.shape[1:], np.float32)


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
