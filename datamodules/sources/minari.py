"""Reads Minari data sets (HDF5, Arrow, Parquet) from the disk.

A data set is a folder `data` with `metadata.json` and, as HDF5, `main_data.hdf5` with one group for
each episode, or a folder for each episode (Arrow, Parquet). Observations have one row more than
actions. Infos are not read, which is half of the time. Minari itself is only asked for the spaces:
its readers build all episodes with their infos and drop rows of long ones in Arrow files.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from datamodules.errors import MissingExtra, UserError
from datamodules.sources.hdf5_files import open_hdf5, reading
from datamodules.sources.source import Recorded, Source, inferred_action, note_empty
from datamodules.sources.spaces import Column, action_space, columns
from datamodules.spec import Spec

METADATA = "metadata.json"
MAIN_FILE = "main_data.hdf5"


def minari_root() -> Path:
    """Where Minari keeps its data sets: MINARI_DATASETS_PATH, or ~/.minari/datasets."""
    root = os.environ.get("MINARI_DATASETS_PATH")
    return Path(root) if root else Path.home() / ".minari" / "datasets"


def data_folder(path: Path) -> Path | None:
    """The folder with the metadata of a Minari data set at a path, if there is one."""
    for folder in (path / "data", path):
        if (folder / METADATA).is_file():
            return folder
    return None


class MinariSource(Source):
    """A Minari data set.

    Args:
        path: its folder, with or without `data`.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.

    Raises:
        UserError: damaged metadata, unsupported spaces, missing episodes.
    """

    def __init__(
        self, path: Path, only: Sequence[str] | None = None, size: int | None = None
    ) -> None:
        super().__init__()
        folder = data_folder(path)
        if folder is None:
            raise UserError(f"there is no Minari data set at '{path}': it has no {METADATA}")
        self.folder, self.name = folder, str(path)
        about = self._metadata()
        self.env = _env_id(about)
        observation = _space(about, "observation_space", path)
        action = _space(about, "action_space", path)
        try:
            self._columns, texts = columns(observation, only, size)
            found, self._to_action = action_space(action)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        if texts:
            self.notes.append(f"{self.name}: the texts {texts} are left out")
        self._action_space = action
        kind = about.get("data_format", "hdf5")
        if kind not in ("hdf5", "arrow", "parquet"):
            raise UserError(f"{self.name} has the data format '{kind}': known are hdf5, arrow")
        self._file = _Hdf5(folder, self.name) if kind == "hdf5" else _Arrow(folder, self.name, kind)
        total = about.get("total_episodes")
        if not isinstance(total, int):
            raise UserError(f"'{folder / METADATA}' does not say total_episodes: download it again")
        lengths = np.array([self._file.length(i) for i in range(total)], np.int64)
        self._episodes = np.flatnonzero(lengths > 0)
        self.lengths = lengths[self._episodes]
        note_empty(self, np.flatnonzero(lengths == 0).tolist())
        if found is None:
            everything = np.concatenate(
                [self._to_action(self._leaf(int(i), action, "actions")) for i in self._episodes]
            )
            found, guess = inferred_action(self.name, everything)
            self.inferred = True
            self.notes.append(f"{self.name} does not bound its actions; they look like {guess}")
        self.spec = Spec({key: c.array for key, c in self._columns.items()}, found)

    def read(self, episode: int) -> Recorded:
        """One episode."""
        number, where = int(self._episodes[episode]), self.where(episode)
        with reading(where):
            observations = self._file.part(number, "observations")
            obs = {}
            for key, column in self._columns.items():
                if not _contains(observations, column.path):
                    raise UserError(f"{where}: the observation '{key}' is missing")
                recorded = self._file.array(observations, column.path, column.space)
                _must_look_like(recorded, column, where, key)
                obs[key] = column.convert(recorded)
            ends = self._scalars(number, "terminations", where).astype(bool)
            if ends[:-1].any():
                step = int(np.flatnonzero(ends[:-1])[0])
                raise UserError(
                    f"{where}: the task ends at step {step}, but the episode goes on: split it"
                )
            action = self._to_action(self._leaf(number, self._action_space, "actions"))
            reward = self._scalars(number, "rewards", where)
            return Recorded(obs, action, reward, bool(len(ends) and ends[-1]))

    def files(self) -> list[Path]:
        """Metadata and data."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def where(self, episode: int) -> str:
        """With the number that the episode has in the data set."""
        return f"{self.name}, episode {int(self._episodes[episode])}"

    def _leaf(self, number: int, space: gym.Space, name: str) -> np.ndarray:
        where = f"{self.name}, episode {number}"
        with reading(where):
            return self._file.array(self._file.part(number, name), (), space)

    def _scalars(self, number: int, name: str, where: str) -> np.ndarray:
        values = np.asarray(self._file.array(self._file.part(number, name), (), None))
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise UserError(f"{where}: '{name}' has the shape {values.shape}, not (steps,)")
        return values

    def _metadata(self) -> dict[str, Any]:
        path = self.folder / METADATA
        try:
            about = json.loads(path.read_text())
            assert isinstance(about, dict)
        except (OSError, ValueError, AssertionError) as error:
            raise UserError(f"'{path}' is not readable as JSON: download it again") from error
        return about


