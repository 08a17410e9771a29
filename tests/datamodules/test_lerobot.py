"""LeRobot data sets: read as LeRobot writes them, and written so that they come back."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recordings import BOX, IMAGES, VECTORS, Memory, memory, recorded, steps_of
from videos import picture, video

from datamodules.errors import MissingExtra, UserError
from datamodules.sources import lerobot_writing
from datamodules.sources.ingested import IngestedSource
from datamodules.sources.opening import kind_of, open_source
from datamodules.sources.source import Source, said, steps
from datamodules.sources.writing import write
from datamodules.spec import ActionSpec, ArraySpec, Spec

pa = pytest.importorskip("pyarrow", reason="LeRobot data sets need the extra arrow")
pq = pytest.importorskip("pyarrow.parquet")

TWO_CAMERAS = Spec(
    {
        "front": ArraySpec((24, 32, 3), "uint8"),
        "wrist": ArraySpec((16, 20, 3), "uint8"),
        "state": ArraySpec((5,), "float32"),
    },
    ActionSpec("multi_discrete", nvec=(3, 4)),
)


pytestmark = pytest.mark.usefixtures("cache")


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path, **options)
    return str(caught.value)


def assert_same(found: Source, expected: Source) -> None:
    assert found.lengths.tolist() == expected.lengths.tolist()
    for episode in range(found.num_episodes):
        got, wanted = steps(found, episode), steps_of(expected.read(episode), expected.spec)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert got[key].dtype == value.dtype, key
            assert np.array_equal(got[key], value), (episode, key)


def lerobot_at(
    path: Path,
    episodes: Sequence[Mapping[str, Any]],
    features: Mapping[str, tuple[str, list[int]]],
    fps: int = 10,
    **info: Any,
) -> Path:
    """A data set as LeRobot lays it out: all episodes in one file each.

    Args:
        episodes: arrays or lists (T, ...) by column; images where the feature is one.
        features: dtype and shape of each column.
    """
    meta, data = path / "meta", path / "data" / "chunk-000"
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    data.mkdir(parents=True)
    rows, tables, begun = [], [], 0
    for number, episode in enumerate(episodes):
        length = len(next(iter(episode.values())))
        row = {"episode_index": number, "tasks": ["push"], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": begun}
        columns = {"frame_index": list(range(length)), "episode_index": [number] * length}
        for key, (dtype, _) in features.items():
            if dtype == "video":
                row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
                row |= {f"videos/{key}/from_timestamp": begun / fps}
            elif dtype == "image":
                columns[key] = [{"bytes": png(image), "path": None} for image in episode[key]]
            else:
                columns[key] = np.asarray(episode[key]).tolist()
        begun += length
        rows.append(row)
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), data / "file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
    for key, (dtype, _) in features.items():
        if dtype == "video":
            file = path / "videos" / key / "chunk-000" / "file-000.mp4"
            file.parent.mkdir(parents=True)
            video(file, np.concatenate([episode[key] for episode in episodes]), fps)
    described = {key: {"dtype": d, "shape": s, "names": None} for key, (d, s) in features.items()}
    about = {
        "codebase_version": "v3.0",
        "fps": fps,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": described,
        **info,
    }
    (meta / "info.json").write_text(json.dumps(about))
    return path


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class TestReading:
    def test_what_lerobot_writes(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        features = {
            "observation.images.top": ("video", [3, 24, 32]),
            "observation.state": ("float32", [6]),
            "observation.effort": ("float64", [1]),
            "action": ("float32", [2]),
            "next.reward": ("float32", [1]),
            "next.done": ("bool", [1]),
            "timestamp": ("float32", [1]),
        }
        episodes = []
        for i, length in enumerate((5, 9, 2)):
            episodes.append(
                {
                    "observation.images.top": picture(length, seed=i),
                    "observation.state": rng.normal(size=(length, 6)).astype(np.float32),
                    "observation.effort": rng.normal(size=length),
                    "action": rng.uniform(-3, 3, (length, 2)).astype(np.float32),
                    "next.reward": rng.normal(size=length).astype(np.float32),
                    "next.done": np.arange(length) == length - 1
                    if i == 1
                    else np.zeros(length, bool),
                    "timestamp": np.arange(length) / 10,
                }
            )
        source = open_source(lerobot_at(tmp_path / "set", episodes, features))
        assert kind_of(source) == "lerobot"
        assert set(source.spec.obs) == {"image", "state", "effort"}
        assert source.lengths.tolist() == [4, 8, 1]
        assert source.fps is not None and source.fps.tolist() == [10, 10, 10]
        assert source.inferred
        assert source.spec.action.kind == "box"
        for number, episode in enumerate(episodes):
            found = steps(source, number)
            assert np.array_equal(found["obs/image"], episode["observation.images.top"])
            assert np.array_equal(found["obs/state"], episode["observation.state"])
            effort = episode["observation.effort"].astype(np.float32)
            assert np.array_equal(found["obs/effort"], effort[:, None])
            assert np.array_equal(found["action"][:-1], episode["action"][:-1])
            assert not found["action"][-1].any()
            assert found["reward"][0] == 0
            rewards = episode["next.reward"]
            assert np.array_equal(found["reward"][1:-1], rewards[:-2])
            assert found["reward"][-1] == rewards[-2] + rewards[-1]
            assert found["is_terminal"][-1] == (number == 1)
        (note,) = said(source)
        assert "the last action of each episode" in note

    def test_two_cameras_images_in_parquet_and_numbered_actions(self, tmp_path: Path) -> None:
        features = {
            "observation.images.front": ("image", [24, 32, 3]),
            "observation.images.side.left": ("video", [24, 32, 3]),
            "observation.images.depth": ("video", [24, 32, 3]),
            "observation.instruction": ("string", [1]),
            "action": ("int64", [1]),
        }
        episodes = [
            {
                "observation.images.front": picture(n, seed=n),
                "observation.images.side.left": picture(n, seed=n + 1),
                "observation.images.depth": picture(n),
                "observation.instruction": ["go"] * n,
                "action": np.arange(n) % 3,
            }
            for n in (4, 6)
        ]
        path = lerobot_at(tmp_path / "set", episodes, features)
        info = json.loads((path / "meta" / "info.json").read_text())
        info["features"]["observation.images.depth"]["info"] = {"video.is_depth_map": True}
        (path / "meta" / "info.json").write_text(json.dumps(info))
        source = open_source(path)
        assert set(source.spec.obs) == {"front", "side_left"}
        assert source.spec.action == ActionSpec("discrete", nvec=(3,))
        for number, episode in enumerate(episodes):
            found = steps(source, number)
            assert np.array_equal(found["obs/front"], episode["observation.images.front"])
            assert np.array_equal(found["obs/side_left"], episode["observation.images.side.left"])
            assert np.array_equal(found["action"][:-1], episode["action"][:-1])
            assert not found["reward"].any()
        notes = " ".join(said(source))
        assert "depth" in notes
        assert "observation.instruction" in notes
        assert "there are no rewards (next.reward): they are 0" in notes
        small = open_source(path, only=["front"], size=8, crop=True)
        assert {k: a.shape for k, a in small.spec.obs.items()} == {"front": (8, 8, 3)}
        with pytest.raises(UserError, match="no observation"):
            open_source(path, only=["top"])

    def test_without_actions_it_is_video(self, tmp_path: Path) -> None:
        features = {"observation.image": ("video", [24, 32, 3])}
        path = lerobot_at(tmp_path / "set", [{"observation.image": picture(5)}], features)
        source = open_source(path)
        assert source.spec.action is None
        assert np.array_equal(steps(source, 0)["obs/image"], picture(5))

    def test_of_numbers_alone(self, tmp_path: Path) -> None:
        features = {"observation.state": ("float32", [2]), "action": ("float32", [1])}
        state, action = np.ones((4, 2), np.float32), np.linspace(-1, 1, 4)
        episodes = [{"observation.state": state, "action": action}]
        source = open_source(lerobot_at(tmp_path / "set", episodes, features))
        assert source.spec.action == ActionSpec("box", low=(-1.0,), high=(1.0,))
        found = steps(source, 0)["action"][:-1]
        assert np.array_equal(found, action[:-1, None].astype(np.float32))


def small(path: Path, lengths: Sequence[int] = (4, 6, 3)) -> Path:
    write(memory(IMAGES, lengths), path, "lerobot", lossless=True)
    return path


class TestBroken:
    def test_older_versions_are_refused_with_the_mend(self, tmp_path: Path) -> None:
        features = {"observation.state": ("float32", [2])}
        episodes = [{"observation.state": np.ones((4, 2))}]
        path = lerobot_at(tmp_path / "set", episodes, features, codebase_version="v2.1")
        line = refused(path)
        assert "version v2.1" in line
        assert "convert_dataset_v21_to_v30" in line

    def test_damaged_metadata(self, tmp_path: Path) -> None:
        path = small(tmp_path / "set")
        (path / "meta" / "info.json").write_text("{")
        assert "info.json' is not readable as JSON" in refused(path)
        path = small(tmp_path / "other")
        (path / "meta" / "episodes" / "chunk-000" / "file-000.parquet").write_bytes(b"PAR1")
        assert "file-000.parquet' cannot be read" in refused(path)

    def test_a_file_that_is_missing_is_named(self, tmp_path: Path) -> None:
        path = small(tmp_path / "set")
        (path / "videos" / "observation.image" / "chunk-000" / "file-000.mp4").unlink()
        line = refused(path)
        assert f"{path}, episode 0 cannot be read: '" in line
        assert "file-000.mp4' cannot be read" in line
        assert "none of the 3 recordings" in refused(path, errors="skip")

    def test_rows_that_are_missing_are_counted(self, tmp_path: Path) -> None:
        path = small(tmp_path / "set")
        (file,) = (path / "data").rglob("*.parquet")
        table = pq.read_table(file)
        pq.write_table(table.slice(0, 8), file)
        assert "episode 1 has 3 rows in" in refused(path)
        source = open_source(path, errors="skip")
        assert isinstance(source, IngestedSource)
        assert source.num_episodes == 1
        assert len(source.broken) == 2

    def test_a_video_that_is_too_short(self, tmp_path: Path) -> None:
        path = small(tmp_path / "set")
        (file,) = (path / "videos").rglob("*.mp4")
        video(file, picture(8, 40, 36), fps=30)
        source = open_source(path, errors="skip")
        assert source.num_episodes == 1
        assert "is cut off: 3 of 7 frames" in said(source)[-1]

    def test_values_of_another_shape(self, tmp_path: Path) -> None:
        features = {"observation.state": ("float32", [3]), "action": ("float32", [1])}
        episodes = [{"observation.state": np.ones((4, 2)), "action": np.ones(4)}]
        path = lerobot_at(tmp_path / "set", episodes, features)
        assert "are not what the metadata say" in refused(path)

    @pytest.mark.parametrize("column", ["observation.state", "action", "next.reward"])
    def test_nan_is_named(self, column: str, tmp_path: Path) -> None:
        features = {
            "observation.state": ("float32", [2]),
            "action": ("float32", [2]),
            "next.reward": ("float32", [1]),
        }
        episodes = [
            {
                "observation.state": np.ones((4, 2)),
                "action": np.arange(8.0).reshape(4, 2),
                "next.reward": np.ones(4),
            }
            for _ in range(2)
        ]
        episodes[1][column][2] = np.nan
        path = lerobot_at(tmp_path / "set", episodes, features)
        line = refused(path)
        assert "NaN or infinity in" in line
        if column != "action":  # without whole actions nobody knows what they may be
            assert "episode 1 has NaN" in line
            assert open_source(path, errors="skip").num_episodes == 1

    def test_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = small(tmp_path / "set")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(MissingExtra, match=r"world-model-zoo\[arrow\]"):
            open_source(path)
        with pytest.raises(MissingExtra, match=r"world-model-zoo\[arrow\]"):
            small(tmp_path / "other")


class TestWriting:
    @pytest.mark.parametrize(
        "spec", [IMAGES, VECTORS, BOX, TWO_CAMERAS], ids=["image", "vector", "box", "cameras"]
    )
    def test_what_is_written_comes_back(self, spec: Spec, tmp_path: Path) -> None:
        given = memory(spec, (5, 1, 9, 3))
        write(given, tmp_path / "set", "lerobot", lossless=True)
        assert [p.name for p in tmp_path.iterdir()] == ["set"], "nothing else is left there"
        source = open_source(tmp_path / "set")
        assert dict(source.spec.obs) == dict(spec.obs)
        source.adopt(spec, "the recording")
        assert_same(source, given)

    def test_several_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lerobot_writing, "DATA_MB", 0)
        monkeypatch.setattr(lerobot_writing, "VIDEO_MB", -1)
        monkeypatch.setattr(lerobot_writing, "FILES_PER_CHUNK", 2)
        given = memory(IMAGES, (4, 2, 3))
        write(given, tmp_path / "set", "lerobot", lossless=True)
        names = ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"]
        found = sorted((tmp_path / "set" / "data").rglob("*.parquet"))
        assert [str(p.relative_to(tmp_path / "set" / "data")) for p in found] == [
            f"{name}.parquet" for name in names
        ]
        assert len(list((tmp_path / "set" / "videos").rglob("*.mp4"))) == 3
        source = open_source(tmp_path / "set")
        source.adopt(IMAGES, "the recording")
        assert_same(source, given)

    def test_the_metadata_are_lerobots(self, tmp_path: Path) -> None:
        given = memory(IMAGES, (4, 2))
        given.env = "CartPole-v1"
        write(given, tmp_path / "set", "lerobot")
        meta = tmp_path / "set" / "meta"
        info = json.loads((meta / "info.json").read_text())
        assert info["codebase_version"] == "v3.0"
        assert (info["total_episodes"], info["total_frames"], info["fps"]) == (2, 8, 30)
        assert info["features"]["observation.image"]["shape"] == [40, 36, 3]
        assert info["features"]["observation.image"]["info"]["video.pix_fmt"] == "yuv420p"
        table = pq.read_table(meta / "episodes" / "chunk-000" / "file-000.parquet").to_pydict()
        assert table["length"] == [5, 3]
        assert table["dataset_from_index"] == [0, 5]
        assert table["dataset_to_index"] == [5, 8]
        assert table["videos/observation.image/to_timestamp"] == pytest.approx([5 / 30, 8 / 30])
        assert table["tasks"] == [["CartPole-v1"]] * 2
        tasks = pq.read_table(meta / "tasks.parquet")
        assert tasks.to_pydict() == {"task_index": [0], "task": ["CartPole-v1"]}
        assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
        (file,) = (tmp_path / "set" / "data").rglob("*.parquet")
        rows = pq.read_table(file)
        assert rows["index"].to_pylist() == list(range(8))
        assert rows["frame_index"].to_pylist() == [*range(5), *range(3)]
        assert rows["timestamp"].to_pylist()[4] == pytest.approx(4 / 30)
        actions = np.array(rows["action"].to_pylist(), np.float32)
        assert np.array_equal(actions[4], actions[3]), "the last one again"
        statistics = json.loads((meta / "stats.json").read_text())
        pose = np.concatenate([e.obs["pose"] for e in given.episodes])
        assert statistics["observation.pose"]["mean"] == pytest.approx(pose.mean(0).tolist())
        assert statistics["observation.pose"]["std"] == pytest.approx(pose.std(0).tolist())
        assert np.array(statistics["observation.image"]["mean"]).shape == (3, 1, 1)

    def test_one_frame_rate_for_all(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mkv", picture(3), fps=10)
        video(tmp_path / "b.mkv", picture(3), fps=10)
        write(open_source(tmp_path), tmp_path / "set", "lerobot")
        source = open_source(tmp_path / "set")
        assert source.spec.action is None
        assert source.fps is not None and source.fps.tolist() == [10, 10]
        (tmp_path / "b.mkv").unlink()
        video(tmp_path / "c.mkv", picture(3), fps=25)
        with pytest.raises(UserError, match="10 to 25 frames per second"):
            write(open_source(tmp_path), tmp_path / "other", "lerobot")

    def test_more_episodes_are_ingested_on_top(self, tmp_path: Path) -> None:
        path = small(tmp_path / "set", (4, 6))
        open_source(path)
        episodes = [*recorded(IMAGES, (4, 6)), *recorded(IMAGES, (2,), seed=5)]
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        write(Memory(IMAGES, episodes), path, "lerobot", lossless=True)
        source = open_source(path)
        source.adopt(IMAGES, "the recording")
        assert_same(source, Memory(IMAGES, episodes))
