"""What datamodules over recorded episodes share: reading, splitting, sharding and resuming.

A subclass says how sequences are drawn from episodes, and what a batch is.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from datamodules.batches import ReplayLoader, nest, rng_state, set_rng_state
from datamodules.envs.factory import make_env
from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.sources.opening import open_source
from datamodules.sources.source import Source, unlike
from datamodules.spec import Spec


class Drawn(Protocol):
    """Sequences that can be drawn from some episodes."""

    def all(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """All of them once, in order, as flat batches."""

    def state_dict(self) -> dict[str, Any]:
        """What goes on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state, or raises a UserError if it is of something else."""


D = TypeVar("D", bound=Drawn)


class HeldOut(NamedTuple):
    """B whole episodes, or their beginnings, padded with zeros to T steps.

    Attributes:
        batch: by the batch contract, (B, T, ...).
        length: (B,) int64, steps that are not padding.
        terminal: (B,) bool, whether the task ends at the last of them.
    """

    batch: dict[str, Any]
    length: Tensor
    terminal: Tensor


class RecordedDataModule(pl.LightningDataModule, Generic[D]):
    """Sequences of recorded episodes.

    With several processes each draws from its share of the training episodes (from all of them,
    if there are fewer episodes than processes).

    Args:
        source: of `open_source`; or a list of these, which are joined.
        batch_size: sequences per batch.
        validation: share of the episodes that is held out, in [0, 1).
        seed: of the split and of all draws.
        updates_per_epoch: length of a Lightning epoch, which means nothing else here.
        observations: keys of the observations to read; by default all.
        size: side in pixels to which images are resized.
        clip_actions: bring actions that are out of bounds to the bounds, instead of refusing them.
        cache: folder for memory-mapped copies of the data; None reads into memory.
        env: the environment of the data, if it is to be played in for evaluation; training needs
            it only where the data does not describe its actions.
        action_repeat, time_limit, env_kwargs: of `env`, as for `EnvDataModule`.

    Raises:
        UserError: a bad argument; later, whatever is wrong with the data.
    """

    #: Builds the environment; only there if `env` is given.
    make_env: Callable[[], gym.Env]

    def __init__(
        self,
        source: str | list[str],
        *,
        batch_size: int,
        validation: float,
        seed: int,
        updates_per_epoch: int,
        observations: list[str] | None,
        size: int | None,
        clip_actions: bool,
        cache: str | None,
        env: str | Callable[..., gym.Env] | None,
        action_repeat: int,
        time_limit: int | None,
        env_kwargs: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self._must_be_positive(
            batch_size=batch_size, updates_per_epoch=updates_per_epoch, size=size
        )
        if not 0 <= validation < 1:
            raise UserError(f"{type(self).__name__} needs validation in [0, 1), got {validation}")
        self.source = [source] if isinstance(source, str | os.PathLike) else list(source)
        self.batch_size, self.validation, self.seed = batch_size, validation, seed
        self.updates_per_epoch = updates_per_epoch
        self.observations, self.size = observations, size
        self.clip_actions, self.cache = clip_actions, cache
        self.env = env
        if env is not None:
            self.make_env = partial(
                make_env,
                env,
                action_repeat=action_repeat,
                size=size,
                time_limit=time_limit,
                **(env_kwargs or {}),
            )
        self.served = 0
        self._spec: Spec | None = None
        self._opened: Source | None = None
        self._episodes: Episodes | None = None
        self._split: tuple[np.ndarray, np.ndarray] | None = None
        self._sequences: D | None = None
        self._restored: list[dict[str, Any]] | None = None

    # The data

    @property
    def spec(self) -> Spec:
        """Observations and actions of the data; `env` settles what it does not describe."""
        return self._shown(self._recorded)

    @property
    def episodes(self) -> Episodes:
        """All episodes, read when first asked for."""
        if self._episodes is None:
            self._episodes = self._load(self._source)
            self._spec, self._opened = self._recorded, None  # a reader may hold a copy of the data
            for note in self._episodes.notes:
                rank_zero_warn(note)
        return self._episodes

    @property
    def train_episodes(self) -> np.ndarray:
        """Numbers of the training episodes, ascending."""
        return self._splits()[0]

    @property
    def val_episodes(self) -> np.ndarray:
        """Numbers of the validation episodes, ascending."""
        return self._splits()[1]

    def validation_episodes(self, count: int, max_steps: int) -> HeldOut | None:
        """At most `count` held-out episodes, evenly spread, each with at most `max_steps` actions.

        None if nothing is held out.
        """
        if not len(self.val_episodes):
            return None
        return self._beginnings(self.val_episodes, count, max_steps)

    def some_episodes(self, count: int, max_steps: int) -> HeldOut:
        """The same of training episodes, where nothing is held out."""
        held_out = self.validation_episodes(count, max_steps)
        return held_out or self._beginnings(self.train_episodes, count, max_steps)

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuses data that does not fit the model."""
        spec = getattr(getattr(self.trainer, "lightning_module", None), "spec", None)
        if isinstance(spec, Spec) and spec != self.spec:
            if dict(spec.obs) != dict(self.spec.obs):
                raise unlike(self._source.name, self.spec, "the model", spec)
            self._source.adopt(Spec(self._recorded.obs, spec.action), "the model")
            self._spec = self._source.spec

    def train_dataloader(self) -> ReplayLoader:
        """Endless draws, cut into epochs of `updates_per_epoch` batches."""
        return ReplayLoader(self.updates_per_epoch, self.next_batch)

    def val_dataloader(self) -> Any:
        """The held-out steps of this rank, once; nothing if none are held out."""
        if not len(self.val_episodes):
            return []
        return _Once(self._make_sequences(self._share(self.val_episodes)), self.batch_size)

    def teardown(self, stage: str) -> None:
        """Where the draws stand stays, to be saved or to go on from."""
        if self._sequences is not None:
            self._restored = self.state_dict()["ranks"]
        self._sequences = None

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly, of every rank: samplers, latents, generators.

        Called on all ranks by `Trainer.save_checkpoint`.
        """
        if self._sequences is None:
            return {"ranks": self._restored} if self._restored else {}
        mine = {
            "served": self.served,
            "sequences": self._sequences.state_dict(),
            "rng": rng_state(),
        }
        if self._world_size == 1:
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps this rank's part until the first batch is asked for."""
        ranks = state.get("ranks", [])
        if len(ranks) != self._world_size:
            raise UserError(
                f"the checkpoint is of {len(ranks)} processes, this run has {self._world_size}: "
                f"resume with devices={len(ranks)}"
            )
        if ranks and "sequences" not in ranks[0]:
            raise UserError(
                "the checkpoint is of a training in an environment, and this one is on recorded "
                "data: start from its weights (--from) instead of resuming it"
            )
        self._restored = ranks

    # Batches

    @abstractmethod
    def next_batch(self) -> dict[str, Any]:
        """Draws a batch (B, T, ...)."""

    @abstractmethod
    def _make_sequences(self, chosen: np.ndarray) -> D:
        """Sequences of some episodes, with the seed of this rank."""

    def _started(self) -> D:
        """The sequences of this rank: made, or restored from a checkpoint."""
        if self._sequences is None:
            self._sequences = self._make_sequences(self._share(self.train_episodes))
            noise = np.random.SeedSequence(self.seed, spawn_key=(self._rank, 0))
            if self._restored is None:
                torch.manual_seed(int(noise.generate_state(1)[0]))
            else:
                mine = self._restored[self._rank]
                self.served = mine["served"]
                self._sequences.load_state_dict(mine["sequences"])
                set_rng_state(mine["rng"])
                self._restored = None
        return self._sequences

    # What a subclass may do otherwise

    def _open(self) -> Source:
        """The recorded data."""
        return open_source(self.source, self.observations, self.size)

    def _load(self, source: Source) -> Episodes:
        """Its episodes."""
        return Episodes.load(source, self.clip_actions, self.cache)

    def _shown(self, recorded: Spec) -> Spec:
        """The spec of batches, from that of the data."""
        return recorded

    def _candidates(self) -> np.ndarray:
        """Numbers of the episodes that are split, ascending."""
        return np.arange(self.episodes.num_episodes)

    def _best(self, training: np.ndarray) -> np.ndarray:
        """Those of the training episodes to learn from."""
        return training

    def _timeline(self, chosen: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (B, T) of the steps of some episodes, at most so many, and their number (B,).

        Rows beyond the number are of no meaning.
        """
        length = np.minimum(self.episodes.lengths[chosen] + 1, most)
        time = np.minimum(np.arange(length.max()), length[:, None] - 1)
        return self.episodes.starts[chosen][:, None] + time, length

    def _gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """New arrays (B, T, ...) of rows (B, T)."""
        return {key: array[rows] for key, array in self.episodes.arrays.items()}

    def _beginnings(self, chosen: np.ndarray, count: int, max_steps: int) -> HeldOut:
        """At most `count` of some episodes, evenly spread, with at most `max_steps` actions."""
        spread = np.linspace(0, len(chosen) - 1, min(count, len(chosen))).astype(int)
        rows, length = self._timeline(chosen[spread], max_steps + 1)
        flat = self._gather(rows)
        padding = np.arange(rows.shape[1]) >= length[:, None]
        for value in flat.values():
            value[padding] = 0
        ends = flat["is_terminal"].any(1)
        return HeldOut(nest(flat), torch.from_numpy(length), torch.from_numpy(ends))

    # Where this rank stands

    def _share(self, chosen: np.ndarray) -> np.ndarray:
        """This rank's share of some episodes."""
        if self._world_size == 1 or len(chosen) < self._world_size:
            return chosen
        shuffled = np.random.default_rng(self.seed).permutation(chosen)
        return np.sort(shuffled[self._rank :: self._world_size])

    def _splits(self) -> tuple[np.ndarray, np.ndarray]:
        if self._split is None:
            episodes = self._candidates()
            held = round(self.validation * len(episodes))
            if self.validation and not 0 < held < len(episodes):
                raise UserError(
                    f"validation={self.validation} of the {len(episodes)} episodes of "
                    f"{self.episodes.name} is {held}: both sides need at least one"
                )
            shuffled = np.random.default_rng([self.seed, 1]).permutation(episodes)
            self._split = self._best(np.sort(shuffled[held:])), np.sort(shuffled[:held])
        return self._split

    @property
    def _recorded(self) -> Spec:
        """The spec of the data."""
        if self._spec is None:
            self._spec = self._source.spec
        return self._spec

    @property
    def _source(self) -> Source:
        """The opened data."""
        if self._opened is None:
            source = self._open()
            if self.env is not None and source.inferred:
                env = self.make_env()
                spec = Spec.from_spaces(env.observation_space, env.action_space)
                env.close()
                # An environment may show more than was recorded, such as a goal.
                if source.spec.obs.keys() <= spec.obs.keys():
                    spec = Spec({k: spec.obs[k] for k in source.spec.obs}, spec.action)
                source.adopt(spec, f"the environment {self.env}")
            self._opened = source
        return self._opened

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _must_be_positive(self, **arguments: int | None) -> None:
        for name, value in arguments.items():
            if value is not None and value < 1:
                raise UserError(f"{type(self).__name__} needs {name} >= 1, got {value}")


class _Once:
    """All of some sequences once, in order."""

    def __init__(self, sequences: Drawn, batch_size: int) -> None:
        self._sequences, self._batch_size = sequences, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._sequences.all(self._batch_size):
            yield nest(batch)
