"""Files that survive a crash: checked and replaced atomically, or written at an offset; and locks.

Every error of writing is one sentence that says which file and what to do.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from datamodules.errors import UserError


class StoreCorrupted(UserError):
    """A store file is damaged; the sentence names the file, the place and the mend."""


def write_json(path: Path, data: dict[str, Any], durable: bool = False) -> None:
    """Replaces a small file atomically; `read_json` notices any later change of its bytes."""
    temporary = path.with_suffix(".tmp")
    write_at(temporary, [(0, _with_checksum(data))], create=True, durable=durable)
    with naming(path):
        os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        StoreCorrupted: the file is missing or a byte of it changed.
    """
    try:
        raw = path.read_bytes()
        data = json.loads(raw)["data"]
        if _with_checksum(data) == raw:
            return data
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        pass
    raise StoreCorrupted(
        f"{path} is damaged or missing: restore it from a backup, or delete {path.parent} and "
        "collect again"
    )


def write_at(
    path: Path,
    pieces: Iterable[tuple[int, Any]],
    *,
    create: bool = False,
    size: int | None = None,
    durable: bool = False,
) -> None:
    """Writes buffers at byte offsets of a file.

    Args:
        path: the file.
        pieces: pairs of an offset and a contiguous buffer.
        create: start with a new empty file; otherwise the file must exist.
        size: grow or cut the file to this many bytes first.
        durable: return only when the disk has it.
    """
    flags = os.O_WRONLY | (os.O_CREAT | os.O_TRUNC if create else 0)
    with naming(path):
        descriptor = os.open(path, flags, 0o644)
        try:
            if size is not None:
                os.ftruncate(descriptor, size)
            for offset, buffer in pieces:
                rest = memoryview(buffer).cast("B")
                while rest:
                    written = os.pwrite(descriptor, rest, offset)
                    rest, offset = rest[written:], offset + written
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Returns when the disk has what was written to this file or folder."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an `OSError` of writing into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; nothing committed is lost and the rows since "
            "then are still in memory: free space or mend the folder, then try again"
        ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time into a block; the others say that they wait.

    A killed one lets the next in.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"zoo: waiting for another process to fill '{folder}'", file=sys.stderr)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class WriterLock:
    """Says that one object writes to a store.

    A POSIX record lock keeps out other processes and, unlike `flock`, is not inherited by forked
    environment workers, which may outlive a killed writer. It does not keep out its own process:
    the table does.
    """

    _held: ClassVar[weakref.WeakValueDictionary[Path, WriterLock]] = weakref.WeakValueDictionary()

    def __init__(self, descriptor: int) -> None:
        self._close = weakref.finalize(self, os.close, descriptor)
        self._keep = False

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._keep:
            self.release()

    def keep(self) -> WriterLock:
        """Stays locked after the `with` block."""
        self._keep = True
        return self

    @classmethod
    def acquire(cls, folder: Path) -> WriterLock:
        """Takes the lock of a folder, or raises a UserError."""
        folder = folder.resolve()
        if folder in cls._held:
            raise UserError(f"the store {folder} is already open for writing here: close it first")
        with naming(folder / "lock"):
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"the store {folder} is being written by another process: wait for it or end it, "
                "or open the store for reading only"
            ) from error
        lock = cls(descriptor)
        cls._held[folder] = lock
        return lock

    def release(self) -> None:
        """Lets another writer in."""
        self._close()
        for folder in [f for f, lock in self._held.items() if lock is self]:
            del self._held[folder]


def _with_checksum(data: dict[str, Any]) -> bytes:
    text = json.dumps(data)
    return f'{{"crc32": "{zlib.crc32(text.encode()):08x}", "data": {text}}}\n'.encode()
