"""Writes recorded data: as a store, a Minari or LeRobot data set, HDF5 as D4RL has it, or video.

Nothing is there until all of it is: it is written beside its place and moved there at the end.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import numpy as np

from datamodules.errors import UserError
from datamodules.sources.hdf5 import ENV, SPEC
from datamodules.sources.hdf5_files import open_hdf5
from datamodules.sources.lerobot_writing import write_lerobot
from datamodules.sources.minari import MAIN_FILE, METADATA, minari_root
from datamodules.sources.source import Source, step_fields, steps
from datamodules.sources.stores import FPS
from datamodules.sources.video_files import VideoWriter, as_rgb, write_gif
from datamodules.spec import IMAGE_KEY, VECTOR_KEY, ActionSpec, Spec
from datamodules.store import EpisodeStore, Field

FORMATS: Final = ("store", "minari", "hdf5", "lerobot", "video", "gif")
VIDEO_ENDINGS: Final = {"video": ".mp4", "gif": ".gif"}
UNKNOWN_FPS: Final = 30.0
Tick = Callable[[int, int], None]  # episodes done, episodes to do

MINARI_ID = re.compile(r"([-\w][-\w/]*[-\w]+/)?[-\w]+-v\d+")
# Readers before 0.5.4 know nothing of images that are not JPEG.
MINARI_VERSION, MINARI_VERSION_IMAGES = "0.5.0", "0.5.4"
_CHUNK_BYTES = 4 << 20


def write(
    source: Source,
    path: Path,
    kind: str,
    *,
    clip: bool = False,
    dataset_id: str | None = None,
    lossless: bool = False,
    tick: Tick | None = None,
) -> None:
    """Writes all episodes of a source.

    Videos are one MP4 or GIF file for each episode in a folder, or one file if the path ends so.

    Args:
        source: the data.
        path: where; nothing may be there yet.
        kind: one of `FORMATS`.
        clip: bring actions that are out of bounds to the bounds.
        dataset_id: of a Minari data set; by default from the path.
        lossless: keep every bit of images that become MP4.
        tick: called after each episode.

    Raises:
        UserError: something is there, the data is wrong, or the disk is full.
    """
    if kind not in FORMATS:
        raise UserError(f"'{kind}' is not a format to write: choose {', '.join(FORMATS)}")
    must_be_free(path)
    if source.spec.action is None and kind in ("minari", "hdf5"):
        raise UserError(
            f"{source.name} is video without actions, and {kind} has a place for steps of an agent "
            "only: write store, lerobot or video"
        )

    def episodes() -> Iterator[dict[str, np.ndarray]]:
        for episode in range(source.num_episodes):
            yield steps(source, episode, clip)
            if tick is not None:
                tick(episode + 1, source.num_episodes)

    with _beside(path) as place:
        if kind == "store":
            _write_store(source, episodes(), place)
        elif kind == "hdf5":
            _write_hdf5(source, episodes(), place)
        elif kind == "lerobot":
            write_lerobot(place, source, episodes(), _common_fps(source), lossless)
        elif kind in VIDEO_ENDINGS:
            _write_videos(source, episodes(), place, path, VIDEO_ENDINGS[kind], lossless)
        else:
            _write_minari(source, episodes(), place, dataset_id or minari_id(path))


def left_out(source: Source, kind: str) -> list[str]:
    """Sentences on what of a source a format has no place for."""
    if kind not in VIDEO_ENDINGS:
        return []
    shown = _shown(source)
    lost = ["the actions and rewards"] if source.spec.action is not None else []
    lost += [f"'{key}'" for key in source.spec.obs if key != shown]
    return [f"a video shows '{shown}' and nothing else: left out are {', '.join(lost)}"] * bool(
        lost
    )


def must_be_free(path: Path) -> None:
    """Raises a UserError unless there is nothing at a path."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"'{path}' is there already: name another place, or delete it")


def minari_id(path: Path) -> str:
    """The id of a Minari data set at a path: below Minari's root, or from the folder's name."""
    root = minari_root().absolute()
    absolute = path.absolute()
    name = str(absolute.relative_to(root)) if root in absolute.parents else path.name
    if MINARI_ID.fullmatch(name):
        return name
    plain = re.sub(r"[^-\w/]+", "-", name)
    return f"{plain}-v0"


