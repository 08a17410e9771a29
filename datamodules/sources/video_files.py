"""Finds, reads and writes video files, and reads folders of numbered images.

Imports neither torch nor gymnasium, so that the processes that decode begin quickly.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image

from datamodules.errors import UserError
from datamodules.resizing import area_resize

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg")
NUMBERED = re.compile(r"(.*?)(\d+)")
# What PyAV and Pillow raise for damaged files.
DAMAGE = (
    *(av.FFmpegError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError),
    *(SyntaxError, RuntimeError, Image.DecompressionBombError),
)
GIF_END = b";"
# There is a process for each core; PyAV 17 began to convert each frame with threads of its own.
ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


class BrokenVideo(ValueError):
    """Why a file cannot be read: the part of a sentence that follows its name."""


class Frames:
    """The frames of a video file, or of a folder of numbered images, in order.

    Iterating gives each as uint8 (H, W, 3): grey becomes RGB, transparent parts become black, and
    what a phone recorded sideways stands upright.

    Args:
        path: the file or folder.
        start: seconds at which to begin; of files.
        count: how many frames to read; by default all, and then the file must be whole.

    Attributes:
        times: seconds of each frame read so far; empty for images.

    Raises:
        BrokenVideo: while iterating: empty, cut off, damaged, or no video at all.
    """

    def __init__(self, path: Path, start: float = 0.0, count: int | None = None) -> None:
        self.path, self._start, self._count = path, start, count
        self.times: list[float] = []
        self._rate: float | None = None

    @property
    def fps(self) -> float | None:
        """Frames per second: what the file says, or the mean where that is not true."""
        if len(self.times) < 2 or self.times[-1] <= self.times[0]:
            return self._rate
        mean = (len(self.times) - 1) / (self.times[-1] - self.times[0])
        # Times may be rounded to milliseconds.
        rounding = 1e-3 / (self.times[-1] - self.times[0])
        said = self._rate
        return said if said and abs(said / mean - 1) < 0.01 + rounding else mean

    @property
    def is_constant(self) -> bool:
        """Whether the frames are evenly spaced in time."""
        steps = np.diff(self.times)
        return not len(steps) or bool(steps.max() < 1.5 * np.median(steps) + 1e-3)

    def __iter__(self) -> Iterator[np.ndarray]:
        found = 0
        try:
            for frame in self._images() if self.path.is_dir() else self._video():
                yield frame
                found += 1
                if found == self._count:
                    return
        except BrokenVideo:
            raise
        except DAMAGE as error:
            where = f"beyond frame {found} " if found else ""
            raise BrokenVideo(
                f"cannot be read {where}({reason(error)}): it is cut off, damaged, or something "
                "else than its ending says"
            ) from error
        if self._count is not None:
            raise BrokenVideo(f"is cut off: {found} of {self._count} frames are there")
        if not found:
            raise BrokenVideo("holds no frame")

    def _images(self) -> Iterator[np.ndarray]:
        for file in numbered_images(self.path):
            try:
                with Image.open(file) as image:
                    yield image_array(image)
            except DAMAGE as error:
                what = f"holds '{file.name}', which is damaged ({reason(error)})"
                raise BrokenVideo(what) from error

    def _video(self) -> Iterator[np.ndarray]:
        if not self.path.stat().st_size:
            raise BrokenVideo("is empty (0 bytes)")
        with av.open(str(self.path)) as container:
            if not container.streams.video:
                raise BrokenVideo("holds no video, only other streams")
            stream = container.streams.video[0]
            stream.thread_count = 1
            converter = av.video.reformatter.VideoReformatter()
            rate = stream.average_rate or stream.guessed_rate
            self._rate = float(rate) if rate else None
            half = 0.5 / (self._rate or 30)  # of a frame
            if self._start:
                container.seek(int(self._start / stream.time_base), stream=stream)
            end = 0.0
            for frame in container.decode(stream):
                time = frame.time
                if time is not None:
                    if self._start and time < self._start - half:
                        continue
                    self.times.append(time)
                    end = time + (float((frame.duration or 0) * stream.time_base) or 2 * half)
                if frame.is_corrupt:
                    raise BrokenVideo(f"is damaged at frame {max(len(self.times) - 1, 0)}")
                yield _upright(frame, converter)
            self._must_be_whole(container, stream, end)

    def _must_be_whole(self, container: Any, stream: Any, end: float) -> None:
        """Some formats just end where they are cut off."""
        if self._count is not None:
            return
        length = _seconds(container, stream)
        missing = 0.0 if length is None or not self._rate else (length - end) * self._rate
        if missing > 2:
            raise BrokenVideo(f"is cut off: it ends at {end:.2f} of {length:.2f} seconds")
        if self.path.suffix.lower() == ".gif":
            with self.path.open("rb") as file:
                file.seek(max(-64, -self.path.stat().st_size), os.SEEK_END)
                if not file.read().rstrip(b"\0\r\n").endswith(GIF_END):
                    raise BrokenVideo(f"is cut off after {len(self.times)} frames")


def find_videos(path: Path) -> tuple[list[Path], int]:
    """Video files and folders of numbered images at or below a path, in the order of their names.

    Hidden files and folders are not looked at. Numbers in names count as numbers.

    Returns:
        What was found, and how many images are left out because they have no number.
    """
    if path.is_file():
        return [path], 0
    found: list[Path] = []
    seen: set[str] = set()
    unnumbered = 0
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        here, images = Path(folder), 0
        for name in names:
            stem, ending = os.path.splitext(name)
            if name.startswith("."):
                continue
            if ending.lower() in VIDEOS:
                found.append(here / name)
            elif ending.lower() in IMAGES:
                numbered = NUMBERED.fullmatch(stem) is not None
                images, unnumbered = images + numbered, unnumbered + (not numbered)
        if images:
            found.append(here)
    return sorted(found, key=lambda p: natural(str(p.relative_to(path)))), unnumbered


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts names by the numbers in them."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def numbered_images(folder: Path) -> list[Path]:
    """The images of a folder by their numbers.

    Raises:
        BrokenVideo: they are not one row of frames.
    """
    found: dict[int, Path] = {}
    prefixes = set()
    for file in sorted(folder.iterdir()):
        match = NUMBERED.fullmatch(file.stem)
        if match is None or file.suffix.lower() not in IMAGES or file.name.startswith("."):
            continue
        prefixes.add(match[1])
        number = int(match[2])
        if len(prefixes) > 1:
            names = " and ".join(repr(prefix) for prefix in sorted(prefixes))
            raise BrokenVideo(f"holds frames of several names ({names}): give each its own folder")
        if number in found:
            raise BrokenVideo(
                f"has the number {number} twice ('{found[number].name}' and '{file.name}')"
            )
        found[number] = file
    return [found[number] for number in sorted(found)]


def mark_of(path: Path) -> tuple[str, int]:
    """What changes when a file, or an image of a folder, does; and the bytes on disk."""
    if not path.exists():  # a link to nothing
        return "missing", 0
    if path.is_file():
        state = path.stat()
        return f"{state.st_size} {state.st_mtime_ns}", state.st_size
    images = [entry for entry in os.scandir(path) if entry.name.lower().endswith(IMAGES)]
    states = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in images)
    return f"{len(states)} {zlib.crc32(repr(states).encode())}", sum(size for _, size, _ in states)


def fit(image: np.ndarray, size: int | None, crop: bool) -> np.ndarray:
    """Cuts an image (H, W, 3) to its central square (`crop`), and averages it to `size` pixels."""
    height, width = image.shape[:2]
    if crop and height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    if size is None or image.shape[:2] == (size, size):
        return image
    # Large frames by blocks first, at least three to a side of a pixel: much faster.
    height, width = image.shape[:2]
    most = min(height, width) // (3 * size)
    blocks = max([b for b in range(2, most + 1) if height % b == width % b == 0], default=1)
    if blocks > 1:
        image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).reduce(blocks))
    return area_resize(np.ascontiguousarray(image), size)


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Images (..., H, W, C) to look at, (..., H, W, 3).

    One channel is grey, of two channels the blue is black, and of more the first three are shown.
    """
    channels = images.shape[-1]
    if channels == 1:
        return np.repeat(images, 3, -1)
    if channels == 2:
        return np.concatenate([images, np.zeros_like(images[..., :1])], -1)
    return images[..., :3]


