"""Opens LeRobot data sets of version 3: Parquet for numbers, MP4 for cameras, many episodes a file.

A frame of LeRobot is an observation with the action that was chosen there, so an episode of n + 1
frames has n actions whose result is known; the last one is left out. `observation.images.<name>`
becomes the key `<name>`, or `image` if it is the only camera; `observation.state` becomes `state`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import MissingExtra, UserError
from datamodules.sources.ingested import IngestedSource
from datamodules.sources.ingesting import INDEX, Errors, Index, Item, default_folder, ingest
from datamodules.sources.lerobot_files import (
    ACTION,
    DONE,
    REWARD,
    TRUNCATED,
    Camera,
    LeRobotJob,
    numbers,
)
from datamodules.sources.source import inferred_action
from datamodules.sources.video_files import mark_of
from datamodules.spec import IMAGE_KEY, Spec

KIND = "lerobot"
INFO = Path("meta") / "info.json"
OBSERVATION, CAMERA = "observation.", "observation.images."
UPGRADE = "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=..."


def is_lerobot(path: Path) -> bool:
    """Whether a folder holds a LeRobot data set."""
    return (path / INFO).is_file()


def open_lerobot(
    path: Path,
    only: Sequence[str] | None = None,
    size: int | None = None,
    *,
    crop: bool = False,
    ingest_into: str | os.PathLike[str] | None = None,
    errors: Errors = "stop",
    workers: int | None = None,
) -> IngestedSource:
    """Opens a LeRobot data set; what is new is ingested first.

    Args:
        path: its folder.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.
        crop: cut images to their central square before.
        ingest_into: folder of the store; by default one below the user's cache folder.
        errors: "stop" at the first episode that cannot be read, or "skip" and count them.
        workers: processes that decode; by default one for each core.

    Raises:
        UserError: another version, damaged metadata, an episode that cannot be read.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"the LeRobot data set '{path}'", "arrow") from error
    data = _DataSet(path, only, size, crop)
    settings = {"kind": KIND, "size": size, "crop": crop, "only": sorted(only) if only else None}
    folder = Path(ingest_into) if ingest_into is not None else default_folder(path, settings)
    items = data.items()
    marks = zlib.crc32(repr([(item.name, item.mark) for item in items]).encode())
    about = {"kind": KIND, "notes": data.notes, "marks": marks}
    about["spec"] = _known_spec(folder, marks) or data.spec().to_dict()
    ingest(items, folder, str(path), settings, about, errors, workers)
    return IngestedSource(folder, str(path), items, only)


