"""One episode of a LeRobot data set, out of its Parquet and MP4 files.

Imports neither torch nor gymnasium, so that the processes that decode begin quickly.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.sources.decoding import Facts, Piece
from datamodules.sources.video_files import DAMAGE, BrokenVideo, Frames, fit, image_array, reason

ACTION, REWARD, DONE, TRUNCATED = "action", "next.reward", "next.done", "next.truncated"
EPISODE, FRAME = "episode_index", "frame_index"


@dataclass(frozen=True)
class Camera:
    """Where a camera saw an episode: from `start` seconds of a video file."""

    path: Path
    start: float


@dataclass(frozen=True)
class LeRobotJob:
    """Decodes one episode.

    Attributes:
        data: the Parquet file with its rows.
        episode: its number there.
        length: frames that it should have.
        fps: frames per second.
        columns: those of the file that matter.
        cameras: {observation key: where}.
        images: {observation key: column} of images within the file.
        vectors: {observation key: (column, shape)}.
        action: shape and dtype of the actions; None if there are none.
        size: side in pixels to which images are resized.
        crop: cut images to their central square before.
    """

    data: Path
    episode: int
    length: int
    fps: float
    columns: tuple[str, ...]
    cameras: dict[str, Camera]
    images: dict[str, str]
    vectors: dict[str, tuple[str, tuple[int, ...]]]
    action: tuple[tuple[int, ...], str] | None
    size: int | None
    crop: bool

    def decode(self, append: Callable[[Piece], None]) -> Facts:
        """Hands over its steps; the action at the last one led nowhere, and is zeros."""
        table = self._rows()
        if len(table) != self.length:
            raise BrokenVideo(
                f"has {len(table)} rows in '{self.data}', but the metadata say {self.length}"
            )
        arrays = self._arrays(table)
        for key, values in arrays.items():
            rows = np.flatnonzero(~np.isfinite(values.reshape(self.length, -1)).all(1))
            if len(rows):
                raise BrokenVideo(f"has NaN or infinity in '{key}' at frame {rows[0]}")
        pictures = {f"obs/{key}": self._camera(camera) for key, camera in self.cameras.items()}
        pictures |= {f"obs/{key}": self._column(table[c]) for key, c in self.images.items()}
        if not pictures:
            append(arrays)
        for t, images in enumerate(zip(*pictures.values(), strict=True) if pictures else []):
            row = {key: array[t : t + 1] for key, array in arrays.items()}
            append({**dict(zip(pictures, images, strict=True)), **row})
        # Some mark the last action as the end, others what came of it.
        ends = {c: c in self.columns and numbers(table[c])[-2:].any() for c in (DONE, TRUNCATED)}
        return Facts(self.fps, True, bool(ends[DONE] and not ends[TRUNCATED]))

    def _arrays(self, table: Any) -> dict[str, np.ndarray]:
        """All but the images, as time steps."""
        arrays: dict[str, np.ndarray] = {}
        with _as_described(self.data):
            for key, (column, shape) in self.vectors.items():
                values = numbers(table[column]).reshape(self.length, *shape)
                arrays[f"obs/{key}"] = values.astype(np.float32)
            if self.action is not None:
                shape, dtype = self.action
                arrays["action"] = numbers(table[ACTION]).reshape(self.length, *shape).astype(dtype)
                arrays["action"][-1] = 0
                arrays["reward"] = np.zeros(self.length, np.float32)
                if REWARD in self.columns:
                    rewards = numbers(table[REWARD])
                    arrays["reward"][1:] = rewards[:-1]
                    if self.length > 1:  # what the last action earned belongs to the one before
                        arrays["reward"][-1] += rewards[-1]
        return arrays

    def _rows(self) -> Any:
        """The rows of the episode in their order, an arrow table."""
        import pyarrow.parquet

        try:
            found = pyarrow.parquet.read_table(
                self.data,
                columns=[EPISODE, FRAME, *self.columns],
                filters=[(EPISODE, "==", self.episode)],
            )
            return found.sort_by(FRAME)
        except DAMAGE as error:
            raise BrokenVideo(
                f"cannot be read: '{self.data}' is missing, cut off or damaged ({reason(error)})"
            ) from error

    def _camera(self, camera: Camera) -> Iterator[np.ndarray]:
        try:
            for image in Frames(camera.path, camera.start, self.length):
                yield fit(image, self.size, self.crop)[None]
        except BrokenVideo as error:
            raise BrokenVideo(f"cannot be read: '{camera.path}' {error}") from error

    def _column(self, images: Any) -> Iterator[np.ndarray]:
        for image in images.to_pylist():
            with _as_described(self.data), Image.open(io.BytesIO(image["bytes"])) as opened:
                found = fit(image_array(opened), self.size, self.crop)
            yield found[None]


def numbers(column: Any) -> np.ndarray:
    """The numbers of an arrow column, lists of them one after the other."""
    values = column.combine_chunks()
    while hasattr(values, "flatten") and values.type.num_fields:
        values = values.flatten()
    return np.array(values.to_numpy(zero_copy_only=False))


@contextmanager
def _as_described(path: Path) -> Iterator[None]:
    """Turns what unexpected values raise into a sentence."""
    try:
        yield
    except DAMAGE as error:
        raise BrokenVideo(
            f"cannot be read: the values in '{path}' are not what the metadata say "
            f"({reason(error)})"
        ) from error
