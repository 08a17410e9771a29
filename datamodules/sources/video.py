"""Videos as recorded data: each file, or each folder of numbered images, is an episode."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datamodules.errors import UserError
from datamodules.sources.decoding import VideoJob
from datamodules.sources.ingested import IngestedSource
from datamodules.sources.ingesting import Errors, Item, default_folder, ingest
from datamodules.sources.video_files import IMAGES, VIDEOS, find_videos, mark_of

KIND = "video"


def open_videos(
    path: Path,
    only: Sequence[str] | None = None,
    size: int | None = None,
    *,
    crop: bool = False,
    ingest_into: str | os.PathLike[str] | None = None,
    errors: Errors = "stop",
    workers: int | None = None,
) -> IngestedSource:
    """Opens a video file, or all videos below a folder; what is new is ingested first.

    A video has the observation `image`, uint8 (H, W, 3), and neither actions nor rewards.

    Args:
        path: the file or folder.
        only: must be `image`, if anything.
        size: side in pixels to which frames are resized; without it all must have the same size.
        crop: cut frames to their central square before.
        ingest_into: folder of the store; by default one below the user's cache folder.
        errors: "stop" at the first video that cannot be read, or "skip" and count them.
        workers: processes that decode; by default one for each core.

    Raises:
        UserError: no video there, one that cannot be read, or none that can.
    """
    found, unnumbered = find_videos(path)
    if not found:
        raise UserError(no_videos(path))
    items = []
    for file in found:
        name = file.relative_to(path).as_posix() if file != path else file.name
        mark, size_on_disk = mark_of(file)
        items.append(Item(name, f"'{file}'", mark, size_on_disk, VideoJob(file, size, crop)))
    settings = {"kind": KIND, "size": size, "crop": crop}
    folder = Path(ingest_into) if ingest_into is not None else default_folder(path, settings)
    left = f"{unnumbered} images without a number at the end of their name are left out"
    about = {"kind": KIND, "notes": [left] if unnumbered else []}
    ingest(items, folder, str(path), settings, about, errors, workers)
    return IngestedSource(folder, str(path), items, only)


def no_videos(path: Path) -> str:
    """A sentence for a folder without any."""
    return (
        f"'{path}' holds no videos: neither files that end in {', '.join(VIDEOS)}, nor folders of "
        f"numbered images ({', '.join(IMAGES)})"
    )
