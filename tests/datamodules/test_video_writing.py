"""Videos are written, and described."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from recordings import IMAGES, memory
from video_folders import check, five, frames_of, memory_of
from videos import picture, video

from datamodules.errors import UserError
from datamodules.inspection import describe, preview
from datamodules.sources.opening import kind_of, open_source
from datamodules.sources.video_files import find_videos
from datamodules.sources.writing import left_out, write

pytestmark = pytest.mark.usefixtures("cache")


class TestWriting:
    def test_there_and_back(self, folder: Path, tmp_path: Path) -> None:
        write(open_source(folder), tmp_path / "out", "video", lossless=True)
        names = [f"episode_{n:06d}.mp4" for n in range(5)]
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
        source = open_source(tmp_path / "out")
        check(source, dict(zip(names, five().values(), strict=True)))
        assert source.fps is not None and source.fps.tolist() == [10] * 5

    def test_lossy_is_close_and_small(self, tmp_path: Path) -> None:
        shown = picture(30, 64, 64)
        write(memory_of(shown), tmp_path / "a.mp4", "video")
        write(memory_of(shown), tmp_path / "b.mp4", "video", lossless=True)
        found = frames_of(open_source(tmp_path / "a.mp4"), 0)
        noise = np.square(found.astype(float) - shown).mean()
        assert 10 * np.log10(255**2 / noise) > 25
        assert (tmp_path / "a.mp4").stat().st_size < (tmp_path / "b.mp4").stat().st_size

    def test_gif(self, folder: Path, tmp_path: Path) -> None:
        write(open_source(folder), tmp_path / "out", "gif")
        source = open_source(tmp_path / "out")
        assert source.lengths.tolist() == [1, 2, 3, 4, 5]
        assert source.fps is not None and source.fps.tolist() == [10] * 5
        with pytest.raises(UserError, match="256 colours"):
            write(source, tmp_path / "other", "gif", lossless=True)

    def test_a_store_keeps_the_frame_rates(self, folder: Path, tmp_path: Path) -> None:
        video(folder / "3.mkv", picture(5, seed=3), fps=25)
        write(open_source(folder), tmp_path / "store", "store")
        source = open_source(tmp_path / "store")
        check(source, dict.fromkeys(["0", "1", "2", "3", "4"]) | _renumbered(five()))
        assert source.fps is not None and source.fps.tolist() == [10, 10, 10, 25, 10]
        assert kind_of(source) == "store"

    def test_one_file_holds_one_episode(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="has 5 episodes: name a folder"):
            write(open_source(folder), tmp_path / "a.mp4", "video")
        assert not (tmp_path / "a.mp4").exists()
        write(open_source(folder / "3.mkv"), tmp_path / "a.mp4", "video")
        assert open_source(tmp_path / "a.mp4").lengths.tolist() == [4]

    def test_what_has_no_place_is_said(self, tmp_path: Path) -> None:
        (line,) = left_out(memory(IMAGES), "video")
        assert "left out are the actions and rewards, 'pose'" in line
        assert left_out(memory(IMAGES), "lerobot") == []
        with pytest.raises(UserError, match="has no images"):
            write(memory(), tmp_path / "a", "video")

    @pytest.mark.parametrize("kind", ["hdf5", "minari"])
    def test_video_has_no_place_among_steps_of_agents(
        self, kind: str, folder: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match="is video without actions"):
            write(open_source(folder), tmp_path / "a", kind)

    def test_a_channel_or_two(self, tmp_path: Path) -> None:
        shown = picture(3)
        for channels in (1, 2):
            write(
                memory_of(shown[..., :channels]), tmp_path / f"{channels}", "video", lossless=True
            )
        grey = frames_of(open_source(tmp_path / "1"), 0)
        assert np.array_equal(grey, np.repeat(shown[..., :1], 3, -1))
        two = frames_of(open_source(tmp_path / "2"), 0)
        assert np.array_equal(two[..., :2], shown[..., :2])
        assert not two[..., 2].any()


def _renumbered(expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {str(n): shown for n, shown in enumerate(expected.values())}


class TestInspection:
    def test_a_description(self, folder: Path) -> None:
        about = describe(open_source(folder))
        assert about["kind"] == "video"
        assert about["images"] == {"image": [24, 32, 3]}
        assert about["fps"]["mean"] == 10
        assert about["episodes"] == 5
        assert about["length"]["max"] == 5
        assert about["return"] == {}
        assert about["histogram"]["counts"] == []
        assert about["checksums"] == "ok"
        assert about["original_bytes"] == sum(p.stat().st_size for p in folder.iterdir())
        json.dumps(about)

    def test_a_preview(self, folder: Path) -> None:
        shown = preview(open_source(folder), rows=2, columns=3)
        assert shown.shape == (2 * 24, 3 * 32, 3)
        assert np.array_equal(shown[:24, :32], picture(2)[0])

    def test_hidden_files_are_not_found(self, tmp_path: Path) -> None:
        (tmp_path / ".trash").mkdir()
        (tmp_path / ".trash" / "a.mp4").write_bytes(b"")
        (tmp_path / ".b.mp4").write_bytes(b"")
        assert find_videos(tmp_path) == ([], 0)