class _Hdf5:
    """Episodes as groups of one file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._file = open_hdf5(folder / MAIN_FILE)

    def length(self, number: int) -> int:
        """Actions of an episode."""
        return len(self.part(number, "rewards"))

    def part(self, number: int, name: str) -> Any:
        """A group or data set of an episode."""
        where = f"{self._name}, episode {number}"
        with reading(where):
            group = self._file.get(f"episode_{number}")
            if group is None:
                raise UserError(
                    f"{where} is missing, though the metadata counts it: the file is cut off or "
                    "still being written; download it again"
                )
            part = group.get(name)
            if part is None:
                raise UserError(f"{where} lacks '{name}': it has {sorted(group)}")
            return part

    def array(self, part: Any, path: tuple[str, ...], space: gym.Space | None) -> np.ndarray:
        """An array (T, ...) below a group; JPEG images are decoded."""
        for key in path:
            part = part[key]
        values = part[()]
        return _decode(values) if _is_encoded(values, space) else np.asarray(values)


class _Arrow:
    """Episodes as folders; actions and rewards have one row of padding at the end."""

    def __init__(self, folder: Path, name: str, kind: str) -> None:
        try:
            import pyarrow.dataset
        except ImportError as error:
            raise MissingExtra(f"the Minari data set {name} ({kind})", "arrow") from error
        self._dataset = pyarrow.dataset.dataset
        self._folder, self._name, self._kind = folder, name, kind
        self._read: tuple[int, Any] = (-1, None)

    def length(self, number: int) -> int:
        """Actions of an episode."""
        path = self._folder / str(number) / METADATA
        try:
            return int(json.loads(path.read_text())["total_steps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._name}, episode {number}: '{path}' is missing or damaged: download it again"
            ) from error

    def part(self, number: int, name: str) -> Any:
        """A column of an episode."""
        where = f"{self._name}, episode {number}"
        if self._read[0] != number:
            with reading(where):
                folder = str(self._folder / str(number))
                prefixes = ["_", ".", METADATA]
                found = self._dataset(folder, format=self._kind, ignore_prefixes=prefixes)
                self._read = number, found.to_table()
        table = self._read[1]
        if name not in table.column_names:
            raise UserError(f"{where} lacks '{name}': it has {sorted(table.column_names)}")
        with reading(where):
            column = table[name].combine_chunks()
            return column if name == "observations" else column[: max(len(column) - 1, 0)]

    def array(self, part: Any, path: tuple[str, ...], space: gym.Space | None) -> np.ndarray:
        """An array (T, ...) below a struct; JPEG images are decoded."""
        import pyarrow

        for key in path:
            part = part.field(key)
        if pyarrow.types.is_binary(part.type):
            return _decode(part.to_pylist())
        if pyarrow.types.is_fixed_size_list(part.type):
            flat = part.flatten().to_numpy(zero_copy_only=False)
            shape = space.shape if space is not None and space.shape is not None else (-1,)
            return flat.reshape(len(part), *shape)
        return part.to_numpy(zero_copy_only=False)


def _is_encoded(values: np.ndarray, space: gym.Space | None) -> bool:
    """Whether these are bytes of JPEG files, (T, bytes) or T arrays of different lengths."""
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8 or len(space.shape) < 2:
        return False
    return values.dtype == object or values.ndim == 2


def _decode(images: Any) -> np.ndarray:
    """JPEG files as uint8 images (T, H, W) or (T, H, W, C)."""
    return np.stack([np.asarray(Image.open(io.BytesIO(bytes(image)))) for image in images])


def _contains(part: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if hasattr(part, "keys"):
            if key not in part:
                return False
            part = part[key]
        else:  # a struct of arrow
            names = [part.type.field(i).name for i in range(part.type.num_fields)]
            if key not in names:
                return False
            part = part.field(key)
    return True


def _must_look_like(recorded: np.ndarray, column: Column, where: str, key: str) -> None:
    space = column.space
    if isinstance(space, gym.spaces.Discrete):
        inside = (recorded >= space.start) & (recorded < space.start + space.n)
        if recorded.ndim != 1 or not inside.all():
            raise UserError(f"{where}: '{key}' holds values outside of {space}")
    elif recorded.shape[1:] != space.shape:
        raise UserError(
            f"{where}: '{key}' has the shape {recorded.shape[1:]} at each step, and its space says "
            f"{space.shape}"
        )


def _space(about: dict[str, Any], name: str, path: Path) -> gym.Space:
    """A space from the metadata, or of the environment that they name."""
    from minari.serialization import deserialize_space

    if name in about:
        try:
            return deserialize_space(about[name])
        except Exception as error:  # whatever a damaged description makes gymnasium raise
            raise UserError(
                f"the {name} of the Minari data set '{path}' cannot be understood ({error}): "
                "download it again"
            ) from error
    env = _env_id(about)
    try:
        made = gym.make(env or "")
    except Exception as error:
        raise UserError(
            f"the Minari data set '{path}' has no {name}, and its environment {env} cannot be "
            f"built ({error}): install that, or add the space to its metadata"
        ) from error
    made.close()
    return getattr(made, name)


def _env_id(about: dict[str, Any]) -> str | None:
    try:
        return json.loads(about["env_spec"])["id"]
    except (KeyError, ValueError, TypeError):
        return None
