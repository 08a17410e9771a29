"""Rows of one array that lie on disk in several memory-mapped parts, and are gathered at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class MappedRows:
    """One array (N, ...) whose rows lie in parts; read like an array, a row at a time or many.

    Args:
        parts: arrays (n, ...) of one shape and dtype, of at least one row together.

    Attributes:
        shape, ndim, dtype: as of an array.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self.parts])
        self._begins = self._ends - [len(part) for part in self.parts]
        self.shape = (int(self._ends[-1]), *self.parts[0].shape[1:])
        self.ndim, self.dtype = len(self.shape), self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.take(np.arange(len(self))[rows] if isinstance(rows, slice) else rows)

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """A new array (*rows.shape, ...) of some rows; as of an array, along the first axis."""
        assert axis == 0
        flat = rows.ravel()
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self._ends, flat, side="right")
        offsets = flat - self._begins[part]
        bounds = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(flat)]
        for start, stop in pairwise(bounds):
            if start < stop:
                # Without mode="clip" `take` gathers into a buffer first.
                self.parts[part[start]].take(
                    offsets[start:stop], 0, out=out[start:stop], mode="clip"
                )
        return out.reshape(*rows.shape, *self.shape[1:])
