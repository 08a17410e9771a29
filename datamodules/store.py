"""The one storage for replay, offline data and video: streams of time steps in chunk files.

A stream is an endless row of steps (of one environment: its episodes back to back). A store is a
folder:

    store.json            fields with shapes and dtypes, steps per chunk, attributes
    journal, seal.json    what is committed (see `datamodules.journal`)
    chunks/00000012.bin   up to `chunk_steps` consecutive rows of one stream, field after field
    lock                  held by the one writer

Invariants: a committed row never changes; the rows of a chunk are consecutive; rows leave only in
whole chunks, oldest first. New rows wait in memory until `flush` (or until their chunk is full),
so a crash loses at most these, and a full disk is an error message and not a torn file.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from datamodules.chunk_files import FLAGS, ChunkFiles, Field, beginnings
from datamodules.chunks import Chunk, Index
from datamodules.errors import UserError
from datamodules.files import (
    StoreCorrupted,
    WriterLock,
    naming,
    read_json,
    sync,
    write_json,
)
from datamodules.journal import EVICT, Journal, Record

__all__ = ["MAX_STREAMS", "Episode", "EpisodeStore", "Field", "StoreCorrupted"]

FORMAT: Final = 1
MAX_STREAMS: Final = 1 << 23  # so that a step id (stream << 40 | row) is a positive int64
_first_row = attrgetter("first")


class Episode(NamedTuple):
    """Rows [start, start + length) of a stream; complete if neither end is cut off."""

    stream: int
    start: int
    length: int
    complete: bool


class EpisodeStore:
    """Append-only store of time steps, made by `EpisodeStore.create` or `EpisodeStore.open`.

    One process writes, any number read meanwhile: a reader sees what was committed when it opened
    the store or last called `refresh`.

    Example:
        >>> import tempfile, numpy as np
        >>> with EpisodeStore.create(tempfile.mkdtemp(), {"reward": Field((), "float32")}) as store:
        ...     for value in range(3):
        ...         store.append(0, {"reward": np.float32(value)})
        ...     store.read(stream=0, start=1, length=2)["reward"]
        array([1., 2.], dtype=float32)
    """

    def __init__(self, path: Path, lock: WriterLock | None) -> None:
        header = read_json(path / "store.json")
        if header["format"] != FORMAT:
            raise UserError(
                f"{path} has store format {header['format']} and this version reads {FORMAT}: "
                "install the version of the package that wrote it"
            )
        self.path = path
        self.fields = {k: Field(tuple(v["shape"]), v["dtype"]) for k, v in header["fields"].items()}
        self.chunk_steps: int = header["chunk_steps"]
        self.attributes: dict[str, Any] = header.get("attributes", {})
        self._files = ChunkFiles(path, self.fields, self.chunk_steps)
        self._checks = [
            (key, shape, np.dtype(dtype), _must_be_finite(key, dtype))
            for key, (shape, dtype) in self.fields.items()
        ]
        self._lock = lock
        self._journal = Journal(path)
        self._index = Index()
        self._dirty: dict[int, Chunk] = {}  # with rows that are not committed
        self._evictions: list[int] = []  # not committed
        self._unsynced: set[int] = set()  # written without waiting for the disk
        self._load(self._journal.load())
        if lock is not None:
            self._clean()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        fields: Mapping[str, Field],
        chunk_steps: int = 1024,
        attributes: Mapping[str, Any] | None = None,
    ) -> EpisodeStore:
        """Makes an empty store and opens it for writing.

        Args:
            path: a folder that holds no store yet; it is made if need be.
            fields: arrays of one step by name; dtypes are bool, integers or floats.
            chunk_steps: steps per chunk file, >= 1: the unit of eviction and of automatic commits.
            attributes: what else to know of the data, as plain JSON; they never change. Those of
                steps of an agent name the `spec` and the `env`.

        Raises:
            UserError: a bad argument, or there is a store already.
        """
        folder = Path(path).absolute()
        if chunk_steps < 1:
            raise UserError(f"chunk_steps is {chunk_steps}: it must be at least 1")
        if not fields:
            raise UserError(f"the store {folder} needs at least one field")
        described = {key: _described(key, value) for key, value in fields.items()}
        with naming(folder):
            (folder / "chunks").mkdir(parents=True, exist_ok=True)
        with WriterLock.acquire(folder) as lock:
            if cls.exists(folder):
                raise UserError(f"{folder} already holds a store: open it, or choose another one")
            Journal(folder).create()
            # Last, for a folder without it is not yet a store.
            header = {"format": FORMAT, "chunk_steps": chunk_steps, "fields": described}
            header |= {"attributes": dict(attributes)} if attributes else {}
            write_json(folder / "store.json", header, durable=True)
            return cls(folder, lock.keep())

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], writable: bool = False, verify: bool = False
    ) -> EpisodeStore:
        """Opens a store; `verify` checks every committed byte first.

        Raises:
            UserError: no store there, or (writable) another writer has it.
            StoreCorrupted: a file is damaged. Chunks are checked when first read.
        """
        folder = Path(path).absolute()
        if not cls.exists(folder):
            raise UserError(f"there is no episode store at {folder}")
        with WriterLock.acquire(folder) if writable else nullcontext() as lock:
            store = cls(folder, lock)
            if verify:
                store.verify()
            if lock is not None:
                lock.keep()
            return store

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether a folder holds a store, be it damaged."""
        journal = Path(path) / "journal"
        return (Path(path) / "store.json").exists() or (
            journal.exists() and journal.stat().st_size > 0
        )

    def __enter__(self) -> EpisodeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commits what is not yet committed and lets another writer in."""
        if self._lock is not None:
            try:
                self.flush()
            finally:
                self._lock.release()
                self._lock = None

    @property
    def num_steps(self) -> int:
        """Rows held now."""
        return self._index.num_steps

    @property
    def num_appended(self) -> int:
        """Rows ever appended, evicted ones included."""
        return sum(stream.end for stream in self._index.streams.values())

    @property
    def stream_ids(self) -> list[int]:
        """Streams that ever had a row, sorted."""
        return sorted(self._index.streams)

    @property
    def chunk_files(self) -> list[str]:
        """Files of the chunks held, relative to the store, oldest first."""
        return [f"chunks/{chunk.file_name}" for chunk in self._index.chunks.values()]

    def bounds(self, stream: int) -> tuple[int, int]:
        """First row held and end (exclusive) of a stream, as row numbers since its beginning."""
        entry = self._index.streams.get(stream)
        if entry is None:
            raise UserError(f"the store {self.path} has no stream {stream}")
        return entry.first, entry.end

    def append(self, stream: int, step: Mapping[str, np.ndarray]) -> None:
        """Appends one row to a stream, or nothing if it raises.

        Args:
            stream: 0 <= stream < 2**23; a new number begins a new stream.
            step: one array per field, of exactly its shape and dtype.

        Raises:
            UserError: a missing, unknown, misshapen or mistyped key; a NaN or infinity in the
                reward, the action or an observation; a full disk.
        """
        if self._lock is None:
            self._must_be_writable()
        if step.keys() != self.fields.keys():
            raise UserError(self._wrong_keys(stream, step))
        for key, shape, dtype, finite in self._checks:
            value = step[key]
            if getattr(value, "dtype", None) != dtype or value.shape != shape:
                value = np.asarray(value)
                if value.dtype != dtype or value.shape != shape:
                    raise UserError(
                        f"'{key}' of stream {stream} is {value.dtype}{list(value.shape)}, but the "
                        f"store has {dtype}{list(shape)}: convert it before appending"
                    )
            if finite and not (np.isfinite(value).all() if shape else math.isfinite(value)):
                entry = self._index.streams.get(stream)
                raise UserError(
                    f"{'NaN' if np.isnan(value).any() else 'infinity'} in '{key}' at row "
                    f"{entry.end if entry else 0} of stream {stream}: nothing was stored; mend the "
                    "environment or policy that made it, or wrap it to clip the value"
                )
        chunk = self._open_chunk(stream)
        assert chunk.arrays is not None  # an open chunk is in memory
        for key, array in chunk.arrays.items():
            array[chunk.steps] = step[key]
        self._index.grow(chunk, 1)
        self._dirty[chunk.number] = chunk

    def flush(self, durable: bool = False) -> None:
        """Commits all appended rows and evictions.

        A process killed at any moment keeps what was committed. `durable` also waits for the disk,
        so that a power loss keeps it.

        Raises:
            UserError: the disk is full or the like; everything stays in memory, call it again.
        """
        self._must_be_writable()
        dirty = [chunk for _, chunk in sorted(self._dirty.items())]
        records = [self._files.write(chunk) for chunk in dirty]
        self._unsynced.update(self._dirty)
        if durable:
            for number in sorted(self._unsynced):
                sync(self._files.path(number))
            sync(self._files.folder)
        elif not records and not self._evictions:
            return
        first_eviction = self._journal.position["records"] + len(records)
        evictions = [Record(0, EVICT, number) for number in self._evictions]
        self._journal.append(records + evictions, durable)
        for chunk, record in zip(dirty, records, strict=True):
            chunk.commit(record)
            chunk.verified = len(chunk.ranges)
        for index, number in enumerate(self._evictions, first_eviction):
            self._index.evicted[number] = index
        self._dirty, self._evictions = {}, []
        if durable:
            self._unsynced.clear()
            sync(self.path)

    def refresh(self) -> None:
        """Lets a reader see what the writer committed meanwhile; a writer sees it anyway."""
        if self._lock is None:
            self._load(self._journal.load())

    def position(self) -> dict[str, int]:
        """What is committed, as plain integers that `rewind` understands."""
        return dict(self._journal.position)

    def rewind(self, position: Mapping[str, int]) -> None:
        """Goes back to an earlier position: forgets later rows and undoes later evictions.

        Appending the same rows again makes the same files again, byte for byte.

        Raises:
            UserError: the position is not of this store, or chunks it needs were deleted. Nothing
                has changed then.
        """
        self._must_be_writable()
        target = {"records": int(position["records"]), "crc32": int(position["crc32"])}
        records = self._journal.load_until(target)
        needed = Index(records).chunks.values()
        missing = [c.file_name for c in needed if not self._files.path(c.number).exists()]
        if missing:
            raise UserError(
                f"the store {self.path} cannot go back to record {target['records']}: "
                f"{len(missing)} of its chunk files are gone, the first is {missing[0]}; use a "
                "later checkpoint, or restore the files from a backup"
            )
        self._journal.cut(target)
        self._load(records)
        self._clean()

    def read(
        self, stream: int, start: int, length: int, out: Mapping[str, np.ndarray] | None = None
    ) -> Mapping[str, np.ndarray]:
        """Copies rows [start, start + length) of a stream.

        Args:
            stream: stream number.
            start: row number since the beginning of the stream.
            length: number of rows; they may cross chunks and episodes.
            out: arrays (length, ...) to copy into; its keys choose the fields.

        Returns:
            `out`, or new arrays of all fields.

        Raises:
            UserError: rows that the store does not hold.
            StoreCorrupted: a chunk is damaged.
        """
        parts = self._parts(stream, start, length)
        if out is None:
            out = {key: np.empty((length, *shape), d) for key, (shape, d) in self.fields.items()}
        done = 0
        for arrays, at, stop in parts:
            rows = slice(done, done + stop - at)
            for key, target in out.items():
                target[rows] = arrays[key][at:stop]
            done = rows.stop
        return out

    def views(self, stream: int, start: int, length: int, key: str) -> list[np.ndarray]:
        """The same rows of one field where they lie, one read-only view for each chunk.

        Raises:
            UserError: rows that the store does not hold.
            StoreCorrupted: a chunk is damaged.
        """
        found = [arrays[key][at:stop] for arrays, at, stop in self._parts(stream, start, length)]
        for view in found:
            view.flags.writeable = False
        return found

    def episodes(self) -> list[Episode]:
        """The episodes held, stream by stream, by their flags `is_first` and `is_last`.

        An episode is incomplete while it lacks its last step, or once its beginning was evicted.
        Without flags each stream is one episode.
        """
        episodes = []
        for stream in self.stream_ids:
            first, end = self.bounds(stream)
            flags = {key: np.zeros(end - first, bool) for key in FLAGS}
            stored = {key: value for key, value in flags.items() if key in self.fields}
            self.read(stream, first, end - first, stored)
            starts = np.flatnonzero(beginnings(flags)).tolist()
            for start, stop in zip(starts, [*starts[1:], end - first], strict=False):
                begun = flags["is_first"][start] if "is_first" in stored else first + start == 0
                ended = flags["is_last"][stop - 1] if "is_last" in stored else True
                complete = bool(begun and ended)
                episodes.append(Episode(stream, first + start, stop - start, complete))
        return episodes

    def evict_oldest(self) -> int:
        """Lets go of the oldest chunk and returns its stream; its file stays until deleted."""
        self._must_be_writable()
        if not self._index.chunks:
            raise UserError(f"the store {self.path} is empty: there is nothing to evict")
        chunk = self._index.remove(next(iter(self._index.chunks)))
        self._evictions.append(chunk.number)
        return chunk.stream

    def delete_evicted(self, before: Mapping[str, int]) -> None:
        """Deletes the files of chunks evicted before a position: it and later ones stay intact."""
        self._must_be_writable()
        evicted = self._index.evicted
        for number in [n for n, record in evicted.items() if record < before["records"]]:
            with naming(self._files.path(number)):
                self._files.path(number).unlink(missing_ok=True)
            del evicted[number]
            self._unsynced.discard(number)

    def verify(self) -> None:
        """Reads every committed byte.

        Raises:
            StoreCorrupted: naming the damaged file, the episodes it hits and the mend.
        """
        read_json(self.path / "store.json")
        Journal(self.path).load()
        for chunk in self._index.chunks.values():
            if chunk.committed:
                self._files.verify(chunk, self._index.streams[chunk.stream])

    def _load(self, records: list[Record]) -> None:
        """Builds the index anew; what was checked before stays so."""
        known = self._index.chunks
        self._index = Index(records)
        for number, chunk in self._index.chunks.items():
            before = known.get(number)
            if before and before.ranges == chunk.ranges[: len(before.ranges)]:
                chunk.verified = before.verified
        self._dirty, self._evictions = {}, []
        # An earlier writer may not have waited for the disk.
        self._unsynced = set(self._index.chunks)

    def _clean(self) -> None:
        """Makes the files those of an undisturbed run: no leftovers of lost or undone rows."""
        self._journal.trim()
        on_disk = {int(path.stem): path for path in self._files.folder.glob("*.bin")}
        for number, path in on_disk.items():
            if number >= self._index.next_chunk:
                with naming(path):
                    path.unlink()
        evicted = self._index.evicted
        self._index.evicted = {n: at for n, at in evicted.items() if n in on_disk}
        for stream in self._index.streams.values():
            if stream.chunks and stream.chunks[-1].steps < self.chunk_steps:
                self._files.reopen(stream.chunks[-1], stream)

    def _open_chunk(self, stream: int) -> Chunk:
        """The chunk in memory that takes the next row of a stream."""
        entry = self._index.streams.get(stream)
        if entry is not None and entry.chunks:
            last = entry.chunks[-1]
            if last.steps < self.chunk_steps:
                if not last.buffer.flags.writeable:  # `_clean` was stopped by an error
                    self._files.reopen(last, entry)
                return last
            # A full chunk is committed here, before the new row, so that a full disk loses nothing.
            self.flush()
            last.detach()
        if not 0 <= stream < MAX_STREAMS:
            raise UserError(f"the stream number {stream} is not in 0 .. {MAX_STREAMS - 1}")
        chunk = self._index.add(self._index.next_chunk, stream)
        self._files.new(chunk)
        return chunk

    def _arrays(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """Maps and checks a chunk that is not in memory."""
        missing = not self._files.path(chunk.number).exists()
        if missing and chunk.number in Index(Journal(self.path).load()).evicted:
            raise UserError(
                f"rows of stream {chunk.stream} were evicted by the writer of {self.path} "
                "meanwhile: call refresh() before reading on"
            )
        return self._files.open(chunk, self._index.streams[chunk.stream])

    def _parts(
        self, stream: int, start: int, length: int
    ) -> list[tuple[dict[str, np.ndarray], int, int]]:
        """The chunks that hold rows of a stream: their arrays, and from where to where in these."""
        first, end = self.bounds(stream)
        if length < 0 or start < first or start + length > end:
            raise UserError(
                f"rows {start} to {start + length} of stream {stream} are not in {self.path}: it "
                f"holds {first} to {end}"
            )
        chunks = self._index.streams[stream].chunks
        index = bisect_right(chunks, start, key=_first_row) - 1
        parts = []
        stop = start + length
        while start < stop:
            chunk = chunks[index]
            upto = min(stop - chunk.first, chunk.steps)
            parts.append((chunk.arrays or self._arrays(chunk), start - chunk.first, upto))
            start, index = chunk.first + upto, index + 1
        return parts

    def _must_be_writable(self) -> None:
        if self._lock is None:
            raise UserError(f"the store {self.path} is not open for writing: open it writable")

    def _wrong_keys(self, stream: int, step: Mapping[str, Any]) -> str:
        missing = sorted(self.fields.keys() - step.keys())
        unknown = sorted(step.keys() - self.fields.keys())
        parts = [f"lacks {missing}" if missing else "", f"has unknown {unknown}" if unknown else ""]
        return (
            f"a step of stream {stream} {' and '.join(filter(None, parts))}: the store "
            f"{self.path} has the fields {sorted(self.fields)}"
        )


def _must_be_finite(key: str, dtype: str) -> bool:
    watched = key in ("reward", "action") or key.startswith("obs/")
    return watched and np.issubdtype(dtype, np.floating)


def _described(key: str, value: Field) -> dict[str, Any]:
    shape, dtype = tuple(int(n) for n in value.shape), np.dtype(value.dtype)
    if dtype.kind not in "biuf" or any(n < 1 for n in shape):
        raise UserError(
            f"the field '{key}' is {dtype}{list(shape)}: stored are bool, integer and float arrays "
            "with at least one element"
        )
    return {"shape": list(shape), "dtype": dtype.name}
