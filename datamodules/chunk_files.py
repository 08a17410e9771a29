"""The chunk files of a store: where the arrays lie in them; reading, checking and writing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch

from datamodules.chunks import Chunk, Range, Stream
from datamodules.files import StoreCorrupted, write_at
from datamodules.journal import ROWS, Record

FLAGS: Final = ("is_first", "is_last")
_ALIGNMENT: Final = 64


class Field(NamedTuple):
    """Shape (of one time step) and dtype of one array of a step."""

    shape: tuple[int, ...]
    dtype: str


class ChunkFiles:
    """Files of `chunk_steps` rows, each field (chunk_steps, *shape) one after the other."""

    def __init__(self, store: Path, fields: Mapping[str, Field], chunk_steps: int) -> None:
        self.store, self.folder = store, store / "chunks"
        self.size = 0
        self._steps = chunk_steps
        self._regions: dict[str, tuple[int, int, tuple[int, ...], np.dtype]] = {}
        for key, (shape, dtype) in fields.items():
            row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
            region = (self.size, row_bytes, (chunk_steps, *shape), np.dtype(dtype))
            self._regions[key] = region
            self.size += -(-chunk_steps * row_bytes // _ALIGNMENT) * _ALIGNMENT

    def path(self, number: int) -> Path:
        """File of a chunk."""
        return self.folder / f"{number:08d}.bin"

    def new(self, chunk: Chunk) -> None:
        """Gives an empty chunk memory to append to."""
        chunk.buffer = np.zeros(self.size, np.uint8)
        chunk.arrays = self._views(chunk.buffer)

    def open(self, chunk: Chunk, stream: Stream) -> dict[str, np.ndarray]:
        """Maps a chunk and checks what was not checked before.

        Raises:
            StoreCorrupted: the file is missing, cut off or damaged.
        """
        buffer = self._read(chunk, stream)
        self._check(chunk, stream, buffer, chunk.ranges[chunk.verified :])
        chunk.verified = len(chunk.ranges)
        chunk.buffer, chunk.arrays = buffer, self._views(buffer)
        return chunk.arrays

    def reopen(self, chunk: Chunk, stream: Stream) -> None:
        """Brings a chunk that is not full back into memory to append to it."""
        self.open(chunk, stream)
        chunk.buffer = chunk.buffer.copy()
        chunk.arrays = self._views(chunk.buffer)
        leftovers = list(self._pieces(chunk.buffer, chunk.steps, self._steps))
        if any(piece.any() for _, piece in leftovers):
            for _, piece in leftovers:
                piece[:] = 0
            write_at(self.path(chunk.number), leftovers)

    def verify(self, chunk: Chunk, stream: Stream) -> None:
        """Reads and checks all committed rows of a chunk."""
        self._check(chunk, stream, self._read(chunk, stream), chunk.ranges)

    def write(self, chunk: Chunk) -> Record:
        """Writes the rows that are not committed, and returns the record that will commit them."""
        start, stop = chunk.committed, chunk.steps
        pieces = self._pieces(chunk.buffer, start, stop)
        write_at(self.path(chunk.number), pieces, create=start == 0, size=self.size)
        crc = self._checksum(chunk.buffer, start, stop)
        return Record(chunk.first + start, ROWS, chunk.number, chunk.stream, stop - start, crc)

    def _views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        return {
            key: buffer[offset : offset + shape[0] * row_bytes].view(dtype).reshape(shape)
            for key, (offset, row_bytes, shape, dtype) in self._regions.items()
        }

    def _pieces(
        self, buffer: np.ndarray, start: int, stop: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The bytes of rows [start, stop), field by field, with their offset in the file."""
        for offset, row_bytes, _, _ in self._regions.values():
            at = offset + start * row_bytes
            yield at, buffer[at : offset + stop * row_bytes]

    def _checksum(self, buffer: np.ndarray, start: int, stop: int) -> int:
        crc = 0
        for _, piece in self._pieces(buffer, start, stop):
            crc = zlib.crc32(piece.data, crc)
        return crc

    def _check(
        self, chunk: Chunk, stream: Stream, buffer: np.ndarray, ranges: Iterable[Range]
    ) -> None:
        for start, steps, crc in ranges:
            if self._checksum(buffer, start, start + steps) != crc:
                row = chunk.first + start
                raise self._damaged(chunk, stream, row, steps, "do not fit their checksum")

    def _read(self, chunk: Chunk, stream: Stream) -> np.ndarray:
        buffer = self._map(chunk)
        if buffer is None:
            what = "are missing or cut off"
            raise self._damaged(chunk, stream, chunk.first, chunk.committed, what)
        return buffer

    def _map(self, chunk: Chunk) -> np.ndarray | None:
        """The bytes of a chunk file, mapped read-only; None if it is missing or cut off."""
        path = self.path(chunk.number)
        # Beyond its end a mapped file kills the process, so its size comes first.
        if not path.exists() or path.stat().st_size != self.size:
            return None
        # Not mmap.mmap, which holds a file descriptor for each of possibly thousands of chunks.
        mapped = torch.from_file(str(path), shared=False, size=self.size, dtype=torch.uint8).numpy()
        mapped.flags.writeable = False
        return mapped

    def _damaged(
        self, chunk: Chunk, stream: Stream, row: int, steps: int, what: str
    ) -> StoreCorrupted:
        """Names the file, rows and episodes. The flags may be damaged too: they are taken as is."""
        flags = {key: np.zeros(stream.end - stream.first, bool) for key in FLAGS}
        for other in stream.chunks:
            buffer = self._map(other)
            arrays = {} if buffer is None else self._views(buffer)
            at = other.first - stream.first
            for key in flags.keys() & arrays.keys():
                flags[key][at : at + other.steps] = arrays[key][: other.steps]
        episode = np.cumsum(beginnings(flags))[row - stream.first :] - 1
        return StoreCorrupted(
            f"{self.path(chunk.number)} is damaged: rows {row} to {row + steps - 1} of stream "
            f"{chunk.stream} (its episodes {episode[0]} to {episode[steps - 1]} of those held) "
            f"{what}. Restore this file from a backup, or delete {self.store} and collect again"
        )


def beginnings(flags: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where an episode begins, (rows,) bool: at the first row, at `is_first`, after `is_last`."""
    begins = flags["is_first"].copy()
    begins[1:] |= flags["is_last"][:-1]
    begins[:1] = True
    return begins
