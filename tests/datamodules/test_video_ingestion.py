"""Videos are decoded once into a store, which goes on, waits and is repaired."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from video_folders import check, five, opened, refused, text
from videos import images, picture, video

from datamodules.sources import decoding, ingesting
from datamodules.sources.ingesting import INDEX, Index
from datamodules.sources.opening import kind_of, open_source
from datamodules.sources.source import said
from datamodules.sources.video import open_videos
from datamodules.store import EpisodeStore

pytestmark = pytest.mark.usefixtures("cache")


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
