"""Reads episode stores, and the replay of a run, which is one store for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from datamodules.errors import UserError
from datamodules.mapped_rows import MappedRows
from datamodules.sources.source import Recorded, Source, inferred_action, note_empty, step_fields
from datamodules.sources.spaces import columns
from datamodules.spec import ArraySpec, Spec
from datamodules.store import Episode, EpisodeStore, Field

# What a store says about itself, among its attributes.
SPEC, ENV, FPS = "spec", "env", "fps"


class StoreSource(Source):
    """The whole episodes of a store; those that still run or lost their beginning are left out.

    Args:
        path: folder of the store.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.

    Raises:
        UserError: no store, or one that does not hold steps of an agent.
    """

    def __init__(
        self, path: Path, only: Sequence[str] | None = None, size: int | None = None
    ) -> None:
        super().__init__()
        self.path, self.name = path, str(path)
        self.store = EpisodeStore.open(path)
        stored = {k[4:]: f for k, f in self.store.fields.items() if k.startswith("obs/")}
        missing = {"is_first", "is_last"} - self.store.fields.keys()
        acting = {"action", "reward"} - self.store.fields.keys()
        missing |= acting if len(acting) == 1 else set()  # video has neither
        if missing or not stored:
            raise UserError(
                f"the store {path} lacks {sorted(missing) or 'observations'}: it does not hold "
                "what an agent did or saw"
            )
        space = gym.spaces.Dict({key: _space_of(field) for key, field in stored.items()})
        try:
            self._columns, _ = columns(space, only, size)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        for key, column in self._columns.items():
            if not stored[column.path[0]].shape:  # a store keeps scalars as they are
                scalar = ArraySpec((), "float32")
                self._columns[key] = column._replace(array=scalar, convert=lambda x: x)
        held = self._held()
        whole = [e for e in held if e.complete]
        cut = len(held) - len(whole)
        self._episodes = [e for e in whole if e.length > 1]
        self._numbers = [i for i, e in enumerate(held) if e.complete and e.length > 1]
        self.lengths = np.array([e.length - 1 for e in self._episodes], np.int64)
        empty = [i for i, e in enumerate(held) if e.complete and e.length == 1]
        if cut and not self._episodes:
            raise UserError(
                f"{self.name} holds no whole episode, only {cut} that still run or lost their "
                "beginning: collect more"
            )
        note_empty(self, empty)
        if cut:
            self.notes.append(
                f"{self.name}: {cut} of {len(held)} episodes still run or lost their beginning, "
                "and are left out"
            )
        self.env = self.store.attributes.get(ENV)
        self.fps = self._find_fps()
        self.spec = self._find_spec()

    def read(self, episode: int) -> Recorded:
        """One episode."""
        stream, start, length, _ = self._episodes[episode]
        keys = [f"obs/{column.path[0]}" for column in self._columns.values()]
        keys += ["action", "reward", "is_terminal"]
        fields = {k: f for k, f in self.store.fields.items() if k in keys}
        out = {k: np.empty((length, *f.shape), f.dtype) for k, f in fields.items()}
        self.store.read(stream, start, length, out)
        obs = {k: c.convert(out[f"obs/{c.path[0]}"]) for k, c in self._columns.items()}
        ends = out.get("is_terminal")
        terminal = ends is not None and bool(ends[-1])
        if "action" not in out:
            return Recorded(obs, None, None, terminal)
        return Recorded(obs, out["action"][:-1], out["reward"][1:], terminal)

    def in_place(self) -> tuple[Source, dict[str, MappedRows]]:
        """Its images can be read from the chunk files, unless they are to be converted."""
        found = {}
        for key in self.spec.images:
            name = f"obs/{self._columns[key].path[0]}"
            if self.store.fields[name] == Field(*astuple(self.spec.obs[key])):
                views = [self.store.views(*rows, name) for rows in self._runs()]
                found[key] = MappedRows([view for run in views for view in run])
        columns = {key: column for key, column in self._columns.items() if key not in found}
        rest = self.without(found)
        rest._columns = columns
        return rest, found

    def files(self) -> list[Path]:
        """The journal names every committed row."""
        return [self.path / "store.json", self.path / "journal"]

    def where(self, episode: int) -> str:
        """With the number that the episode has among all that the store holds."""
        return f"{self.name}, episode {self._numbers[episode]}"

    def stream(self, episode: int) -> int:
        """The stream of the store that an episode is in."""
        return self._episodes[episode].stream

    def _runs(self) -> list[tuple[int, int, int]]:
        """Stream, first row and number of rows of the episodes, joined where they are adjacent."""
        runs: list[tuple[int, int, int]] = []
        for stream, start, length, _ in self._episodes:
            if runs and runs[-1][0] == stream and sum(runs[-1][1:]) == start:
                start, length = runs[-1][1], runs.pop()[2] + length
            runs.append((stream, start, length))
        return runs

    def _held(self) -> list[Episode]:
        """All episodes of the store."""
        return self.store.episodes()

    def _described(self) -> dict[str, Any] | None:
        """The spec of the recording, where it says so."""
        return self.store.attributes.get(SPEC) or _spec_of_run(self.path)

    def _find_fps(self) -> np.ndarray | None:
        """Frames per second of each episode; a store has one number for all, or one for each."""
        said = self.store.attributes.get(FPS)
        if said is None:
            return None
        each = np.array(said if isinstance(said, list) else [said] * (max(self._numbers) + 1))
        return each.astype(np.float64)[self._numbers]

    def _find_spec(self) -> Spec:
        obs = {key: column.array for key, column in self._columns.items()}
        if "action" not in self.store.fields:
            return Spec(obs)
        described = self._described()
        if described is not None:
            spec = Spec.from_dict(described)
            if self.store.fields["action"] == step_fields(spec).get("action"):
                return Spec(obs, spec.action)
        parts = [self.read(i).action for i in range(len(self._episodes))]
        actions = np.concatenate([part for part in parts if part is not None])
        action, guess = inferred_action(self.name, actions)
        self.inferred = True
        self.notes.append(f"{self.name} does not describe its actions; they look like {guess}")
        return Spec(obs, action)


def replay_stores(path: Path) -> list[Path]:
    """The stores of a run directory or of a replay's folder, one for each rank."""
    for folder in (path / "replay", path):
        found = sorted(folder.glob("rank*"), key=lambda p: (len(p.name), p.name))
        stores = [rank for rank in found if EpisodeStore.exists(rank)]
        if stores:
            return stores
    return []


def _spec_of_run(store: Path) -> dict[str, Any] | None:
    """The spec that the model of a run was built from, if the store is the replay of a run."""
    import pickle

    import torch

    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = store.absolute().parents[1] / "checkpoints" / name
        if checkpoint.is_file():
            try:
                saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
                return saved["hyper_parameters"]["spec"]
            except (OSError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError):
                continue
    return None


def _space_of(field: Any) -> gym.Space:
    if field.dtype == "uint8" and len(field.shape) == 3:
        return gym.spaces.Box(0, 255, field.shape, np.uint8)
    return gym.spaces.Box(-np.inf, np.inf, field.shape, np.float32)
