"""Videos come in as frames, once, or are refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from recordings import IMAGES, memory
from videos import EXACT, audio, gif, images, picture, sideways, video

from datamodules.envs.wrappers import area_resize
from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.inspection import describe, preview
from datamodules.sources import decoding, ingesting
from datamodules.sources.ingested import IngestedSource
from datamodules.sources.ingesting import INDEX, Index
from datamodules.sources.opening import kind_of, open_source
from datamodules.sources.source import Source, said, step_fields, steps
from datamodules.sources.video import open_videos
from datamodules.sources.video_files import BrokenVideo, Frames, find_videos, fit
from datamodules.sources.writing import left_out, write
from datamodules.spec import Spec
from datamodules.store import EpisodeStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is left in the user's cache folder."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five videos."""
    path = tmp_path / "videos"
    path.mkdir()
    for n in range(5):
        video(path / f"{n}.mkv", picture(n + 2, seed=n))
    return path


def check(source: Source, expected: dict[str, np.ndarray]) -> None:
    assert source.num_episodes == len(expected)
    for episode, (name, shown) in enumerate(expected.items()):
        assert name in source.where(episode)
        assert np.array_equal(frames_of(source, episode), shown)


def five() -> dict[str, np.ndarray]:
    return {f"{n}.mkv": picture(n + 2, seed=n) for n in range(5)}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded, in this process."""
    names: list[str] = []
    decode = decoding.VideoJob.decode

    def noted(job, append):
        names.append(job.path.name)
        return decode(job, append)

    monkeypatch.setattr(decoding.VideoJob, "decode", noted)
    return names


class TestIngestion:
    def test_once(self, folder: Path, cache: Path, decoded: list[str], capsys) -> None:
        check(open_source(folder), five())
        assert decoded == list(five())
        (where,) = (cache / "world-model-zoo").iterdir()
        assert where.name.startswith("videos-")
        line = f"zoo: ingesting 5 of '{folder}' into '{where}'\n"
        assert capsys.readouterr().err == line
        check(open_source(folder), five())
        assert len(decoded) == 5
        assert capsys.readouterr().err == ""
        open_source(folder, size=8)
        assert len(decoded) == 10, "another size is another store"

    def test_what_changed_or_is_new_or_gone(self, folder: Path, decoded: list[str]) -> None:
        open_source(folder)
        decoded.clear()
        expected = five()
        expected["1.mkv"] = picture(8, seed=9)
        video(folder / "1.mkv", expected["1.mkv"])
        expected["5.mkv"] = picture(3, seed=5)
        video(folder / "5.mkv", expected["5.mkv"])
        os.utime(folder / "2.mkv")
        (folder / "3.mkv").unlink()
        del expected["3.mkv"]
        check(open_source(folder), expected)
        assert decoded == ["1.mkv", "2.mkv", "5.mkv"]
        check(open_source(folder), expected)
        assert len(decoded) == 3

    def test_an_image_of_a_folder_that_changed(self, tmp_path: Path, decoded: list[str]) -> None:
        where = images(tmp_path / "a", picture(3))
        open_source(tmp_path)
        open_source(tmp_path)
        assert decoded == ["a"]
        Image.fromarray(picture(1)[0]).save(where / "frame_3.png")
        assert open_source(tmp_path).lengths.tolist() == [3]
        assert decoded == ["a", "a"]

    def test_a_broken_one_is_remembered_until_it_changes(
        self, folder: Path, decoded: list[str]
    ) -> None:
        text(folder / "2.mkv")
        assert "2.mkv" in refused(folder)
        assert decoded == ["0.mkv", "1.mkv", "2.mkv"], "it stops there"
        assert "2.mkv" in refused(folder)
        assert len(decoded) == 3, "and says so at once the next time"
        assert opened(folder, errors="skip").num_episodes == 4
        assert "2.mkv" in refused(folder)
        video(folder / "2.mkv", picture(4, seed=2))
        check(open_source(folder), five())
        assert decoded == ["0.mkv", "1.mkv", "2.mkv", "3.mkv", "4.mkv", "2.mkv"]

    def test_processes_make_the_same_store(self, folder: Path, tmp_path: Path) -> None:
        text(folder / "2.mkv")
        one, two = tmp_path / "one", tmp_path / "two"
        here = open_videos(folder, ingest_into=one, errors="skip", workers=0)
        there = open_videos(folder, ingest_into=two, errors="skip", workers=2)
        assert here.broken == there.broken
        files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
        assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file

    def test_a_process_that_dies_is_a_broken_file(self, folder: Path, monkeypatch) -> None:
        give = decoding._Worker.give

        def deadly(worker, number, job, where):
            if number == 1:
                worker.process.kill()
                worker.process.wait()
            give(worker, number, job, where)

        monkeypatch.setattr(decoding._Worker, "give", deadly)
        source = open_videos(folder, errors="skip", workers=1)
        (broken,) = source.broken
        assert (
            broken
            == f"'{folder / '1.mkv'}' cannot be read: its worker process was killed by "
            + ("SIGKILL")
        )
        expected = five()
        del expected["1.mkv"]
        check(source, expected)

    def test_killed_in_the_middle_it_goes_on(self, tmp_path: Path) -> None:
        videos, store = tmp_path / "videos", tmp_path / "store"
        videos.mkdir()
        expected = {f"{n}.mkv": picture(12, 48, 48, seed=n) for n in range(40)}
        for name, shown in expected.items():
            video(videos / name, shown)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from pathlib import Path\n"
            "from datamodules.sources import ingesting\n"
            "from datamodules.sources.video import open_videos\n"
            "ingesting.COMMIT_SECONDS = 0\n"
            f"open_videos(Path({str(videos)!r}), ingest_into={str(store)!r}, workers=2)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        deadline = time.monotonic() + 120
        while not (store / INDEX).exists() or not Index.read(store).recordings:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done = Index.read(store).recordings
        assert 0 < len(done) < 40, "it was in the middle"
        source = open_videos(videos, ingest_into=store, workers=0)
        check(source, expected)
        held = EpisodeStore.open(store, verify=True)
        assert held.num_steps == 40 * 12, "nothing twice, nothing lost"
        assert Index.read(store).recordings.items() >= done.items()
        assert not (store / "decoded").exists()

    def test_rows_that_the_index_does_not_know_are_forgotten(
        self, folder: Path, tmp_path: Path
    ) -> None:
        where = tmp_path / "store"
        open_source(folder, ingest=where)
        index = (where / INDEX).read_bytes()
        video(folder / "5.mkv", picture(7, seed=5))
        open_source(folder, ingest=where)
        (where / INDEX).write_bytes(index)  # as if killed between the two
        check(open_source(folder, ingest=where), {**five(), "5.mkv": picture(7, seed=5)})
        assert EpisodeStore.open(where).num_steps == 2 + 3 + 4 + 5 + 6 + 7

    def test_killed_before_the_store_was_begun(self, folder: Path, tmp_path: Path) -> None:
        where = tmp_path / "store"
        open_source(folder, ingest=where)
        settings = Index.read(where).settings
        Index(settings).write(where)
        (where / "decoded").mkdir()
        check(open_source(folder, ingest=where), five())
        assert EpisodeStore.open(where).num_steps == 2 + 3 + 4 + 5 + 6

    def test_an_interruption_keeps_what_was_done(
        self, folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(progress: object, what: str, done: int, wanted: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ingesting.Progress, "show", interrupt)
            with pytest.raises(KeyboardInterrupt):
                open_source(folder)
        check(open_source(folder), five())
        assert sorted(decoded) == list(five())

    @pytest.mark.parametrize("calls", [1, 7, 19])
    def test_an_interruption_within_an_episode(
        self, calls: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        append, where, left = EpisodeStore.append, tmp_path / "store", [calls]

        def interrupt(store: EpisodeStore, stream: int, step: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            append(store, stream, step)

        with monkeypatch.context() as patch:
            patch.setattr(EpisodeStore, "append", interrupt)
            with pytest.raises(KeyboardInterrupt):
                open_source(folder, ingest=where)
        check(open_source(folder, ingest=where), five())
        assert EpisodeStore.open(where).num_steps == 2 + 3 + 4 + 5 + 6

    def test_the_folder_is_a_source_by_itself(self, folder: Path, tmp_path: Path) -> None:
        text(folder / "9.mkv")
        open_source(folder, ingest=tmp_path / "store", errors="skip")
        shutil.rmtree(folder)
        source = open_source(tmp_path / "store")
        assert kind_of(source) == "video"
        check(source, five())
        assert source.fps is not None and source.fps.tolist() == [10] * 5
        assert "9.mkv" in said(source)[0]

    def test_other_settings_need_another_folder(self, folder: Path, tmp_path: Path) -> None:
        open_source(folder, size=8, ingest=tmp_path / "store")
        line = refused(folder, size=9, ingest=tmp_path / "store")
        assert "was ingested with crop=False, format=2, kind=video, size=8, not with" in line
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("valuable")
        assert "holds something else" in refused(folder, ingest=tmp_path / "mine")
        assert "neither 'stop' nor 'skip'" in refused(folder, errors="ignore")

    def test_a_disk_that_is_too_small_is_noticed_early(
        self, folder: Path, decoded: list[str], monkeypatch
    ) -> None:
        for n in range(5, 30):
            video(folder / f"{n}.mkv", picture(3))
        usage = shutil.disk_usage(folder)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        line = refused(folder)
        assert "GB more, and the disk of" in line
        assert "size=" in line
        assert len(decoded) == ingesting.SAMPLE

    def test_a_full_disk_is_no_broken_file(self, folder: Path, monkeypatch) -> None:
        def full(spool, piece):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(decoding._Spool, "append", full)
            assert "No space left on device" in refused(folder, errors="skip")
        check(open_source(folder), five())

    def test_whoever_comes_second_waits(self, folder: Path, tmp_path: Path, capfd) -> None:
        where = tmp_path / "store"
        where.mkdir()
        program = (
            "import sys, time; from pathlib import Path; from datamodules.files import alone_in\n"
            "with alone_in(Path(sys.argv[1])):\n"
            "    print('locked', flush=True)\n"
            "    time.sleep(0.5)\n"
        )
        arguments = [sys.executable, "-c", program, str(where)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "locked\n"
            check(open_source(folder, ingest=where), five())
        assert "waiting for another process" in capfd.readouterr().err


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