class VideoWriter:
    """Writes an MP4 file (H.264).

    Args:
        path: the file.
        fps: frames per second.
        lossless: keep every bit: about 15 times larger, and not every player shows it.
        keyframe_every: frames from which decoding can begin; few make random access fast.
    """

    def __init__(
        self, path: Path, fps: float, lossless: bool = False, keyframe_every: int | None = None
    ) -> None:
        self._path, self._container = path, av.open(str(path), "w", format="mp4")
        self._fps = Fraction(fps).limit_denominator(1001)
        self._lossless, self._gop = lossless, keyframe_every
        self._converter = av.video.reformatter.VideoReformatter()
        self._stream: Any = None
        self.pixels = ""

    @property
    def size(self) -> int:
        """Bytes on the disk; the encoder holds some frames back."""
        return self._path.stat().st_size if self._path.exists() else 0

    def add(self, frames: np.ndarray) -> None:
        """Appends frames, uint8 (T, H, W, 3)."""
        if self._stream is None:
            self._begin(*frames.shape[1:3])
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            kind = self._stream.pix_fmt
            converted = self._converter.reformat(picture, format=kind, **ONE_THREAD)
            self._container.mux(self._stream.encode(converted))

    def close(self) -> None:
        """Writes what is still to be written."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def _begin(self, height: int, width: int) -> None:
        name = "libx264rgb" if self._lossless else "libx264"
        # Colours at half resolution are what every player shows; they need even sides.
        even = height % 2 == 0 and width % 2 == 0
        self.pixels = "gbrp" if self._lossless else "yuv420p" if even else "yuv444p"
        try:
            self._stream = self._container.add_stream(name, rate=self._fps)
        except ValueError as error:
            raise UserError(
                f"this FFmpeg has no encoder {name}: reinstall PyAV with `pip install av`"
            ) from error
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "rgb24" if self._lossless else self.pixels
        self._stream.options = {"crf": "0" if self._lossless else "18"}
        if self._gop is not None:
            self._stream.gop_size = self._gop


def write_gif(file: Path | BinaryIO, frames: np.ndarray, fps: float) -> None:
    """Writes frames uint8 (T, H, W, 3) as an endless GIF.

    It counts time in 1/100 s, and equal neighbours become one frame that is shown longer.
    """
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=max(round(100 / fps), 2) * 10,
        loop=0,
    )


def _upright(frame: Any, converter: Any) -> np.ndarray:
    """A decoded frame as an image."""
    clear = any(component.is_alpha for component in frame.format.components)
    kind = "rgba" if clear else "rgb24"
    image = converter.reformat(frame, format=kind, **ONE_THREAD).to_ndarray()
    image = _on_black(image) if clear else image
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.rot90(image, turns) if turns else image


def image_array(image: Image.Image) -> np.ndarray:
    """An image of any mode as uint8 (H, W, 3)."""
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
    if "A" in image.mode or "transparency" in image.info:
        return _on_black(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _on_black(image: np.ndarray) -> np.ndarray:
    """(H, W, 4) over a black background, (H, W, 3)."""
    colour, alpha = image[..., :3].astype(np.uint16), image[..., 3:].astype(np.uint16)
    return ((colour * alpha + 127) // 255).astype(np.uint8)


def _seconds(container: Any, stream: Any) -> float | None:
    """Where the video says that it ends."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration is not None:
        return start + float(stream.duration * stream.time_base)
    said = stream.metadata.get("DURATION")  # of Matroska, for each stream
    if said:
        hours, minutes, seconds = said.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if container.duration is None or len(container.streams) > 1:  # others may go on longer
        return None
    return container.duration / av.time_base


def reason(error: BaseException) -> str:
    """What an error says, in short."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]
