"""Recorded data for tests: in memory, as HDF5, and as Minari's own storage writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np

from datamodules.sources.source import Recorded, Source, step_fields
from datamodules.sources.writing import append_episode, store_attributes
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import EpisodeStore

VECTORS = Spec({"vector": ArraySpec((3,), "float32")}, ActionSpec("discrete", nvec=(4,)))
BOX = Spec({"vector": ArraySpec((3,), "float32")}, ActionSpec("box", low=(-1.0,), high=(1.0,)))
IMAGES = Spec(
    {"image": ArraySpec((40, 36, 3), "uint8"), "pose": ArraySpec((2,), "float32")},
    ActionSpec("box", low=(-1.0, -2.0), high=(1.0, 2.0)),
)


class Memory(Source):
    """Episodes in memory."""

    def __init__(self, spec: Spec, episodes: Sequence[Recorded], env: str | None = None) -> None:
        super().__init__()
        self.name, self.spec, self.env = "memory", spec, env
        self.episodes = list(episodes)
        self.lengths = np.array([_actions(e) for e in episodes])

    def read(self, episode: int) -> Recorded:
        return self.episodes[episode]

    def files(self) -> list[Path]:
        return []


def _actions(episode: Recorded) -> int:
    return len(next(iter(episode.obs.values()))) - 1


def recorded(spec: Spec, lengths: Sequence[int], seed: int = 0) -> list[Recorded]:
    """Random episodes of so many actions, or steps of silent video; every second ends the task."""
    rng = np.random.default_rng(seed)
    episodes = []
    for i, n in enumerate(lengths):
        obs = {
            key: rng.integers(0, 256, (n + 1, *a.shape), dtype=np.uint8)
            if a.is_image
            else rng.normal(size=(n + 1, *a.shape)).astype(np.float32)
            for key, a in spec.obs.items()
        }
        if spec.action is None:
            episodes.append(Recorded(obs, None, None, False))
            continue
        action = np.stack([np.asarray(spec.action.sample(rng)) for _ in range(n)])
        reward = rng.integers(-3, 4, n).astype(np.float32)
        episodes.append(Recorded(obs, action, reward, bool(i % 2)))
    return episodes


def memory(spec: Spec = VECTORS, lengths: Sequence[int] = (5, 1, 9, 3), seed: int = 0) -> Memory:
    return Memory(spec, recorded(spec, lengths, seed))


def store_at(path: Path, source: Source) -> Path:
    """A store with one stream."""
    attributes = store_attributes(source.spec, source.env)
    with EpisodeStore.create(path, step_fields(source.spec), 16, attributes) as store:
        for episode in range(source.num_episodes):
            append_episode(store, 0, steps_of(source.read(episode), source.spec))
    return path


def steps_of(given: Recorded, spec: Spec) -> dict[str, np.ndarray]:
    """The time steps of an episode, in a loop by the words of the convention."""
    n = _actions(given)
    rows = []
    for t in range(n + 1):
        row = {f"obs/{key}": given.obs[key][t] for key in spec.obs}
        if given.action is not None and given.reward is not None:
            zero = np.zeros(spec.action.shape, spec.action.dtype)
            row["action"] = np.asarray(given.action[t] if t < n else zero)
            row["reward"] = np.float32(given.reward[t - 1] if t else 0)
        row |= {"is_first": np.bool_(t == 0), "is_last": np.bool_(t == n)}
        row["is_terminal"] = np.bool_(t == n and given.terminal)
        rows.append(row)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def d4rl_at(path: Path, source: Source, after: bool = True, **change: Any) -> Path:
    """Flat arrays; `change` replaces or (None) removes some."""
    flat: dict[str, list[np.ndarray]] = {}
    for episode in range(source.num_episodes):
        given = source.read(episode)
        n = len(given.reward)
        ends = np.arange(n) == n - 1
        rows = {
            "observations": given.obs["vector"][:n],
            "actions": given.action,
            "rewards": given.reward,
            "terminals": ends & given.terminal,
            "timeouts": ends & (not given.terminal),
        }
        if after:
            rows["next_observations"] = given.obs["vector"][1:]
        for key, value in rows.items():
            flat.setdefault(key, []).append(value)
    arrays = {key: np.concatenate(parts) for key, parts in flat.items()} | change
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            if value is not None:
                file.create_dataset(key, data=value)
    return path


def minari_at(
    root: Path,
    name: str,
    observation: gym.Space,
    action: gym.Space,
    episodes: Sequence[Mapping[str, Any]],
    kind: str = "hdf5",
    jpeg: bool = True,
) -> Path:
    """A data set as Minari's own storage writes it, which needs no JAX.

    Args:
        episodes: `observations`, `actions`, `rewards`, `terminations`, `truncations` of each.
    """
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    folder = root / name
    (folder / "data").mkdir(parents=True)
    storage = MinariStorage.new(
        folder / "data", observation, action, data_format=kind, jpeg_encoding=jpeg
    )
    storage.update_metadata({"dataset_id": name, "minari_version": "0.5.4"})
    storage.update_episodes(EpisodeBuffer(id=i, **dict(e)) for i, e in enumerate(episodes))
    return folder


def buffers(source: Source, key: str | None = None) -> list[dict[str, Any]]:
    """The episodes of a source as Minari takes them; a single key is not a dict there."""
    found = []
    for episode in range(source.num_episodes):
        given = source.read(episode)
        ends = np.arange(len(given.reward)) == len(given.reward) - 1
        found.append(
            {
                "observations": given.obs[key] if key else dict(given.obs),
                "actions": given.action,
                "rewards": given.reward,
                "terminations": ends & given.terminal,
                "truncations": ends & (not given.terminal),
            }
        )
    return found


def edit_metadata(folder: Path, **change: Any) -> None:
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
