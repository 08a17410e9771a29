"""Writes LeRobot data sets of version 3.

An episode of n actions has n + 1 frames. The action of the last one is the one before it again,
because LeRobot has an action for every frame; `next.reward` and `next.done` are of the action of
their frame. Images become MP4 in RGB, vectors become `observation.<key>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import MissingExtra
from datamodules.sources.lerobot_files import ACTION, DONE, EPISODE, FRAME, REWARD
from datamodules.sources.source import Source
from datamodules.sources.video_files import VideoWriter, as_rgb
from datamodules.spec import IMAGE_KEY

VERSION = "v3.0"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
FILES_PER_CHUNK = 1000
DATA_MB, VIDEO_MB = 100, 200  # LeRobot's own sizes after which the next file begins
KEYFRAME_EVERY = 2  # as LeRobot encodes, for random access


class LeRobotWriter:
    """Takes one episode after the other.

    Args:
        path: folder of the data set.
        source: what the episodes are of.
        fps: frames per second.
        lossless: keep every bit of the images.

    Raises:
        MissingExtra: pyarrow is not installed.
    """

    def __init__(self, path: Path, source: Source, fps: float, lossless: bool) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtra("writing LeRobot data sets", "arrow") from error
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        self._path, self._spec, self._fps = path, source.spec, float(fps)
        self._task = source.env or "recorded"
        self._cameras = {
            key: _Camera(path, f"observation.{_camera(key)}", fps, lossless)
            for key in source.spec.images
        }
        self._rows: list[dict[str, Any]] = []
        self._data: Any = None
        self._frames = self._data_file = 0
        self._statistics: dict[str, _Moments] = {}

    def add(self, episode: Mapping[str, np.ndarray]) -> None:
        """Appends the time steps (T, ...) of an episode."""
        length, number = len(episode["is_first"]), len(self._rows)
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": [self._task],
            "length": length,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, camera in self._cameras.items():
            images = as_rgb(episode[f"obs/{key}"])
            row |= camera.add(images)
            self._count(camera.name, np.moveaxis(images, -1, 1) / np.float32(255), (0, 2, 3))
        columns = self._columns(episode, number)
        for name, values in columns.items():
            self._count(name, values.reshape(length, -1), (0,))
        row |= self._write(columns)
        self._rows.append(row)
        self._frames += length

    def close(self) -> None:
        """Writes the metadata."""
        if self._data is not None:
            self._data.close()
        for camera in self._cameras.values():
            camera.close()
        meta = self._path / "meta"
        (self._path / EPISODES).parent.mkdir(parents=True)
        self._parquet.write_table(
            self._arrow.Table.from_pylist(self._rows), self._path / EPISODES, compression="snappy"
        )
        self._parquet.write_table(self._tasks(), meta / "tasks.parquet")
        statistics = {name: moments.told() for name, moments in self._statistics.items()}
        (meta / "stats.json").write_text(json.dumps(statistics, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))

    def _columns(self, episode: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """The numbers of an episode, (T,) or (T, N) each."""
        length = len(episode["is_first"])
        columns: dict[str, np.ndarray] = {
            f"observation.{key}": episode[f"obs/{key}"].reshape(length, -1)
            for key in self._spec.vectors
        }
        if "action" in episode:
            action, ends = episode["action"].copy(), np.zeros(length, bool)
            action[-1] = action[-2]
            ends[-2:] = episode["is_terminal"][-1]
            columns[ACTION] = action
            columns[REWARD] = np.append(episode["reward"][1:], np.float32(0))
            columns[DONE] = ends
        frame = np.arange(length)
        columns["timestamp"] = (frame / self._fps).astype(np.float32)
        columns[FRAME] = frame
        columns[EPISODE] = np.full(length, number)
        columns["index"] = frame + self._frames
        columns["task_index"] = np.zeros(length, np.int64)
        return columns

    def _write(self, columns: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Appends a group of rows, and returns in which file they are."""
        table = self._arrow.table({name: self._array(v) for name, v in columns.items()})
        at = dict(zip(("chunk_index", "file_index"), _place(self._data_file), strict=True))
        path = self._path / DATA.format(**at)
        if self._data is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = self._parquet.ParquetWriter(path, table.schema, compression="snappy")
        self._data.write_table(table)
        if path.stat().st_size > DATA_MB << 20:
            self._data.close()
            self._data, self._data_file = None, self._data_file + 1
        return {f"data/{key}": value for key, value in at.items()}

    def _array(self, values: np.ndarray) -> Any:
        """An arrow array; vectors are lists of one length."""
        values = np.ascontiguousarray(values)
        if values.ndim == 1 or values.shape[1] == 1:
            return self._arrow.array(values.reshape(-1))
        flat = self._arrow.array(values.reshape(-1))
        return self._arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])

    def _count(self, name: str, values: np.ndarray, axes: tuple[int, ...]) -> None:
        self._statistics.setdefault(name, _Moments()).add(values, axes)

    def _tasks(self) -> Any:
        """The one task, as pandas writes a table whose index is called task."""
        table = self._arrow.table({"task_index": [0], "task": [self._task]})
        columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
        described = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [
                {"name": n, "field_name": n, "pandas_type": p, "numpy_type": t, "metadata": None}
                for n, p, t in columns
            ],
            "pandas_version": "2.0.0",
        }
        return table.replace_schema_metadata({"pandas": json.dumps(described)})

    def _info(self) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for key, camera in self._cameras.items():
            height, width = self._spec.obs[key].shape[:2]
            features[camera.name] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.fps": self._fps,
                    "video.height": height,
                    "video.width": width,
                    "video.channels": 3,
                    "video.codec": "h264",
                    "video.pix_fmt": camera.pixels,
                    "video.is_depth_map": False,
                    "has_audio": False,
                },
            }
        action = self._spec.action
        sizes = {key: self._spec.obs[key].size for key in self._spec.vectors}
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            f"observation.{key}": ("float32", (size,)) for key, size in sizes.items()
        }
        if action is not None:
            shapes[ACTION] = (action.dtype, action.shape or (1,))
            shapes |= {REWARD: ("float32", (1,)), DONE: ("bool", (1,))}
        shapes["timestamp"] = ("float32", (1,))
        shapes |= dict.fromkeys((FRAME, EPISODE, "index", "task_index"), ("int64", (1,)))
        for name, (dtype, shape) in shapes.items():
            features[name] = {"dtype": dtype, "shape": list(shape), "names": None}
        return {
            "codebase_version": VERSION,
            "robot_type": None,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": 1,
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int(self._fps) if self._fps == int(self._fps) else self._fps,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": DATA,
            "video_path": VIDEO if self._cameras else None,
            "features": features,
        }


