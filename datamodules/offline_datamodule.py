"""`OfflineDataModule`: recorded data behind one LightningDataModule, without any environment.

`Trainer.fit(model, OfflineDataModule("D4RL/door/human-v2"))` is all a user writes. The data is read
once, checked, and lies in contiguous arrays; what is wrong with it is one sentence that names file
and episode.

What a batch looks like is the model's choice (`replay_sampling`). "windows" and "pieces" are those
of `EnvDataModule`, (B, T, ...) with T = context + sequence_length. "contexts" are for models of
returns-to-go, (B, K, ...) with K = sequence_length: `obs`, `action`, `reward` (of arriving, as
everywhere), `return_to_go` (B, K) float32, `timestep` (B, K) int64 and `mask` (B, K) bool. A
context is K consecutive steps with an action of one episode; it ends at a step drawn uniformly over
all such steps, and is padded with zeros on the left where the episode is younger.
`return_to_go[t]` is the undiscounted sum of what action t and all later ones of the episode earn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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
from datamodules.replay import Portion
from datamodules.sequences import Sampling, Sequences
from datamodules.sources.opening import open_source
from datamodules.sources.source import Source
from datamodules.spec import Spec
from datamodules.store import Field
from datamodules.write_back import WriteBack

SAMPLING = ("windows", "pieces", "contexts")
_CHUNK = 65536  # rows whose statistics are computed together


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


class OfflineDataModule(WriteBack, pl.LightningDataModule):
    """Sequences of recorded episodes.

    With several processes each draws from its share of the training episodes (from all of them,
    if there are fewer episodes than processes); statistics and returns are of all.

    Args:
        source: a Minari data set by its id (below MINARI_DATASETS_PATH or ~/.minari/datasets) or
            its folder, an HDF5 file in the manner of D4RL, a store, a run directory or its replay;
            or a list of these, which are joined.
        batch_size: sequences per batch.
        sequence_length: steps per sequence, without the model's context steps.
        top_fraction: train only on the episodes with the best returns, until they have this share
            of the actions (10% BC of the Decision Transformer paper: 0.1).
        validation: share of the episodes that is held out, in [0, 1).
        seed: of the split and of all draws.
        updates_per_epoch: length of a Lightning epoch, which means nothing else here.
        sampling: "windows", "pieces" or "contexts"; by default whatever the model names as its
            `replay_sampling`, else windows.
        piece_length: longest piece in steps; by default `sequence_length`.
        prioritize_ends: make the ends of episodes as likely as their middles; of pieces.
        observations: keys of the observations to read; by default all.
        size: side in pixels to which images are resized.
        clip_actions: bring actions that are out of bounds to the bounds, instead of refusing them.
        cache: folder for memory-mapped copies of the data, for sets that do not fit into memory or
            take long to read; None reads into memory.
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
        batch_size: int = 64,
        sequence_length: int = 20,
        top_fraction: float = 1.0,
        validation: float = 0.0,
        seed: int = 0,
        updates_per_epoch: int = 1000,
        sampling: Sampling | None = None,
        piece_length: int | None = None,
        prioritize_ends: bool = True,
        observations: list[str] | None = None,
        size: int | None = None,
        clip_actions: bool = False,
        cache: str | None = None,
        env: str | Callable[..., gym.Env] | None = None,
        action_repeat: int = 1,
        time_limit: int | None = None,
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        positive = {"batch_size": batch_size, "sequence_length": sequence_length}
        positive |= {"updates_per_epoch": updates_per_epoch}
        for name, value in {**positive, "piece_length": piece_length, "size": size}.items():
            if value is not None and value < 1:
                raise UserError(f"OfflineDataModule needs {name} >= 1, got {value}")
        if not 0 < top_fraction <= 1:
            raise UserError(f"OfflineDataModule needs top_fraction in (0, 1], got {top_fraction}")
        if not 0 <= validation < 1:
            raise UserError(f"OfflineDataModule needs validation in [0, 1), got {validation}")
        if sampling not in (None, *SAMPLING):
            raise UserError(
                f"OfflineDataModule has no sampling '{sampling}': choose {', '.join(SAMPLING)}"
            )
        self.source = [source] if isinstance(source, str | os.PathLike) else list(source)
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.top_fraction, self.validation, self.seed = top_fraction, validation, seed
        self.updates_per_epoch = updates_per_epoch
        self.sampling, self.piece_length = sampling, piece_length
        self.prioritize_ends = prioritize_ends
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
        self._sequences: Sequences | None = None
        self._restored: list[dict[str, Any]] | None = None

    # The data

    @property
    def spec(self) -> Spec:
        """Observations and actions of the data; `env` settles what it does not describe."""
        if self._spec is None:
            self._spec = self._source.spec
        return self._spec

    @property
    def episodes(self) -> Episodes:
        """All episodes, read when first asked for."""
        if self._episodes is None:
            self._episodes = Episodes.load(self._source, self.clip_actions, self.cache)
            self._spec, self._opened = self.spec, None  # a reader may hold a copy of the data
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

    @property
    def returns(self) -> Tensor:
        """(episodes,) float32, undiscounted returns of the training episodes."""
        return torch.from_numpy(self.episodes.returns[self.train_episodes]).float()

    @property
    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{key: (mean, std)}, float32, of each vector over the training steps with an action."""
        rows = np.concatenate(
            [
                np.arange(first, stop - 1)
                for first, stop in zip(
                    self.episodes.starts[self.train_episodes],
                    self.episodes.starts[self.train_episodes + 1],
                    strict=True,
                )
            ]
        )
        found = {}
        for key in self.spec.vectors:
            values = self.episodes.arrays[f"obs/{key}"]
            parts = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
            mean = sum(values[part].sum(0, dtype=np.float64) for part in parts) / len(rows)
            square = sum(np.square(values[part] - mean).sum(0) for part in parts) / len(rows)
            found[key] = (
                torch.from_numpy(np.asarray(mean, np.float32)),
                torch.from_numpy(np.sqrt(np.asarray(square)).astype(np.float32)),
            )
        return found

    def validation_episodes(self, count: int, max_steps: int) -> HeldOut | None:
        """At most `count` held-out episodes, evenly spread, each with at most `max_steps` actions.

        None if nothing is held out.
        """
        if not len(self.val_episodes):
            return None
        spread = np.linspace(0, len(self.val_episodes) - 1, min(count, len(self.val_episodes)))
        chosen = self.val_episodes[spread.astype(int)]
        whole = self.episodes.lengths[chosen] + 1
        length = np.minimum(whole, max_steps + 1)
        time = np.arange(length.max())
        rows = self.episodes.starts[chosen][:, None] + np.minimum(time, length[:, None] - 1)
        flat = {key: array[rows] for key, array in self.episodes.arrays.items()}
        padding = time >= length[:, None]
        for value in flat.values():
            value[padding] = 0
        ends = flat["is_terminal"].any(1)
        return HeldOut(nest(flat), torch.from_numpy(length), torch.from_numpy(ends))

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        """Refuses data that does not fit the model."""
        spec = getattr(getattr(self.trainer, "lightning_module", None), "spec", None)
        if isinstance(spec, Spec) and spec != self.spec:
            self._source.adopt(spec, "the model")
            self._spec = spec

    def train_dataloader(self) -> ReplayLoader:
        """Endless draws, cut into epochs of `updates_per_epoch` batches."""
        return ReplayLoader(self.updates_per_epoch, self.next_batch)

    def val_dataloader(self) -> Any:
        """The held-out steps of this rank, once; nothing if none are held out."""
        if not len(self.val_episodes):
            return []
        module = self._module
        return _Once(self._make_sequences(module, self._share(self.val_episodes)), self.batch_size)

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
        self.take_over(self._sequences)
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

    def next_batch(self) -> dict[str, Any]:
        """Draws a batch (B, T, ...)."""
        sequences = self._started()
        self.take_over(self._sequences)
        prepare = getattr(self._module, "prepare_batch", None)
        portion: Portion = prepare(self) if prepare else Portion()
        self.take_over(self._sequences)
        self.served += 1
        rows = portion.rows or self.batch_size
        return nest(sequences.sample(rows, portion.steps, portion.observations))

    @property
    def steps_seen(self) -> int:
        """Steps that this rank draws from; it never changes."""
        return self._started().num_steps

    def sweep(
        self, steps: int, observations: tuple[str, ...] | None = None
    ) -> Iterator[dict[str, Any]]:
        """All training steps of this rank, once, as batches (1, T, ...) with T up to `steps`.

        Args:
            steps: longest sequence.
            observations: keys of the observations to read; by default all.
        """
        for batch in self._started().sweep(steps, observations):
            yield nest(batch)
            self.take_over(self._sequences)

    def first_steps(self, limit: int) -> dict[str, Any]:
        """First steps of at most `limit` training episodes of this rank, a batch (N, 1, ...)."""
        return nest(self._started().first_steps(limit))

    def _started(self) -> Sequences:
        """The sequences of this rank: made, or restored from a checkpoint."""
        if self._sequences is None:
            self._sequences = self._make_sequences(self._module, self._share(self.train_episodes))
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

    def _make_sequences(self, module: Any, chosen: np.ndarray) -> Sequences:
        wanted: Any = getattr(module, "replay_sampling", "windows")
        sampling: Sampling = self.sampling or wanted
        context = 0 if sampling == "contexts" else getattr(module, "replay_context", 0)
        latents: dict[str, Any] = getattr(module, "latent_fields", dict)()
        return Sequences(
            self.episodes,
            chosen,
            self.sequence_length + context,
            np.random.SeedSequence(self.seed, spawn_key=(self._rank,)),
            sampling,
            context,
            self.piece_length,
            self.prioritize_ends,
            {key: Field(*field) for key, field in latents.items()},
        )

    def _share(self, chosen: np.ndarray) -> np.ndarray:
        """This rank's share of some episodes."""
        if self._world_size == 1 or len(chosen) < self._world_size:
            return chosen
        shuffled = np.random.default_rng(self.seed).permutation(chosen)
        return np.sort(shuffled[self._rank :: self._world_size])

    def _splits(self) -> tuple[np.ndarray, np.ndarray]:
        if self._split is None:
            total = self.episodes.num_episodes
            held = round(self.validation * total)
            if self.validation and not 0 < held < total:
                raise UserError(
                    f"validation={self.validation} of the {total} episodes of {self.episodes.name} "
                    f"is {held}: both sides need at least one"
                )
            shuffled = np.random.default_rng([self.seed, 1]).permutation(total)
            training = np.sort(shuffled[held:])
            self._split = self._best(training), np.sort(shuffled[:held])
        return self._split

    def _best(self, training: np.ndarray) -> np.ndarray:
        """The best episodes up to `top_fraction` of the actions, and at least one."""
        if self.top_fraction == 1:
            return training
        order = training[np.argsort(-self.episodes.returns[training], kind="stable")]
        actions = np.cumsum(self.episodes.lengths[order])
        count = int((actions <= self.top_fraction * actions[-1]).sum())
        return np.sort(order[: max(count, 1)])

    @property
    def _source(self) -> Source:
        """The opened data."""
        if self._opened is None:
            source = open_source(self.source, self.observations, self.size)
            if self.env is not None and source.inferred:
                env = self.make_env()
                spec = Spec.from_spaces(env.observation_space, env.action_space)
                env.close()
                if self.observations is not None:
                    kept = {k: a for k, a in spec.obs.items() if k in self.observations}
                    spec = Spec(kept, spec.action)
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


class _Once:
    """All steps once, in order."""

    def __init__(self, sequences: Sequences, batch_size: int) -> None:
        self._sequences, self._batch_size = sequences, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._sequences.all(self._batch_size):
            yield nest(batch)
