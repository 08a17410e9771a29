"""Recordings that are slow to read are decoded once, into a store: videos, LeRobot data sets.

Beside the store lies `ingested.json`: for each recording by its name what it looked like (`mark`),
and its rows in the store, or why it cannot be read. It also names the position of the store that it
belongs to. Whoever was killed goes on from there: later rows of the store are forgotten, so that
nothing is twice and nothing missing. What has changed since, or is new, is ingested on top; rows of
what has changed stay, unread.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from datamodules.errors import UserError
from datamodules.files import alone_in, read_json, write_json
from datamodules.progress import Progress
from datamodules.sources.decoding import Broken, Decoded, Failed, Job, decode_all, pixels
from datamodules.sources.writing import chunk_steps
from datamodules.store import EpisodeStore, Field

INDEX = "ingested.json"
FORMAT = 2  # a new number ingests everything anew
COMMIT_SECONDS = 5.0
SMALL = 8 << 20  # bytes below which processes cost more than they save
SAMPLE = 8  # recordings from which the size of the store is foretold
BEGINNING = {"ingested.tmp"}  # of a folder that holds nothing yet
FLAGS = ("is_first", "is_last", "is_terminal")
Errors = Literal["stop", "skip"]


class Item(NamedTuple):
    """A recording.

    Attributes:
        name: among those of its source.
        label: what error messages call it.
        mark: changes when it does.
        bytes: on disk, or whatever tells how large it is beside the others.
        job: decodes it.
    """

    name: str
    label: str
    mark: str
    bytes: int
    job: Job


@dataclass
class Index:
    """What a folder holds.

    Attributes:
        settings: what it was made with; others need another folder.
        about: what else is known of the data.
        position: of the store; None before it is begun.
        recordings: {name: {"mark": ..., and "row", "steps", "fps", "constant" or "broken"}}.
    """

    settings: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    position: dict[str, int] | None = None
    recordings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Reads it."""
        return cls(**read_json(folder / INDEX))

    def write(self, folder: Path) -> None:
        """Replaces it; it belongs to what is committed in the store."""
        write_json(folder / INDEX, asdict(self), durable=True)