class _Camera:
    """Video files with the episodes of one camera back to back."""

    def __init__(self, path: Path, name: str, fps: float, lossless: bool) -> None:
        self.name, self.pixels = name, ""
        self._path, self._fps, self._lossless = path, fps, lossless
        self._writer: VideoWriter | None = None
        self._file = self._frames = 0

    def add(self, images: np.ndarray) -> dict[str, Any]:
        """Appends an episode (T, H, W, 3), and returns where it is."""
        chunk, number = _place(self._file)
        path = self._path / VIDEO.format(video_key=self.name, chunk_index=chunk, file_index=number)
        if self._writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = VideoWriter(path, self._fps, self._lossless, KEYFRAME_EVERY)
            self._frames = 0
        begin = self._frames / self._fps
        self._writer.add(images)
        self._frames += len(images)
        found = {
            "chunk_index": chunk,
            "file_index": number,
            "from_timestamp": begin,
            "to_timestamp": self._frames / self._fps,
        }
        self.pixels = self._writer.pixels
        if self._writer.size > VIDEO_MB << 20:
            self.close()
        return {f"videos/{self.name}/{key}": value for key, value in found.items()}

    def close(self) -> None:
        """Ends the file; the next episode begins another."""
        if self._writer is not None:
            self._writer.close()
            self._writer, self._file = None, self._file + 1


class _Moments:
    """Minimum, maximum, mean and standard deviation of what was added, for each component."""

    def __init__(self) -> None:
        self._count = 0
        self._low: Any = np.inf
        self._high: Any = -np.inf
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: np.ndarray, axes: tuple[int, ...]) -> None:
        """Adds values; all axes but those of the components are averaged over."""
        values = values.astype(np.float64)
        kept = len(axes) > 1  # of images (C, 1, 1) is left, of vectors (N,)
        each = values.size // values.shape[1]
        self._low = np.minimum(self._low, values.min(axes, keepdims=kept))
        self._high = np.maximum(self._high, values.max(axes, keepdims=kept))
        self._sum = self._sum + values.sum(axes, keepdims=kept)
        self._squares = self._squares + np.square(values).sum(axes, keepdims=kept)
        self._count += each

    def told(self) -> dict[str, Any]:
        """As LeRobot has it."""
        mean = self._sum / self._count
        variance = np.maximum(self._squares / self._count - np.square(mean), 0)
        found = {"min": self._low, "max": self._high, "mean": mean, "std": np.sqrt(variance)}
        plain = {key: (v[0] if v.ndim == 4 else v).tolist() for key, v in found.items()}
        return {**plain, "count": [self._count]}


def write_lerobot(
    path: Path,
    source: Source,
    episodes: Iterable[Mapping[str, np.ndarray]],
    fps: float,
    lossless: bool,
) -> None:
    """Writes all episodes of a source, given as time steps."""
    path.mkdir()
    writer = LeRobotWriter(path, source, fps, lossless)
    for episode in episodes:
        writer.add(episode)
    writer.close()


def _camera(key: str) -> str:
    return key if key == IMAGE_KEY else f"images.{key}"


def _place(file: int) -> tuple[int, int]:
    """Chunk and number of a file."""
    return file // FILES_PER_CHUNK, file % FILES_PER_CHUNK
