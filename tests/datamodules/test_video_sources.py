"""Videos come in as frames, once, or are refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from video_folders import cut, empty, frames_of, memory_of, opened, refused, text
from videos import EXACT, audio, gif, images, picture, sideways, video

from datamodules.envs.wrappers import area_resize
from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.inspection import describe
from datamodules.sources.ingesting import INDEX
from datamodules.sources.opening import kind_of, open_source
from datamodules.sources.source import said, step_fields, steps
from datamodules.sources.video import open_videos
from datamodules.sources.video_files import BrokenVideo, Frames, fit
from datamodules.sources.writing import write
from datamodules.spec import Spec

pytestmark = pytest.mark.usefixtures("cache")


class TestReading:
    @pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif"])
    def test_every_kind_of_file(self, ending: str, tmp_path: Path) -> None:
        shown = picture(9)
        path = tmp_path / f"a{ending}"
        gif(path, shown) if ending == ".gif" else video(path, shown)
        source = open_source(tmp_path)
        assert kind_of(source) == "video"
        assert source.spec == Spec({"image": source.spec.obs["image"]})
        assert source.spec.obs["image"].shape == (24, 32, 3)
        assert source.lengths.tolist() == [8]
        assert source.fps is not None and source.fps.tolist() == [10]
        found = frames_of(source, 0)
        if ending in EXACT:
            assert np.array_equal(found, shown)
        else:
            assert np.abs(found.astype(int) - shown).mean() < 12
        assert said(source) == []

    def test_time_steps_have_neither_actions_nor_rewards(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mp4", picture(5))
        video(tmp_path / "b.mp4", picture(3, seed=1))
        source = open_source(tmp_path)
        expected = {"obs/image", "is_first", "is_last", "is_terminal"}
        assert step_fields(source.spec).keys() == expected
        episode = steps(source, 0)
        assert episode.keys() == expected
        assert episode["is_first"].tolist() == [True] + [False] * 4
        assert episode["is_last"].tolist() == [False] * 4 + [True]
        assert not episode["is_terminal"].any()
        assert Episodes.load(source).lengths.tolist() == [4, 2]

    def test_one_file(self, tmp_path: Path) -> None:
        path = video(tmp_path / "a.mp4", picture(5))
        video(tmp_path / "b.mp4", picture(3))
        assert open_source(path).lengths.tolist() == [4]

    def test_order_is_by_the_numbers_in_names_at_any_depth(self, tmp_path: Path) -> None:
        for n, name in enumerate(["ep10.mp4", "ep9.mp4", "b/ep1.mp4", "b/c/ep2.mp4"]):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            video(path, picture(n + 2))
        images(tmp_path / "a", picture(7))
        (tmp_path / "b" / "._ep1.mp4").write_bytes(b"of a Macintosh")
        (tmp_path / "b" / "up").symlink_to(tmp_path)
        source = open_source(tmp_path)
        names = [source.where(i).strip("'") for i in range(5)]
        expected = ["a", "b/c/ep2.mp4", "b/ep1.mp4", "ep9.mp4", "ep10.mp4"]
        assert names == [str(tmp_path / name) for name in expected]
        assert source.lengths.tolist() == [6, 4, 3, 2, 1]
        assert source.fps is not None and np.isnan(source.fps).tolist() == [True] + [False] * 4

    @pytest.mark.parametrize("shape", [(33, 65), (1, 1), (17, 2)])
    def test_odd_sizes(self, shape: tuple[int, int], tmp_path: Path) -> None:
        shown = picture(4, *shape)
        write(memory_of(shown), tmp_path / "a", "video", lossless=True)
        assert np.array_equal(frames_of(open_source(tmp_path / "a"), 0), shown)

    def test_grey_becomes_rgb(self, tmp_path: Path) -> None:
        shown = picture(4)[..., 0]
        video(tmp_path / "a.mkv", shown, codec="ffv1", pixels="gray", given="gray")
        found = frames_of(open_source(tmp_path), 0)
        assert np.array_equal(found, np.repeat(shown[..., None], 3, -1))

    def test_transparent_parts_become_black(self, tmp_path: Path) -> None:
        shown = np.concatenate([picture(3), np.full((3, 24, 32, 1), 255, np.uint8)], -1)
        shown[:, :, :16, 3] = 0
        shown[:, :12, 16:, 3] = 128
        video(tmp_path / "a.mkv", shown, codec="ffv1", pixels="bgra", given="rgba")
        images(tmp_path / "b", shown)
        source = open_source(tmp_path)
        expected = np.rint(shown[..., :3] * (shown[..., 3:] / 255.0)).astype(np.uint8)
        for episode in range(2):
            assert np.array_equal(frames_of(source, episode), expected)

    def test_images_of_other_modes(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        folder.mkdir()
        grey = picture(4)[..., 0]
        Image.fromarray(grey[0]).save(folder / "0.png")
        Image.fromarray(grey[1].astype(np.uint16) << 8).save(folder / "1.png")
        Image.fromarray(grey[2]).convert("P").save(folder / "2.png")
        Image.fromarray(np.repeat(grey[3][..., None], 3, -1)).save(folder / "3.JPG", quality=100)
        found = frames_of(open_source(folder), 0).astype(int)
        assert np.abs(found - grey[..., None]).max() <= 2

    def test_a_phone_held_sideways(self, tmp_path: Path) -> None:
        shown = picture(4)
        sideways(video(tmp_path / "a.mp4", shown))
        assert np.array_equal(frames_of(open_source(tmp_path), 0), np.rot90(shown, -1, (1, 2)))

    def test_an_uneven_frame_rate_is_said(self, tmp_path: Path) -> None:
        shown = picture(6)
        video(tmp_path / "a.mkv", shown, times=[0, 1, 2, 12, 13, 20])
        video(tmp_path / "b.mkv", picture(6))
        source = open_source(tmp_path)
        assert np.array_equal(frames_of(source, 0), shown)
        assert source.fps is not None and source.fps.tolist() == [pytest.approx(2.5, 0.01), 10]
        (note,) = said(source)
        assert "1 of 2 recordings have no constant frame rate" in note
        assert "a.mkv" in note

    def test_numbers_are_sorted_as_numbers(self, tmp_path: Path) -> None:
        shown = picture(12)
        images(tmp_path / "a", shown, "f{}.png")
        assert np.array_equal(frames_of(open_source(tmp_path), 0), shown)

    def test_images_without_a_number_are_counted(self, tmp_path: Path) -> None:
        images(tmp_path / "a", picture(3))
        Image.fromarray(picture(1)[0]).save(tmp_path / "cover.png")
        Image.fromarray(picture(1)[0]).save(tmp_path / "a" / "cover.png")
        source = open_source(tmp_path)
        assert source.lengths.tolist() == [2]
        assert "2 images without a number" in said(source)[0]

    @pytest.mark.parametrize(("height", "width"), [(24, 32), (33, 20), (8, 8)])
    @pytest.mark.parametrize("crop", [False, True])
    def test_size_and_crop(self, height: int, width: int, crop: bool, tmp_path: Path) -> None:
        shown = picture(3, height, width)
        video(tmp_path / "a.mkv", shown)
        found = frames_of(open_source(tmp_path, size=12, crop=crop), 0)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        cut = shown[:, top : top + side, left : left + side] if crop else shown
        expected = np.stack([area_resize(np.ascontiguousarray(image), 12) for image in cut])
        assert np.array_equal(found, expected)

    def test_large_frames_become_small_ones(self) -> None:
        (shown,) = picture(1, 270, 480)
        expected = area_resize(shown, 16)
        difference = np.abs(fit(shown, 16, False).astype(int) - expected)
        assert 0 < difference.max() <= 8, "blocks are averaged first"
        assert difference.mean() < 2

    def test_crop_alone(self, tmp_path: Path) -> None:
        shown = picture(3, 24, 32)
        video(tmp_path / "a.mkv", shown)
        assert np.array_equal(frames_of(open_source(tmp_path, crop=True), 0), shown[:, :, 4:28])

    def test_joined_with_other_video(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mkv", picture(3))
        video(tmp_path / "b.mkv", picture(5))
        write(open_source(tmp_path / "b.mkv"), tmp_path / "store", "store")
        where = [tmp_path / "a.mkv", tmp_path / "store"]
        source = open_source(where, ingest=tmp_path / "ingested")
        assert source.lengths.tolist() == [2, 4]
        assert source.fps is not None and source.fps.tolist() == [10, 10]
        assert (tmp_path / "ingested" / "0-a.mkv" / INDEX).exists()

    def test_what_is_no_video_is_refused(self, tmp_path: Path) -> None:
        assert "holds no recorded data" in refused(tmp_path)
        with pytest.raises(UserError, match="holds no videos"):
            open_videos(tmp_path)
        video(tmp_path / "a.mkv", picture(3))
        with pytest.raises(UserError, match="no observation"):
            open_source(tmp_path, only=["depth"])

    def test_a_run_is_not_a_folder_of_videos(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "videos").mkdir()
        gif(tmp_path / "videos" / "dream-100.gif", picture(3))
        assert "holds no recorded data" in refused(tmp_path)


class TestBroken:
    @pytest.mark.parametrize(
        ("name", "make", "message"),
        [
            ("b.mp4", text, "something else than its ending says"),
            ("b.mp4", empty, "is empty (0 bytes)"),
            ("b.mp4", cut, "cut off"),
            ("b.mkv", cut, "is cut off: it ends at"),
            ("b.avi", cut, "cut off"),
            ("b.mp4", audio, "holds no video"),
            ("b.gif", text, "something else"),
            ("b.mp4", lambda path: path.symlink_to("nowhere"), "No such file"),
        ],
    )
    def test_it_is_named_and_counted(self, name: str, make, message: str, tmp_path: Path) -> None:
        for n in (1, 3):
            video(tmp_path / f"{'abc'[n - 1]}.mkv", picture(n + 2))
        make(tmp_path / name)
        line = refused(tmp_path)
        assert f"'{tmp_path / name}'" in line
        assert message in line
        assert "errors=skip" in line
        source = opened(tmp_path, errors="skip")
        assert source.lengths.tolist() == [2, 4]
        (note,) = said(source)
        assert f"1 of 3 recordings cannot be read and are left out: '{tmp_path / name}'" in note
        (problem,) = describe(source)["problems"]
        assert message in problem

    def test_nothing_but_broken_files(self, tmp_path: Path) -> None:
        text(tmp_path / "a.mp4")
        empty(tmp_path / "b.mp4")
        line = refused(tmp_path, errors="skip")
        assert "none of the 2 recordings" in line
        assert "a.mp4" in line

    def test_one_frame_is_no_video(self, tmp_path: Path) -> None:
        gif(tmp_path / "one.gif", picture(1))
        assert "all have one frame only" in refused(tmp_path)
        gif(tmp_path / "two.gif", picture(2))
        source = open_source(tmp_path)
        assert source.lengths.tolist() == [1]
        assert "one.gif" in said(source)[0]

    def test_unequal_sizes_need_a_size(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mkv", picture(3, 24, 32))
        video(tmp_path / "b.mkv", picture(3, 24, 30))
        line = refused(tmp_path)
        assert "b.mkv' has 30x24 pixels" in line
        assert "32x24 pixels: a size for all" in line
        assert opened(tmp_path, errors="skip").num_episodes == 1
        assert opened(tmp_path, size=8).num_episodes == 2

    def test_unequal_sizes_within_a_folder(self, tmp_path: Path) -> None:
        folder = images(tmp_path / "a", picture(2, 24, 32))
        Image.fromarray(picture(1, 20, 20)[0]).save(folder / "frame_2.png")
        assert "changes at frame 2 from 32x24 pixels to 20x20 pixels" in refused(tmp_path)
        assert opened(tmp_path, size=8).lengths.tolist() == [2]

    def test_folders_that_are_not_one_row_of_frames(self, tmp_path: Path) -> None:
        images(tmp_path / "a", picture(2), "left_{}.png")
        Image.fromarray(picture(1)[0]).save(tmp_path / "a" / "right_0.png")
        assert "several names ('left_' and 'right_')" in refused(tmp_path)
        images(tmp_path / "b", picture(2), "{}.png")
        Image.fromarray(picture(1)[0]).save(tmp_path / "b" / "001.jpg")
        assert "the number 1 twice ('001.jpg' and '1.png')" in refused(tmp_path / "b")

    def test_a_damaged_image_is_named(self, tmp_path: Path) -> None:
        folder = images(tmp_path / "a", picture(3))
        raw = (folder / "frame_1.png").read_bytes()
        (folder / "frame_1.png").write_bytes(raw[: len(raw) // 2])
        assert "holds 'frame_1.png', which is damaged" in refused(tmp_path)

    @pytest.mark.parametrize("ending", [".mp4", ".mkv", ".avi", ".gif"])
    @settings(
        max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_cut_off_anywhere(self, ending: str, data: st.DataObject, tmp_path: Path) -> None:
        shown = picture(7, 16, 16)
        whole = tmp_path / f"whole{ending}"
        if not whole.exists():
            gif(whole, shown) if ending == ".gif" else video(whole, shown)
        raw = whole.read_bytes()
        part = tmp_path / f"part{ending}"
        part.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        with contextlib.suppress(BrokenVideo):
            found = list(Frames(part))
            assert len(found) >= len(shown) - 2, "an end that is missing is noticed"

    @pytest.mark.parametrize("ending", [".mp4", ".mkv", ".webm", ".gif"])
    @settings(
        max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_flipped_bytes(self, ending: str, data: st.DataObject, tmp_path: Path) -> None:
        whole = tmp_path / f"whole{ending}"
        if not whole.exists():
            shown = picture(7, 16, 16)
            gif(whole, shown) if ending == ".gif" else video(whole, shown)
        raw = bytearray(whole.read_bytes())
        flips = st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255))
        for at, by in data.draw(st.lists(flips, min_size=1, max_size=8)):
            raw[at] ^= by
        part = tmp_path / f"part{ending}"
        part.write_bytes(raw)
        with contextlib.suppress(BrokenVideo):
            for image in Frames(part):
                assert image.dtype == np.uint8
                assert image.ndim == 3
