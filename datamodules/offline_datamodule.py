"""`OfflineDataModule`: recorded data behind one LightningDataModule, without any environment.

`Trainer.fit(model, OfflineDataModule("D4RL/door/human-v2"))` is all a user writes. The data is read
once, checked, and lies in contiguous arrays; what is wrong with it is one sentence that names file
and episode.

What a batch looks like is the model's choice (`replay_sampling`). "windows" and "pieces" are those
of `EnvDataModule`, (B, T, ...) with T = context + sequence_length. "contexts" are for models of
returns-to-go, (B, K, ...) with K = sequence_length: `obs`, `action`, `reward` (of arriving, as
everywhere), `return_to_go` (B, K) float32, `timestep` (B, K) int64 and `mask` (B, K) bool. A
context is up to K consecutive steps with an action of one episode, padded with zeros on the left;
it may lie across the ends of the episode, so that each step comes equally often.
`return_to_go[t]` is the undiscounted sum of what action t and all later ones of the episode earn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from datamodules.batches import nest
from datamodules.errors import UserError
from datamodules.recorded_datamodule import RecordedDataModule
from datamodules.replay import Portion
from datamodules.sequences import Sampling, Sequences
from datamodules.sources.source import Source
from datamodules.store import Field
from datamodules.write_back import WriteBack

SAMPLING = ("windows", "pieces", "contexts")
_CHUNK = 65536  # rows whose statistics are computed together


class OfflineDataModule(WriteBack, RecordedDataModule[Sequences]):
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
            `replay_sampling`, else windows; windows, too, for a model that wants "recent" episodes
            of an agent.
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
        super().__init__(
            source,
            batch_size=batch_size,
            validation=validation,
            seed=seed,
            updates_per_epoch=updates_per_epoch,
            observations=observations,
            size=size,
            clip_actions=clip_actions,
            cache=cache,
            env=env,
            action_repeat=action_repeat,
            time_limit=time_limit,
            env_kwargs=env_kwargs,
        )
        self._must_be_positive(sequence_length=sequence_length, piece_length=piece_length)
        if not 0 < top_fraction <= 1:
            raise UserError(f"OfflineDataModule needs top_fraction in (0, 1], got {top_fraction}")
        if sampling not in (None, *SAMPLING):
            raise UserError(
                f"OfflineDataModule has no sampling '{sampling}': choose {', '.join(SAMPLING)}"
            )
        self.sequence_length, self.top_fraction = sequence_length, top_fraction
        self.sampling, self.piece_length = sampling, piece_length
        self.prioritize_ends = prioritize_ends

    # The data

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

    def state_dict(self) -> dict[str, Any]:
        """With the latents that were written back last."""
        self.take_over(self._sequences)
        return super().state_dict()

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

    def _make_sequences(self, chosen: np.ndarray) -> Sequences:
        module = self._module
        wanted: Any = getattr(module, "replay_sampling", "windows")
        sampling: Sampling = self.sampling or ("windows" if wanted == "recent" else wanted)
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

    def _open(self) -> Source:
        source = super()._open()
        if source.spec.action is None:
            raise UserError(f"{source.name} is video without actions, which VideoDataModule reads")
        return source

    def _best(self, training: np.ndarray) -> np.ndarray:
        """The best episodes up to `top_fraction` of the actions, and at least one."""
        if self.top_fraction == 1:
            return training
        order = training[np.argsort(-self.episodes.returns[training], kind="stable")]
        actions = np.cumsum(self.episodes.lengths[order])
        count = int((actions <= self.top_fraction * actions[-1]).sum())
        return np.sort(order[: max(count, 1)])
