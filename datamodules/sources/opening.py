"""`open_source`: recorded data by a path or an id, whatever it is."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from datamodules.errors import UserError
from datamodules.sources.hdf5 import Hdf5Source
from datamodules.sources.ingested import IngestedSource
from datamodules.sources.ingesting import INDEX, Errors
from datamodules.sources.lerobot import is_lerobot, open_lerobot
from datamodules.sources.minari import MAIN_FILE, METADATA, MinariSource, data_folder, minari_root
from datamodules.sources.source import Joined, Source
from datamodules.sources.stores import StoreSource, replay_stores
from datamodules.sources.video import open_videos
from datamodules.sources.video_files import VIDEOS, find_videos
from datamodules.store import EpisodeStore

HDF5 = (".hdf5", ".h5", ".hdf")


def open_source(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    only: Sequence[str] | None = None,
    size: int | None = None,
    *,
    crop: bool = False,
    ingest: str | os.PathLike[str] | None = None,
    errors: Errors = "stop",
) -> Source:
    """Opens recorded data.

    Videos and LeRobot data sets are slow to read: they are decoded once, into a store.

    Args:
        source: a Minari data set by its id or folder, an HDF5 file in the manner of D4RL, a store,
            a run directory or its replay, a video file, a folder of videos or of folders of
            numbered images, a LeRobot data set; or several of these, which are joined.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.
        crop: cut the frames of videos to their central square before.
        ingest: folder of the store for decoded videos; by default below the user's cache folder.
        errors: what to do about videos that cannot be read: "stop" at the first, or "skip" and
            count them.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    if not isinstance(source, str | os.PathLike):
        if not source:
            raise UserError("no source is named: name a file, a folder or a Minari data set")
        alone = len(source) == 1
        parts = []
        for i, part in enumerate(source):
            folder = ingest if ingest is None or alone else Path(ingest) / f"{i}-{Path(part).name}"
            parts.append(open_source(part, only, size, crop=crop, ingest=folder, errors=errors))
        return parts[0] if alone else Joined(parts)
    path = Path(source)
    if _is_video(path):
        return open_videos(path, only, size, crop=crop, ingest_into=ingest, errors=errors)
    if is_lerobot(path):
        return open_lerobot(path, only, size, crop=crop, ingest_into=ingest, errors=errors)
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
    """What a source is: "store", "minari", "hdf5", "video", "lerobot", or "joined"."""
    kinds = {StoreSource: "store", MinariSource: "minari", Hdf5Source: "hdf5"}
    if isinstance(source, Joined):
        inner = {kind_of(part) for part in source.parts}
        return inner.pop() if len(inner) == 1 else "joined"
    return source.kind if isinstance(source, IngestedSource) else kinds[type(source)]


def _is_video(path: Path) -> bool:
    """Whether this is a video, or a folder of nothing but videos or numbered images."""
    if path.is_file():
        return path.suffix.lower() in VIDEOS
    if not path.is_dir() or is_lerobot(path) or data_folder(path) is not None:
        return False
    # A run has videos of its own.
    ours = EpisodeStore.exists(path) or replay_stores(path) or (path / "checkpoints").exists()
    return not ours and bool(find_videos(path)[0])


def _file(path: Path, only: Sequence[str] | None, size: int | None) -> Source:
    if path.name in (MAIN_FILE, METADATA) and data_folder(path.parent) is not None:
        return MinariSource(path.parent, only, size)
    if path.suffix.lower() in HDF5:
        return Hdf5Source(path, only, size)
    raise UserError(
        f"'{path}' is not a file of recorded data: those end in {', '.join(HDF5 + VIDEOS)}; the "
        "others are folders"
    )


def _folder(path: Path, only: Sequence[str] | None, size: int | None) -> Source:
    if (path / INDEX).exists():
        return IngestedSource(path, str(path), None, only, size)
    if EpisodeStore.exists(path):
        return StoreSource(path, only, size)
    if data_folder(path) is not None:
        return MinariSource(path, only, size)
    stores = replay_stores(path)
    if stores:
        parts = [StoreSource(store, only, size) for store in stores]
        return parts[0] if len(parts) == 1 else Joined(parts)
    raise UserError(
        f"'{path}' holds no recorded data: neither a store, nor a Minari or LeRobot data set, nor "
        "a run with a replay, nor videos"
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
