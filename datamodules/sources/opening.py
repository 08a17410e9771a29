"""`open_source`: recorded data by a path or an id, whatever it is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from datamodules.errors import UserError
from datamodules.sources.hdf5 import Hdf5Source
from datamodules.sources.minari import MAIN_FILE, METADATA, MinariSource, data_folder, minari_root
from datamodules.sources.source import Joined, Source
from datamodules.sources.stores import StoreSource, replay_stores
from datamodules.store import EpisodeStore

HDF5 = (".hdf5", ".h5", ".hdf")
VIDEO = (".mp4", ".gif", ".avi", ".mkv", ".webm", ".mov")
LATER = "which this version does not read yet: convert it to HDF5, Minari or a store elsewhere"


def open_source(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    only: Sequence[str] | None = None,
    size: int | None = None,
) -> Source:
    """Opens recorded data.

    Args:
        source: a Minari data set by its id or folder, an HDF5 file in the manner of D4RL, a store,
            a run directory or its replay; or several of these, which are joined.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if not isinstance(source, str | os.PathLike):
        if not source:
            raise UserError("no source is named: name a file, a folder or a Minari data set")
        parts = [open_source(part, only, size) for part in source]
        return parts[0] if len(parts) == 1 else Joined(parts)
    path = Path(source)
    if path.is_file():
        return _file(path, only, size)
    if path.is_dir():
        return _folder(path, only, size)
    local = minari_root() / path
    if data_folder(local) is not None:
        found = MinariSource(local, only, size)
        found.name = str(source)
        return found
    raise UserError(_nothing(str(source)))


def kind_of(source: Source) -> str:
    """What a source is: "store", "minari", "hdf5", or "joined"."""
    kinds = {StoreSource: "store", MinariSource: "minari", Hdf5Source: "hdf5"}
    if isinstance(source, Joined):
        inner = {kind_of(part) for part in source.parts}
        return inner.pop() if len(inner) == 1 else "joined"
    return kinds[type(source)]


def _file(path: Path, only: Sequence[str] | None, size: int | None) -> Source:
    if path.name in (MAIN_FILE, METADATA) and data_folder(path.parent) is not None:
        return MinariSource(path.parent, only, size)
    if path.suffix.lower() in HDF5:
        return Hdf5Source(path, only, size)
    if path.suffix.lower() in VIDEO:
        raise UserError(f"'{path}' is a video, {LATER}")
    raise UserError(
        f"'{path}' is not a file of recorded data: those end in {' or '.join(HDF5)}; the others "
        "are folders"
    )


def _folder(path: Path, only: Sequence[str] | None, size: int | None) -> Source:
    if EpisodeStore.exists(path):
        return StoreSource(path, only, size)
    if data_folder(path) is not None:
        return MinariSource(path, only, size)
    stores = replay_stores(path)
    if stores:
        parts = [StoreSource(store, only, size) for store in stores]
        return parts[0] if len(parts) == 1 else Joined(parts)
    if (path / "meta" / "info.json").is_file():
        raise UserError(f"'{path}' is a LeRobot data set, {LATER}")
    if any(file.suffix.lower() in VIDEO for file in path.iterdir()):
        raise UserError(f"'{path}' is a folder of videos, {LATER}")
    raise UserError(
        f"'{path}' holds no recorded data: neither a store, nor a Minari data set, nor a run with "
        "a replay"
    )


def _nothing(name: str) -> str:
    root = minari_root()
    there = [str(p.parents[1].relative_to(root)) for p in root.glob(f"**/data/{METADATA}")]
    near = difflib.get_close_matches(name, there, n=3)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return (
        f"there is no file or folder '{name}', and no Minari data set of that name in '{root}'"
        f"{hint}; `minari download {name}` fetches one that is published, and `zoo data collect` "
        "records one"
    )
