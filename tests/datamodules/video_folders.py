"""Folders of videos: opened, refused, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import picture, video

from datamodules.errors import UserError
from datamodules.sources.ingested import IngestedSource
from datamodules.sources.opening import open_source
from datamodules.sources.source import Source
from datamodules.spec import Spec


def frames_of(source: Source, episode: int) -> np.ndarray:
    return source.read(episode).obs["image"]


def opened(path: Path, **options: Any) -> IngestedSource:
    found = open_source(path, **options)
    assert isinstance(found, IngestedSource)
    return found


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path, **options)
    return str(caught.value)


def memory_of(frames: np.ndarray) -> Source:
    """One episode without actions."""
    from recordings import Memory

    from datamodules.sources.source import Recorded
    from datamodules.spec import ArraySpec

    spec = Spec({"image": ArraySpec(frames.shape[1:], "uint8")})
    found = Memory.__new__(Memory)
    Source.__init__(found)
    found.name, found.spec = "memory", spec
    found.episodes = [Recorded({"image": frames}, None, None, False)]
    found.lengths = np.array([len(frames) - 1])
    return found


def text(path: Path) -> None:
    path.write_text("this is not a video\n" * 50)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    raw = video(path, picture(20)).read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def check(source: Source, expected: dict[str, np.ndarray]) -> None:
    assert source.num_episodes == len(expected)
    for episode, (name, shown) in enumerate(expected.items()):
        assert name in source.where(episode)
        assert np.array_equal(frames_of(source, episode), shown)


def five() -> dict[str, np.ndarray]:
    return {f"{n}.mkv": picture(n + 2, seed=n) for n in range(5)}
