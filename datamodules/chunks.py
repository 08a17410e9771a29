"""The index of a store: which rows of which stream are in which chunk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from datamodules.journal import EVICT, Record

_NOTHING: Final = np.empty(0, np.uint8)
_NOTHING.flags.writeable = False


class Range(NamedTuple):
    """Committed rows [start, start + steps) of a chunk and their checksum."""

    start: int
    steps: int
    crc32: int


@dataclass(slots=True, eq=False)
class Chunk:
    """Rows [first, first + steps) of a stream.

    `arrays`, views of `buffer`, are in memory and writeable while the writer appends to the chunk,
    else mapped when first read. Of `ranges`, the committed rows, the first `verified` are known to
    fit their checksums.
    """

    number: int
    stream: int
    first: int
    steps: int = 0
    committed: int = 0
    verified: int = 0
    ranges: list[Range] = field(default_factory=list)
    buffer: np.ndarray = field(default_factory=lambda: _NOTHING)
    arrays: dict[str, np.ndarray] | None = None

    @property
    def file_name(self) -> str:
        """Name within the folder of chunks."""
        return f"{self.number:08d}.bin"

    def commit(self, record: Record) -> None:
        """Notes that more rows are committed."""
        self.ranges.append(Range(self.committed, record.steps, record.crc32))
        self.committed += record.steps

    def detach(self) -> None:
        """Lets go of the bytes."""
        self.buffer, self.arrays = _NOTHING, None


@dataclass(slots=True)
class Stream:
    """The chunks held of a stream, in order, and the number of rows it ever had."""

    chunks: list[Chunk] = field(default_factory=list)
    end: int = 0

    @property
    def first(self) -> int:
        """First row held."""
        return self.chunks[0].first if self.chunks else self.end


class Index:
    """Which rows are where: what the records of a journal add up to, and later appends.

    `chunks` is ordered by age; `evicted` maps chunk numbers to the index of their eviction record.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.streams: dict[int, Stream] = {}
        self.chunks: dict[int, Chunk] = {}
        self.evicted: dict[int, int] = {}
        self.next_chunk = 0
        self.num_steps = 0
        for index, record in enumerate(records):
            if record.kind == EVICT:
                self.remove(record.chunk)
                self.evicted[record.chunk] = index
                continue
            chunk = self.chunks.get(record.chunk) or self.add(record.chunk, record.stream)
            self.grow(chunk, record.steps)
            chunk.commit(record)

    def add(self, number: int, stream: int) -> Chunk:
        """Begins a chunk at the end of a stream."""
        entry = self.streams.setdefault(stream, Stream())
        chunk = self.chunks[number] = Chunk(number, stream, first=entry.end)
        entry.chunks.append(chunk)
        self.next_chunk = max(self.next_chunk, number + 1)
        return chunk

    def grow(self, chunk: Chunk, steps: int) -> None:
        """Counts rows at the end of the last chunk of a stream."""
        chunk.steps += steps
        self.streams[chunk.stream].end += steps
        self.num_steps += steps

    def remove(self, number: int) -> Chunk:
        """Takes out the oldest chunk."""
        chunk = self.chunks.pop(number)
        self.streams[chunk.stream].chunks.remove(chunk)
        self.num_steps -= chunk.steps
        return chunk