def default_folder(source: Path, settings: Mapping[str, Any]) -> Path:
    """Where recordings are ingested unless told otherwise: below the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    cache = Path(root) if root else Path.home() / ".cache"
    mark = zlib.crc32(repr([str(source.resolve()), sorted(settings.items())]).encode())
    return cache / "world-model-zoo" / f"{source.resolve().name}-{mark:08x}"


def ingest(
    items: Sequence[Item],
    folder: Path,
    source: str,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    errors: Errors = "stop",
    workers: int | None = None,
) -> Index:
    """Brings a folder up to date.

    Processes that ask for the same at the same time wait for the first.

    Args:
        items: the recordings.
        folder: of the store; it is made if need be.
        source: what error messages call them all.
        settings: of decoding.
        about: what else is known of the data; kept beside it.
        errors: "stop" at the first recording that cannot be read, or "skip" and remember it.
        workers: processes that decode; by default one for each core, and none where there is
            little to do.

    Returns:
        What the folder holds now; of recordings that are no longer there, too.

    Raises:
        UserError: a recording that cannot be read, other settings, something else in the folder, a
            full disk.
    """
    if errors not in ("stop", "skip"):
        raise UserError(f"errors='{errors}' is neither 'stop' nor 'skip'")
    wanted = {**settings, "format": FORMAT}
    index = _read(folder, wanted)
    if index is None or index.about != about or _todo(items, index, errors):
        with alone_in(folder):
            index = _read(folder, wanted) or Index(wanted)
            index.about = dict(about)
            _ingest(_todo(items, index, errors), folder, source, index, errors, workers)
    return index


def _read(folder: Path, settings: Mapping[str, Any]) -> Index | None:
    """What a folder holds, if it was begun."""
    if not (folder / INDEX).exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - BEGINNING:
            raise UserError(
                f"'{folder}' holds something else than ingested recordings: name an empty folder"
            )
        return None
    index = Index.read(folder)
    if index.settings != settings:
        raise UserError(
            f"'{folder}' was ingested with {_told(index.settings)}, not with {_told(settings)}: "
            "name another folder, or delete this one"
        )
    return index


def _todo(items: Sequence[Item], index: Index, errors: Errors) -> list[Item]:
    """What is new or has changed; a broken one is not tried again before it changes."""
    todo = []
    for item in items:
        entry = index.recordings.get(item.name)
        if entry is None or entry["mark"] != item.mark:
            todo.append(item)
        elif errors == "stop":
            _must_be_whole(item, entry)
    return todo


def _ingest(
    todo: Sequence[Item],
    folder: Path,
    source: str,
    index: Index,
    errors: Errors,
    workers: int | None,
) -> None:
    if workers is None:
        small = sum(item.bytes for item in todo) < SMALL
        workers = 0 if small or len(todo) == 1 else cores()
    if todo:
        print(f"zoo: ingesting {len(todo):,} of '{source}' into '{folder}'", file=sys.stderr)
    progress, frames, begun = Progress(), 0, time.monotonic()
    with _Writer(folder, index) as writer:
        results = decode_all([item.job for item in todo], folder / "decoded", workers)
        try:
            for done, (item, result) in enumerate(zip(todo, results, strict=True), 1):
                writer.add(item, result)
                entry = index.recordings[item.name]
                if errors == "stop":
                    _must_be_whole(item, entry)
                frames += entry.get("steps", 0)
                rate = frames / (time.monotonic() - begun)
                progress.show(f"ingesting '{source}', {rate:,.0f} frames/s", done, len(todo))
                writer.must_fit(source, todo, done)
        finally:
            progress.end()
            results.close()


class _Writer:
    """Appends recordings to the store of a folder, and says so in its index."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self.store: EpisodeStore | None = None
        self._committed = time.monotonic()
        self._begun = 0
        self._torn = False  # whether a part of an episode is in the store
        if index.position is None:
            for name in ("store.json", "journal", "seal.json"):  # of one that was hardly begun
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "chunks", ignore_errors=True)
            index.write(folder)
        else:
            self.store = EpisodeStore.open(folder, writable=True)
            self.store.rewind(index.position)
            self._begun = self.store.num_steps

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        """What was done stays, whatever happened."""
        try:
            if not self._torn:
                self._commit()
        finally:
            if self.store is not None:
                self.store.close()

    def add(self, item: Item, result: Decoded | Broken | Failed) -> None:
        """Stores a recording, or why it cannot be read."""
        if isinstance(result, Failed):
            raise UserError(result.reason)
        if isinstance(result, Decoded):
            unlike = self._unlike(result)
            result = Broken(unlike) if unlike else result
        if isinstance(result, Broken):
            entry: dict[str, Any] = {"broken": result.reason}
        else:
            entry = {"row": self._append(result), "steps": result.steps}
            entry |= {"fps": result.facts.fps, "constant": result.facts.constant}
        self.index.recordings[item.name] = {"mark": item.mark, **entry}
        if time.monotonic() > self._committed + COMMIT_SECONDS:
            self._commit()

    def must_fit(self, source: str, todo: Sequence[Item], done: int) -> None:
        """Refuses to fill the disk, as soon as that can be foretold."""
        if self.store is None or not SAMPLE <= done < len(todo):
            return
        row = sum(int(np.prod(f.shape)) * np.dtype(f.dtype).itemsize for f in self._fields.values())
        written = (self.store.num_steps - self._begun) * row
        share = sum(i.bytes for i in todo[:done]) / max(sum(i.bytes for i in todo), 1)
        needed, free = written / max(share, 1e-9) - written, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"ingesting '{source}' needs about {needed / 1e9:,.1f} GB more, and the disk of "
                f"'{self.folder}' has {free / 1e9:,.1f} GB: make the frames smaller (size=), or "
                "name a folder elsewhere (ingest=)"
            )

    @property
    def _fields(self) -> Mapping[str, Field]:
        assert self.store is not None
        return self.store.fields

    def _unlike(self, decoded: Decoded) -> str | None:
        """How the steps differ from those of the store."""
        if self.store is None:
            return None
        for key, (shape, dtype) in decoded.fields.items():
            stored = self._fields.get(key)
            if stored != (shape, dtype):
                its = pixels(stored.shape) if stored else "nothing of the kind"
                return (
                    f"has {pixels(shape)}, and what was ingested before it {its}: a size for all "
                    "of them (size=) mends that"
                )
        return None

    def _append(self, decoded: Decoded) -> int:
        """Stores an episode and returns its first row."""
        if self.store is None:
            fields = {key: Field(*field) for key, field in decoded.fields.items()}
            fields |= {key: Field((), "bool") for key in FLAGS}
            self.store = EpisodeStore.create(self.folder, fields, chunk_steps(fields))
        row = self.store.num_appended
        arrays = decoded.arrays()
        flags = {key: np.zeros(decoded.steps, bool) for key in FLAGS}
        flags["is_first"][0] = flags["is_last"][-1] = True
        flags["is_terminal"][-1] = decoded.facts.terminal
        arrays |= flags
        self._torn = True
        for t in range(decoded.steps):
            self.store.append(0, {key: array[t] for key, array in arrays.items()})
        self._torn = False
        return row

    def _commit(self) -> None:
        if self.store is not None:
            self.store.flush(durable=True)
            self.index.position = self.store.position()
        self.index.write(self.folder)
        self._committed = time.monotonic()


def _must_be_whole(item: Item, entry: Mapping[str, Any]) -> None:
    if "broken" in entry:
        raise UserError(
            f"{item.label} {entry['broken']}; mend or remove it, or leave such recordings out "
            "(errors=skip)"
        )


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