def store_attributes(spec: Spec, env: str | None, **more: Any) -> dict[str, Any]:
    """What a store says about its data."""
    return {"spec": spec.to_dict(), **({"env": env} if env else {}), **more}


def chunk_steps(fields: Mapping[str, Field]) -> int:
    """Steps per chunk of a store, so that a chunk has some megabytes."""
    row = sum(math.prod(f.shape) * np.dtype(f.dtype).itemsize for f in fields.values())
    return int(np.clip(_CHUNK_BYTES // row, 128, 1 << 14))


def _write_store(source: Source, episodes: Iterator[dict[str, np.ndarray]], path: Path) -> None:
    fields = step_fields(source.spec)
    fps = {} if source.fps is None else {FPS: source.fps.tolist()}
    attributes = store_attributes(source.spec, source.env, **fps)
    with EpisodeStore.create(path, fields, chunk_steps(fields), attributes) as store:
        for episode in episodes:
            append_episode(store, 0, episode)
    (path / "lock").unlink(missing_ok=True)


def append_episode(store: EpisodeStore, stream: int, episode: Mapping[str, np.ndarray]) -> None:
    """Appends the steps (T, ...) of an episode to a stream."""
    for t in range(len(episode["is_first"])):
        store.append(stream, {key: value[t] for key, value in episode.items()})


def _write_videos(
    source: Source,
    episodes: Iterator[dict[str, np.ndarray]],
    place: Path,
    path: Path,
    ending: str,
    lossless: bool,
) -> None:
    """A file for each episode; or the one file, if that is what the path says."""
    key = _shown(source)
    alone = path.suffix.lower() == ending
    if alone and source.num_episodes > 1:
        raise UserError(
            f"'{path}' is one video, and {source.name} has {source.num_episodes} episodes: name a "
            f"folder, and --format {'gif' if ending == '.gif' else 'video'}"
        )
    if lossless and ending == ".gif":
        raise UserError("a GIF has 256 colours for each frame: write lossless video as MP4")
    if not alone:
        place.mkdir()
    rates = np.full(source.num_episodes, np.nan) if source.fps is None else source.fps
    for number, (episode, rate) in enumerate(zip(episodes, rates, strict=True)):
        images = as_rgb(episode[f"obs/{key}"])
        fps = float(rate) if np.isfinite(rate) else UNKNOWN_FPS
        file = place if alone else place / f"episode_{number:06d}{ending}"
        if ending == ".gif":
            write_gif(file, images, fps)
            continue
        writer = VideoWriter(file, fps, lossless)
        writer.add(images)
        writer.close()


def _shown(source: Source) -> str:
    """The images that a video shows."""
    keys = source.spec.images
    if not keys:
        raise UserError(f"{source.name} has no images to show: its observations are {source.spec}")
    return IMAGE_KEY if IMAGE_KEY in keys else keys[0]


def _common_fps(source: Source) -> float:
    """The frames per second of all episodes."""
    known = np.array([]) if source.fps is None else source.fps[np.isfinite(source.fps)]
    if not len(known):
        return UNKNOWN_FPS
    if known.max() > 1.01 * known.min():
        raise UserError(
            f"the episodes of {source.name} have {known.min():g} to {known.max():g} frames per "
            "second, and a LeRobot data set has one rate for all: convert them apart"
        )
    return float(known[0])


def _write_hdf5(source: Source, episodes: Iterator[dict[str, np.ndarray]], path: Path) -> None:
    with open_hdf5(path, "w") as file:
        file.attrs[SPEC] = json.dumps(source.spec.to_dict())
        if source.env:
            file.attrs[ENV] = source.env
        for episode in episodes:
            n = len(episode["reward"]) - 1
            obs = {k[4:]: v for k, v in episode.items() if k.startswith("obs/")}
            parts = {"observations": slice(0, n), "next_observations": slice(1, None)}
            for name, part in parts.items():
                for key, value in obs.items():
                    alone = len(obs) == 1 and key in (VECTOR_KEY, IMAGE_KEY)
                    _extend(file, name if alone else f"{name}/{key}", value[part])
            ends = np.zeros((2, n), bool)
            ends[0 if episode["is_terminal"][-1] else 1, -1] = True
            _extend(file, "actions", episode["action"][:n])
            _extend(file, "rewards", episode["reward"][1:])
            _extend(file, "terminals", ends[0])
            _extend(file, "timeouts", ends[1])


def _extend(file: Any, name: str, rows: np.ndarray) -> None:
    """Appends rows to an array of a file."""
    if name not in file:
        row = max(rows[:1].nbytes, 1)
        chunk = int(np.clip((256 << 10) // row, 1, 1 << 14))
        shape = rows.shape[1:]
        file.create_dataset(
            name, (0, *shape), rows.dtype, maxshape=(None, *shape), chunks=(chunk, *shape)
        )
    array = file[name]
    array.resize(len(array) + len(rows), 0)
    array[len(array) - len(rows) :] = rows


def _write_minari(
    source: Source, episodes: Iterator[dict[str, np.ndarray]], path: Path, dataset_id: str
) -> None:
    """Minari's own writer would need JAX."""
    if not MINARI_ID.fullmatch(dataset_id):
        raise UserError(
            f"'{dataset_id}' is not the id of a Minari data set: these are like "
            "namespace/environment/name-v0"
        )
    from minari.serialization import serialize_space

    folder = path / "data"
    folder.mkdir(parents=True)
    with open_hdf5(folder / MAIN_FILE, "w") as file:
        for number, episode in enumerate(episodes):
            n = len(episode["reward"]) - 1
            group = file.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "total_steps": n})
            obs = {k[4:]: v for k, v in episode.items() if k.startswith("obs/")}
            if _is_dict(source.spec):
                inner = group.create_group("observations")
                for key, value in obs.items():
                    inner.create_dataset(key, data=value)
            else:
                group.create_dataset("observations", data=next(iter(obs.values())))
            ends = np.zeros((2, n), bool)
            ends[0 if episode["is_terminal"][-1] else 1, -1] = True
            group.create_dataset("actions", data=episode["action"][:n])
            group.create_dataset("rewards", data=episode["reward"][1:])
            group.create_dataset("terminations", data=ends[0])
            group.create_dataset("truncations", data=ends[1])
            group.create_group("infos")  # Minari prints an episode only with it
    metadata: dict[str, Any] = {
        "dataset_id": dataset_id,
        "total_episodes": source.num_episodes,
        "total_steps": source.num_actions,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "minari_version": MINARI_VERSION_IMAGES if source.spec.images else MINARI_VERSION,
        "observation_space": serialize_space(observation_space(source.spec)),
        "action_space": serialize_space(action_space(source.spec.action)),
        "dataset_size": round((folder / MAIN_FILE).stat().st_size / 1e6, 1),
    }
    described = _described(source.env)
    if described is not None:
        metadata["env_spec"] = described
    (folder / METADATA).write_text(json.dumps(metadata))


def observation_space(spec: Spec) -> gym.Space:
    """The Gymnasium space of observations: one Box, or a Dict."""
    boxes: dict[str, gym.Space] = {
        key: gym.spaces.Box(0, 255, a.shape, np.uint8)
        if a.is_image
        else gym.spaces.Box(-np.inf, np.inf, a.shape, np.float32)
        for key, a in spec.obs.items()
    }
    return gym.spaces.Dict(boxes) if _is_dict(spec) else next(iter(boxes.values()))


def action_space(spec: ActionSpec) -> gym.Space:
    """The Gymnasium space of actions."""
    if spec.kind == "discrete":
        return gym.spaces.Discrete(spec.n)
    if spec.kind == "multi_discrete":
        return gym.spaces.MultiDiscrete(list(spec.nvec))
    return gym.spaces.Box(np.array(spec.low, np.float32), np.array(spec.high, np.float32))


def _is_dict(spec: Spec) -> bool:
    return len(spec.obs) > 1 or not {VECTOR_KEY, IMAGE_KEY} & spec.obs.keys()


def _described(env: str | None) -> str | None:
    """The registered description of an environment, as Minari keeps it."""
    try:
        return gym.spec(env).to_json() if env else None
    except (gym.error.Error, TypeError, ModuleNotFoundError):
        return None


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place beside a path, which takes its place when the block ends well."""
    place = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete(place)
        yield place
        if path.is_dir():
            path.rmdir()  # it is empty
        os.replace(place, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        _delete(place)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
