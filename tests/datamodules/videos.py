"""Tiny videos for tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

CODECS = {
    ".mp4": ("libx264rgb", "rgb24", {"crf": "0"}),
    ".mov": ("libx264", "yuv420p", {}),
    ".mkv": ("ffv1", "bgr0", {}),
    ".webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime"}),
    ".avi": ("mpeg4", "yuv420p", {}),
}
EXACT = (".mp4", ".mkv")


def picture(count: int, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth moving frames, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, 3)
    t, y, x = np.mgrid[:count, :height, :width].astype(float)
    waves = [np.sin(x / 5 + t / 3 + phase[0]), np.sin(y / 4 - t / 2 + phase[1])]
    waves.append(np.sin((x + y) / 7 + t + phase[2]))
    return (128 + 110 * np.stack(waves, -1)).astype(np.uint8)


def video(
    path: Path,
    frames: np.ndarray,
    fps: int = 10,
    codec: str | None = None,
    pixels: str | None = None,
    times: Sequence[int] | None = None,
    given: str = "rgb24",
) -> Path:
    """Writes frames; `times` in 1/fps s make an uneven rate."""
    name, default, options = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or name, rate=fps, options={} if codec else options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels or default
        for i, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), given)
            image.pts = times[i] if times else i
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def gif(path: Path, frames: np.ndarray) -> Path:
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)
    return path


def images(folder: Path, frames: np.ndarray, name: str = "frame_{}.png") -> Path:
    """A folder of numbered images."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def sideways(path: Path) -> Path:
    """Says in an MP4 file that players must turn it clockwise by 90 degrees."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44
    raw[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)
    return path


def audio(path: Path) -> Path:
    """An MP4 file with sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for i in range(3):
            silence = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, "fltp", "mono")
            frame.rate, frame.pts = 8000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
