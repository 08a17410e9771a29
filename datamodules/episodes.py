"""Recorded episodes in memory: one contiguous array for each key, read once.

With a cache the arrays are memory-mapped files, written at the first reading and found again until
the data changes: so data may be larger than the memory, ranks share it, and the next run begins at
once.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.files import alone_in, naming
from datamodules.sources.source import Source, fingerprint, said, step_fields, steps

INDEX = "index.json"


class Episodes:
    """Whole episodes back to back, by the time-step convention.

    Attributes:
        name: where they come from.
        arrays: {"obs/<key>", "action", "reward", "is_first", "is_last", "is_terminal"} (N, ...);
            video has neither actions nor rewards. Images in place are `MappedRows`, read alike.
        starts: (E + 1,) int64, the first row of each episode, and N.
        notes: what the user should know of them.
    """

    def __init__(
        self, name: str, arrays: dict[str, np.ndarray], starts: np.ndarray, notes: Sequence[str]
    ) -> None:
        # Plain views: indexing the subclass for mapped files is slower.
        self.arrays = {key: np.asarray(array) for key, array in arrays.items()}
        self.name, self.starts, self.notes = name, starts, list(notes)

    @classmethod
    def load(
        cls,
        source: Source,
        clip: bool = False,
        cache: str | os.PathLike[str] | None = None,
        in_place: bool = False,
    ) -> Episodes:
        """Reads all episodes of a source.

        Args:
            source: the data.
            clip: bring actions that are out of bounds to the bounds.
            cache: folder for memory-mapped files; None reads into memory.
            in_place: leave images where they are, if that can be, and read only the rest.

        Raises:
            UserError: what is wrong with the data, by file and episode; a full disk.
        """
        rest, images = source.in_place() if in_place else (source, {})
        if images:
            read = cls.load(rest, clip)
            mapped = {f"obs/{key}": rows for key, rows in images.items()}
            read.arrays = {**mapped, **read.arrays}  # type: ignore[dict-item]
            return read
        if cache is None:
            return cls._read(source, clip, lambda key, shape, dtype: np.empty(shape, dtype))
        mark = fingerprint(source, clip=clip)
        folder = Path(cache) / f"{zlib.crc32(mark.encode()):08x}"
        found = cls._mapped(source.name, folder, mark)
        if found is None:
            # Ranks begin together: the first writes, the others find its files.
            with alone_in(Path(cache)):
                found = cls._mapped(source.name, folder, mark)
                found = cls._written(source, clip, folder, mark) if found is None else found
        return found

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(E,) actions of each episode."""
        return np.diff(self.starts) - 1

    @property
    def returns(self) -> np.ndarray:
        """(E,) float64, undiscounted sum of the rewards of each episode."""
        return np.add.reduceat(self.arrays["reward"].astype(np.float64), self.starts[:-1])

    @classmethod
    def _read(
        cls, source: Source, clip: bool, make: Callable[[str, tuple[int, ...], str], np.ndarray]
    ) -> Episodes:
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(source.lengths + 1)])
        arrays = {
            key: make(key, (int(starts[-1]), *shape), dtype)
            for key, (shape, dtype) in step_fields(source.spec).items()
        }
        for episode in range(source.num_episodes):
            rows = slice(starts[episode], starts[episode + 1])
            for key, value in steps(source, episode, clip).items():
                if len(value) != rows.stop - rows.start:
                    raise UserError(
                        f"{source.where(episode)} has {len(value) - 1} actions, but "
                        f"{rows.stop - rows.start - 1} were announced: the data changed meanwhile"
                    )
                arrays[key][rows] = value
        return cls(source.name, arrays, starts, said(source))

    @classmethod
    def _written(cls, source: Source, clip: bool, folder: Path, mark: str) -> Episodes:
        """Reads a source into a cache; what a killed or failed writer left is removed."""
        fresh = folder.with_suffix(".writing")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            with naming(folder):
                fresh.mkdir()
                read = cls._read(source, clip, _mapped_in(fresh))
                index = {"mark": mark, "starts": read.starts.tolist(), "notes": read.notes}
                index["keys"] = list(read.arrays)
                (fresh / INDEX).write_text(json.dumps(index))
                # A folder in use stays readable to those that have mapped it.
                shutil.rmtree(folder, ignore_errors=True)
                fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        found = cls._mapped(source.name, folder, mark)
        if found is None:
            raise UserError(f"the cache in '{folder}' cannot be read back: name another folder")
        found.notes = read.notes
        return found

    @classmethod
    def _mapped(cls, name: str, folder: Path, mark: str) -> Episodes | None:
        """What a cache holds, if it is whole and of this data."""
        try:
            index: dict[str, Any] = json.loads((folder / INDEX).read_text())
            if index["mark"] != mark:
                return None
            keys = {key: _file(folder, key) for key in index["keys"]}
            arrays = {key: np.load(file, mmap_mode="r") for key, file in keys.items()}
        except (OSError, EOFError, ValueError, LookupError, TypeError):
            return None
        starts = np.array(index["starts"], np.int64)
        if any(len(array) != starts[-1] for array in arrays.values()):
            return None
        return cls(name, arrays, starts, list(index.get("notes", [])))


def _mapped_in(folder: Path) -> Callable[[str, tuple[int, ...], str], np.ndarray]:
    def make(key: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.lib.format.open_memmap(_file(folder, key), "w+", np.dtype(dtype), shape)

    return make


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key.replace('/', '-')}.npy"
