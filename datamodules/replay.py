"""Replay: a store with a capacity, a sampler of sequences, and latents that are written back.

A sequence is `sequence_length` rows, chosen by a sampler (see `datamodules.samplers`). Every row
has a step id, `stream << 40 | row`, by which its latents are found again. The latents live in
memory and in the checkpoint, for the model changes them all the time; the steps live in the store,
and a checkpoint only names its position there.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.samplers import Sampler, WindowSampler
from datamodules.store import EpisodeStore, Field

STREAM_SHIFT: Final = 40
# Positions whose chunk files stay on disk: of the checkpoint being written, of the one before it,
# and one more. Older checkpoints can still be loaded for their weights.
KEPT_POSITIONS: Final = 3
# A chunk is the unit of eviction: so many fit into the capacity at least.
_CHUNKS_IN_CAPACITY: Final = 8


class Portion(NamedTuple):
    """What a model wants of a batch; None is whatever the datamodule gives.

    Attributes:
        rows: number of sequences.
        steps: their first so many steps.
        observations: keys of the observations to read.
    """

    rows: int | None = None
    steps: int | None = None
    observations: tuple[str, ...] | None = None


class ReplayBuffer:
    """The last `capacity` steps of several streams, and batches of sequences drawn from them.

    Args:
        path: folder of the store; an existing store is continued.
        fields: arrays of one step by name.
        latent_fields: arrays that a model keeps with each step; zeros until given.
        capacity: steps held at most; whole chunks leave, oldest first.
        sequence_length: rows of a sequence, context rows included.
        seed: of the sampler.
        fresh_first: of the default sampler, `WindowSampler`.
        chunk_steps: steps per chunk file at most; an eighth of the capacity if that is less.
        sampler: makes another sampler of the store, the sequence length and a random generator.
        attributes: what a new store says of its data.

    Raises:
        UserError: a bad argument, or the existing store has other fields.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fields: Mapping[str, Field],
        latent_fields: Mapping[str, Field] | None = None,
        capacity: int = 1_000_000,
        sequence_length: int = 64,
        seed: np.random.SeedSequence | int = 0,
        fresh_first: bool = True,
        chunk_steps: int = 1024,
        sampler: Callable[[EpisodeStore, int, np.random.Generator], Sampler] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length is {sequence_length}: it must be at least 1")
        if capacity < sequence_length:
            raise UserError(
                f"the replay capacity {capacity} is smaller than one sequence of "
                f"{sequence_length} steps: raise capacity or shorten sequence_length"
            )
        self.capacity = capacity
        self.sequence_length = sequence_length
        self.num_sampled = 0
        if EpisodeStore.exists(path):
            self.store = EpisodeStore.open(path, writable=True)
            wanted = {
                key: Field(tuple(f.shape), np.dtype(f.dtype).name) for key, f in fields.items()
            }
            if self.store.fields != wanted:
                stored = self.store.fields
                self.store.close()
                raise UserError(
                    f"the replay in {path} holds the fields {_listed(stored)}, but "
                    f"{_listed(wanted)} are asked for: choose another folder or delete it"
                )
        else:
            chunk_steps = min(chunk_steps, max(1, capacity // _CHUNKS_IN_CAPACITY))
            self.store = EpisodeStore.create(path, fields, chunk_steps, attributes)
        self._latents = _Latents(latent_fields or {}, self.store.chunk_steps)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        make_sampler = sampler or partial(WindowSampler, fresh_first=fresh_first)
        self._sampler = make_sampler(self.store, sequence_length, self._rng)
        self._kept: deque[dict[str, int]] = deque(maxlen=KEPT_POSITIONS)

    @property
    def num_steps(self) -> int:
        """Steps held now."""
        return self.store.num_steps

    @property
    def num_appended(self) -> int:
        """Steps ever added."""
        return self.store.num_appended

    @property
    def can_sample(self) -> bool:
        """Whether the sampler finds enough steps."""
        return self._sampler.can_sample

    def close(self) -> None:
        """Commits the steps and lets go of the folder."""
        self.store.close()

    def add(
        self,
        stream: int,
        step: Mapping[str, np.ndarray],
        latents: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Appends one step to a stream, with its latents if there are any.

        Raises:
            UserError: a wrong key, shape or dtype or a non-finite value (see
                `EpisodeStore.append`), a full disk, or a capacity too small for so many streams.
        """
        if latents:
            self._latents.check(latents, ())
        self.store.append(stream, step)
        _, end = self.store.bounds(stream)
        self._latents.extend(stream, end - 1)
        if latents:
            self._latents.write(
                stream, end - 1, {k: np.asarray(v)[None] for k, v in latents.items()}
            )
        self._sampler.added(stream, step)
        if self.store.num_steps > self.capacity:
            self._evict()

    def sample(
        self,
        batch_size: int,
        steps: int | None = None,
        observations: tuple[str, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """Draws a batch of sequences.

        Args:
            batch_size: number of sequences B.
            steps: only the first so many steps of each, T; by default all.
            observations: only these of the fields `obs/<key>`; by default all.

        Returns:
            New arrays (B, T, ...): the fields, `step_id` (int64) and `latents/<key>`.

        Raises:
            UserError: too few steps are held yet.
        """
        if not self.can_sample:
            raise UserError(
                f"the replay holds {self.num_steps} steps, too few for one sequence of "
                f"{self.sequence_length} in any stream: collect more first (prefill)"
            )
        size = (batch_size, min(steps or self.sequence_length, self.sequence_length))
        batch = self._empty(size, observations)
        for b, segments in enumerate(self._sampler.draw(batch_size, size[1])):
            at = 0
            for stream, start, length, begins in segments:
                length = min(length, size[1] - at)
                if not length:
                    break
                out = {key: value[b, at : at + length] for key, value in batch.items()}
                self._read(stream, start, out)
                if begins:
                    out["is_first"][0] = True
                at += length
        self.num_sampled += batch["step_id"].size
        return batch

    def sweep(
        self, steps: int, observations: tuple[str, ...] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """All steps held now, once, in the order of the streams.

        Args:
            steps: longest sequence; none crosses from one stream to another.
            observations: as for `sample`.

        Yields:
            Arrays (1, T, ...), as `sample` gives them.
        """
        for stream in self.store.stream_ids:
            first, end = self.store.bounds(stream)
            for start in range(first, end, steps):
                batch = self._empty((1, min(steps, end - start)), observations)
                self._read(stream, start, {key: value[0] for key, value in batch.items()})
                yield batch

    def first_steps(self, limit: int) -> dict[str, np.ndarray]:
        """The first step of every episode held, or of `limit` of them spread evenly over all.

        Returns:
            Arrays (N, 1, ...), as `sample` gives them.
        """
        episodes = [e for e in self.store.episodes() if e.length > 1]
        chosen = np.linspace(0, len(episodes) - 1, min(limit, len(episodes))).astype(int)
        batch = self._empty((len(chosen), 1), None)
        for b, index in enumerate(chosen):
            episode = episodes[index]
            self._read(episode.stream, episode.start, {k: v[b] for k, v in batch.items()})
        return batch

    def write_back(self, step_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """Replaces latents of earlier samples; steps evicted meanwhile are left out.

        Where a step occurs more than once, its last latents stay.

        Args:
            step_ids: (B, T) int64, as `sample` gave them or a part of them.
            latents: (B, T, ...) by key, all latent fields.

        Raises:
            UserError: wrong keys or shapes, or ids that no sample had.
        """
        step_ids = np.asarray(step_ids)
        if step_ids.ndim != 2:
            raise UserError(
                f"step_ids of shape {step_ids.shape} must be (B, T): pass the ids of a sample as "
                "they are"
            )
        self._latents.check(latents, step_ids.shape)
        ids = step_ids.ravel()
        flat = {key: np.reshape(v, (len(ids), *np.shape(v)[2:])) for key, v in latents.items()}
        jumps = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
        for begin, stop in pairwise([0, *jumps, len(ids)] if len(ids) else []):
            step_id, length = int(ids[begin]), stop - begin
            stream, row = step_id >> STREAM_SHIFT, step_id & ((1 << STREAM_SHIFT) - 1)
            first, end = self.store.bounds(stream)
            if row + length > end:
                raise UserError(f"step {row + length - 1} of stream {stream} does not exist yet")
            gone = max(first - row, 0)
            if gone < length:
                kept = {key: value[begin + gone : stop] for key, value in flat.items()}
                self._latents.write(stream, row + gone, kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers, strings and tensors. Commits the steps to disk.

        The chunk files that this state and the two before it need stay on disk.
        """
        self.store.flush(durable=True)
        position = self.store.position()
        if position not in self._kept:
            self._kept.append(position)
            if len(self._kept) == KEPT_POSITIONS:
                self.store.delete_evicted(before=self._kept[0])
        return {
            "store": position,
            "chunks": self.store.chunk_files,
            "sequence_length": self.sequence_length,
            "num_sampled": self.num_sampled,
            "rng": json.dumps(self._rng.bit_generator.state),
            "sampling": self._sampler.name,
            "sampler": self._sampler.state_dict(),
            "latents": {
                stream: self._latents.dump(stream, *self.store.bounds(stream))
                for stream in self.store.stream_ids
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state: steps added since then are forgotten.

        Raises:
            UserError: the state is of another store, or has another sequence length, sampler or
                latents, or its chunk files are gone.
        """
        if state["sequence_length"] != self.sequence_length:
            raise UserError(
                f"the checkpoint has sequences of {state['sequence_length']} steps and the replay "
                f"of {self.sequence_length}: set sequence_length as it was"
            )
        if state["sampling"] != self._sampler.name:
            raise UserError(
                f"the checkpoint samples {state['sampling']} and the replay {self._sampler.name}: "
                f"set sampling to '{state['sampling']}' as it was"
            )
        for latents in state["latents"].values():
            self._latents.check(latents, None)
        self.store.rewind(state["store"])
        self.num_sampled = state["num_sampled"]
        self._rng.bit_generator.state = json.loads(state["rng"])
        self._sampler.load_state_dict(state["sampler"])
        self._latents.clear()
        for stream, latents in state["latents"].items():
            first, end = self.store.bounds(stream)
            for row in range(first, end, self.store.chunk_steps):
                self._latents.extend(stream, row)
            if end > first:
                self._latents.extend(stream, end - 1)
                self._latents.write(stream, first, {k: v.numpy() for k, v in latents.items()})
        self._kept.clear()
        self._kept.append(self.store.position())

    def _empty(
        self, size: tuple[int, int], observations: tuple[str, ...] | None
    ) -> dict[str, np.ndarray]:
        """Arrays for a batch of size (B, T)."""
        fields = dict(self.store.fields)
        if observations is not None:
            wanted = {f"obs/{key}" for key in observations}
            fields = {k: f for k, f in fields.items() if not k.startswith("obs/") or k in wanted}
        batch = {key: np.empty(size + f.shape, f.dtype) for key, f in fields.items()}
        batch["step_id"] = np.empty(size, np.int64)
        latents = self._latents.fields
        return batch | {
            f"latents/{k}": np.empty(size + f.shape, f.dtype) for k, f in latents.items()
        }

    def _read(self, stream: int, start: int, out: Mapping[str, np.ndarray]) -> None:
        """Fills arrays (T, ...) of `_empty` with consecutive rows of a stream."""
        length = len(out["step_id"])
        latents = {k.removeprefix("latents/"): v for k, v in out.items() if k[:8] == "latents/"}
        fields = {k: v for k, v in out.items() if k != "step_id" and k[:8] != "latents/"}
        self.store.read(stream, start, length, fields)
        self._latents.read(stream, start, latents)
        out["step_id"][:] = (stream << STREAM_SHIFT | start) + np.arange(length)

    def _evict(self) -> None:
        while self.store.num_steps > self.capacity:
            stream = self.store.evict_oldest()
            first, _ = self.store.bounds(stream)
            self._latents.drop(stream, first)
            self._sampler.evicted(stream)
        if not self._kept:  # no checkpoint will ever ask for the files
            self.store.flush()
            self.store.delete_evicted(before=self.store.position())
        if not self.can_sample:
            streams = len(self.store.stream_ids)
            needed = streams * (self.sequence_length + 2 * self.store.chunk_steps)
            raise UserError(
                f"the replay capacity {self.capacity} is too small for {streams} streams and "
                f"sequences of {self.sequence_length} steps, no whole sequence is left: raise it "
                f"to {needed} or more"
            )


class _Latents:
    """Arrays for each row of each stream, in blocks of rows, all in memory."""

    def __init__(self, fields: Mapping[str, Field], block_rows: int) -> None:
        self.fields = {k: Field(tuple(f.shape), np.dtype(f.dtype).name) for k, f in fields.items()}
        self._rows = block_rows
        self._blocks: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def check(self, latents: Mapping[str, Any], size: tuple[int, ...] | None) -> None:
        """Raises a UserError unless keys and shapes (after the leading `size`) are right."""
        if latents.keys() != self.fields.keys():
            raise UserError(f"the latents are {sorted(self.fields)}, but got {sorted(latents)}")
        for key, (shape, _) in self.fields.items():
            got = tuple(np.shape(latents[key]))
            lead = got[:1] if size is None else size
            if got != (*lead, *shape):
                raise UserError(f"the latent '{key}' has shape {got}, expected {(*lead, *shape)}")

    def extend(self, stream: int, row: int) -> None:
        """Makes room (zeros) for a row."""
        block = (stream, row // self._rows)
        if self.fields and block not in self._blocks:
            self._blocks[block] = {
                key: np.zeros((self._rows, *shape), dtype)
                for key, (shape, dtype) in self.fields.items()
            }

    def write(self, stream: int, row: int, latents: Mapping[str, np.ndarray]) -> None:
        """Stores rows from `row` on, (n, ...) by key."""
        for block, at, done, stop in self._parts(stream, row, latents):
            for key, value in latents.items():
                block[key][at : at + stop - done] = value[done:stop]

    def read(self, stream: int, row: int, out: Mapping[str, np.ndarray]) -> None:
        """Copies rows from `row` on into arrays (n, ...)."""
        for block, at, done, stop in self._parts(stream, row, out):
            for key, value in out.items():
                value[done:stop] = block[key][at : at + stop - done]

    def drop(self, stream: int, first: int) -> None:
        """Forgets blocks that end before a row."""
        number = first // self._rows - 1
        while self._blocks.pop((stream, number), None) is not None:
            number -= 1

    def clear(self) -> None:
        """Forgets everything."""
        self._blocks.clear()

    def dump(self, stream: int, first: int, end: int) -> dict[str, torch.Tensor]:
        """Rows [first, end) as tensors."""
        out = {key: np.empty((end - first, *f.shape), f.dtype) for key, f in self.fields.items()}
        self.read(stream, first, out)
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def _parts(
        self, stream: int, row: int, latents: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[dict[str, np.ndarray], int, int, int]]:
        """Cuts rows at the blocks: block, row within it, and the range of rows of `latents`."""
        length = len(next(iter(latents.values()))) if latents else 0
        done = 0
        while done < length:
            number, at = divmod(row + done, self._rows)
            stop = min(done + self._rows - at, length)
            yield self._blocks[stream, number], at, done, stop
            done = stop


def _listed(fields: Mapping[str, Field]) -> str:
    return ", ".join(f"{key} {f.dtype}{list(f.shape)}" for key, f in fields.items())