class _DataSet:
    """The metadata of a data set."""

    def __init__(
        self, path: Path, only: Sequence[str] | None, size: int | None, crop: bool
    ) -> None:
        self.path, self._size, self._crop = path, size, crop
        self.notes: list[str] = []
        self._info = self._read_info()
        features = self._info["features"]
        cameras, images, vectors = self._observations(features)
        keys = [*cameras, *images, *vectors]
        unknown = sorted(set(only or []) - set(keys))
        if unknown or not keys:
            raise UserError(f"there is no observation {unknown}: '{path}' has {sorted(keys)}")
        chosen = set(only or keys)
        self._cameras = {k: c for k, c in cameras.items() if k in chosen}
        self._images = {k: c for k, c in images.items() if k in chosen}
        self._vectors = {k: c for k, c in vectors.items() if k in chosen}
        self._action = _action(path, features)
        if self._action is not None:
            self.notes.append(
                "the last action of each episode is left out, for nothing came after it; what it "
                "earned goes to the one before"
            )
            if REWARD not in features:
                self.notes.append(f"there are no rewards ({REWARD}): they are 0")
        used = [*self._images.values(), *(column for column, _ in self._vectors.values())]
        used += [c for c in (ACTION, REWARD, DONE, TRUNCATED) if c in features]
        self._columns = tuple(used)

    def items(self) -> list[Item]:
        """The episodes."""
        found = []
        for row in self._episodes():
            number, length = int(row["episode_index"]), int(row["length"])
            data = self._file("data_path", row, "data/")
            cameras = {}
            for key, column in self._cameras.items():
                file = self._file("video_path", row, f"videos/{column}/", video_key=column)
                start = float(row[f"videos/{column}/from_timestamp"])
                cameras[key] = Camera(file, start)
            files = [data, *(camera.path for camera in cameras.values())]
            marks = [mark_of(file)[0] for file in files]
            starts = [camera.start for camera in cameras.values()]
            job = LeRobotJob(
                data,
                number,
                length,
                float(self._info["fps"]),
                self._columns,
                cameras,
                self._images,
                self._vectors,
                self._action,
                self._size,
                self._crop,
            )
            mark = " ".join([*marks, repr([length, *starts, self._columns])])
            label = f"{self.path}, episode {number}"
            found.append(Item(f"episode {number}", label, mark, length, job))
        if not found:
            raise UserError(f"'{self.path}' holds no episode")
        total = sum(file.stat().st_size for file in self._data_files())
        frames = sum(item.bytes for item in found)
        return [item._replace(bytes=total * item.bytes // max(frames, 1)) for item in found]

    def spec(self) -> Spec:
        """The action space, from all actions: a data set does not say what it may be."""
        if self._action is None:
            return Spec({})
        shape, dtype = self._action
        import pyarrow.parquet

        actions = [np.zeros((0, *shape), dtype)]
        for file in sorted((self.path / "data").rglob("*.parquet")):
            with _reading(file):
                found = numbers(pyarrow.parquet.read_table(file, columns=[ACTION])[ACTION])
                actions.append(found.reshape(-1, *shape).astype(dtype))
        if not sum(map(len, actions)):
            raise UserError(f"'{self.path}' holds no action")
        return Spec({}, inferred_action(str(self.path), np.concatenate(actions))[0])

    def _data_files(self) -> list[Path]:
        names = [self.path / name for name in ("data", "videos")]
        return [file for folder in names for file in folder.rglob("*") if file.is_file()]

    def _read_info(self) -> dict[str, Any]:
        file = self.path / INFO
        try:
            info = json.loads(file.read_text())
            version = str(info["codebase_version"])
            known = isinstance(info["features"], dict) and float(info["fps"]) > 0
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"'{file}' is not readable as JSON: download it again") from error
        if not version.startswith("v3"):
            raise UserError(
                f"'{self.path}' is a LeRobot data set of version {version}, and only v3 is read: "
                f"bring it there with `{UPGRADE}`"
            )
        if not known:
            raise UserError(f"'{file}' lacks features or frames per second: download it again")
        return info

    def _observations(
        self, features: dict[str, Any]
    ) -> tuple[dict[str, str], dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
        """Columns of cameras (video), of images, and of numbers with their shape, by key."""
        seen = {c: f for c, f in features.items() if c.startswith(OBSERVATION)}
        pictures = [c for c, f in seen.items() if f["dtype"] in ("video", "image")]
        left = [c for c in pictures if _is_depth(seen[c])]
        pictures = [c for c in pictures if c not in left]
        numbers = [c for c, f in seen.items() if f["dtype"].startswith(("float", "int", "bool"))]
        left += [c for c in seen if c not in pictures and c not in numbers and c not in left]
        if left:
            self.notes.append(f"{sorted(left)} are left out (depth, text)")
        keys = {c: c.removeprefix(CAMERA).removeprefix(OBSERVATION) for c in [*pictures, *numbers]}
        if len(pictures) == 1 and IMAGE_KEY not in keys.values():
            keys[pictures[0]] = IMAGE_KEY
        if len(set(keys.values())) < len(keys):
            keys = {c: c.removeprefix(OBSERVATION) for c in keys}
        keys = {c: key.replace(".", "_") for c, key in keys.items()}
        videos = {keys[c]: c for c in pictures if seen[c]["dtype"] == "video"}
        images = {keys[c]: c for c in pictures if seen[c]["dtype"] == "image"}
        vectors = {keys[c]: (c, tuple(seen[c]["shape"])) for c in numbers}
        return videos, images, vectors

    def _episodes(self) -> list[dict[str, Any]]:
        """A row of metadata for each episode."""
        import pyarrow.parquet

        rows: list[dict[str, Any]] = []
        wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for column in self._cameras.values():
            parts = ("chunk_index", "file_index", "from_timestamp")
            wanted += [f"videos/{column}/{part}" for part in parts]
        for file in sorted((self.path / "meta" / "episodes").rglob("*.parquet")):
            with _reading(file):
                rows += pyarrow.parquet.read_table(file, columns=wanted).to_pylist()
        for row in rows:
            lacking = [column for column in wanted if row.get(column) is None]
            if lacking:
                raise UserError(
                    f"the metadata of '{self.path}', episode {row.get('episode_index')}, lack "
                    f"{lacking}: download it again"
                )
        return sorted(rows, key=lambda row: row["episode_index"])

    def _file(self, template: str, row: dict[str, Any], prefix: str, **names: str) -> Path:
        numbers = {part: row[prefix + part] for part in ("chunk_index", "file_index")}
        try:
            return self.path / str(self._info[template]).format(**numbers, **names)
        except (LookupError, ValueError) as error:
            raise UserError(
                f"'{self.path / INFO}' has no usable {template}: download it again"
            ) from error


def _action(path: Path, features: dict[str, Any]) -> tuple[tuple[int, ...], str] | None:
    """Shape and dtype of an action, if there are any."""
    if ACTION not in features:
        return None
    shape, kind = tuple(features[ACTION]["shape"]), str(features[ACTION]["dtype"])
    if len(shape) != 1 or not kind.startswith(("float", "int", "uint", "bool")):
        raise UserError(f"'{path}' has actions {kind}{list(shape)}: they must be vectors")
    if kind.startswith("float"):
        return shape, "float32"
    return (() if shape == (1,) else shape), "int64"


def _is_depth(feature: dict[str, Any]) -> bool:
    info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(info.get("video.is_depth_map") or info.get("is_depth_map"))


def _known_spec(folder: Path, marks: int) -> dict[str, Any] | None:
    """The spec that was found when the same data was ingested."""
    about = Index.read(folder).about if (folder / INDEX).exists() else {}
    return about.get("spec") if about.get("marks") == marks else None


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns errors of reading a Parquet file into one sentence."""
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise UserError(
            f"'{file}' cannot be read: it is cut off or damaged; download it again"
        ) from error
