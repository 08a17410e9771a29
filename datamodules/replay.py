"""Replay: a store with a capacity, a sampler of windows, and latents that are written back.

A window is `sequence_length` consecutive rows of one stream; it may cross episodes and chunks.
Every row has a step id, `stream << 40 | row`, by which its latents are found again. The latents
live in memory and in the checkpoint, for the model changes them all the time; the steps live in
the store, and a checkpoint only names its position there.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.store import EpisodeStore, Field

STREAM_SHIFT: Final = 40
# Positions whose chunk files stay on disk: of the checkpoint being written, of the one before it,
# and one more. Older checkpoints can still be loaded for their weights.
KEPT_POSITIONS: Final = 3
# A chunk is the unit of eviction: so many fit into the capacity at least.
_CHUNKS_IN_CAPACITY: Final = 8


class ReplayBuffer:
    """The last `capacity` steps of several streams, and batches of windows drawn from them.

    Windows are drawn uniformly, with replacement, from all windows held. With `fresh_first`, each
    stream is also cut into windows one after the other as it grows, and each of these is served
    once, before anything is drawn (the online queue of Dreamer V3).

    Args:
        path: folder of the store; an existing store is continued.
        fields: arrays of one step by name.
        latent_fields: arrays that a model keeps with each step; zeros until given.
        capacity: steps held at most; whole chunks leave, oldest first.
        sequence_length: rows of a window, context rows included.
        seed: of the sampler.
        fresh_first: serve new windows once before drawing.
        chunk_steps: steps per chunk file at most; an eighth of the capacity if that is less.

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
        self.fresh_first = fresh_first
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
            self.store = EpisodeStore.create(path, fields, chunk_steps)
        self._latents = _Latents(latent_fields or {}, self.store.chunk_steps)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._fresh: deque[tuple[int, int]] = deque()
        self._fresh_start = {s: self.store.bounds(s)[1] for s in self.store.stream_ids}
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
        """Whether there is at least one window."""
        bounds = map(self.store.bounds, self.store.stream_ids)
        return any(end - first >= self.sequence_length for first, end in bounds)

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
        start = self._fresh_start.setdefault(stream, 0)
        if end - start >= self.sequence_length:
            self._fresh_start[stream] = end
            if self.fresh_first:
                self._fresh.append((stream, start))
        if self.store.num_steps > self.capacity:
            self._evict()

    def sample(self, batch_size: int) -> dict[str, np.ndarray]:
        """Draws a batch of windows.

        Args:
            batch_size: number of windows B.

        Returns:
            New arrays (B, T, ...): the fields, `step_id` (int64) and `latents/<key>`.

        Raises:
            UserError: no window is held yet.
        """
        windows = self._windows(batch_size)
        size = (batch_size, self.sequence_length)
        batch = {key: np.empty(size + f.shape, f.dtype) for key, f in self.store.fields.items()}
        latents = {
            key: np.empty(size + f.shape, f.dtype) for key, f in self._latents.fields.items()
        }
        for b, (stream, start) in enumerate(windows):
            self.store.read(stream, start, size[1], {key: value[b] for key, value in batch.items()})
            self._latents.read(stream, start, {key: value[b] for key, value in latents.items()})
        ids = np.array([stream << STREAM_SHIFT | start for stream, start in windows], np.int64)
        batch["step_id"] = ids[:, None] + np.arange(size[1])
        self.num_sampled += batch_size * size[1]
        return batch | {f"latents/{key}": value for key, value in latents.items()}

    def write_back(self, step_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """Replaces latents of earlier samples; steps evicted meanwhile are left out.

        Args:
            step_ids: (B, T) int64, consecutive along T, as `sample` gave them or a part along T.
            latents: (B, T, ...) by key, all latent fields.

        Raises:
            UserError: wrong keys or shapes, or ids that no sample had.
        """
        step_ids = np.asarray(step_ids)
        if step_ids.ndim != 2 or not (np.diff(step_ids) == 1).all():
            raise UserError(
                f"step_ids of shape {step_ids.shape} must be (B, T), consecutive along T: pass "
                "the ids of a sample as they are"
            )
        self._latents.check(latents, step_ids.shape)
        latents = {key: np.asarray(value) for key, value in latents.items()}
        length = step_ids.shape[1]
        for b, step_id in enumerate(step_ids[:, 0].tolist() if length else ()):
            stream, row = step_id >> STREAM_SHIFT, step_id & ((1 << STREAM_SHIFT) - 1)
            first, end = self.store.bounds(stream)
            if row + length > end:
                raise UserError(f"step {row + length - 1} of stream {stream} does not exist yet")
            gone = max(first - row, 0)
            if gone < length:
                kept = {key: value[b, gone:] for key, value in latents.items()}
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
            "fresh": [list(window) for window in self._fresh],
            "fresh_start": dict(self._fresh_start),
            "latents": {
                stream: self._latents.dump(stream, *self.store.bounds(stream))
                for stream in self.store.stream_ids
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state: steps added since then are forgotten.

        Raises:
            UserError: the state is of another store, or has another sequence length or other
                latents, or its chunk files are gone.
        """
        if state["sequence_length"] != self.sequence_length:
            raise UserError(
                f"the checkpoint has sequences of {state['sequence_length']} steps and the replay "
                f"of {self.sequence_length}: set sequence_length as it was"
            )
        for latents in state["latents"].values():
            self._latents.check(latents, None)
        self.store.rewind(state["store"])
        self.num_sampled = state["num_sampled"]
        self._rng.bit_generator.state = json.loads(state["rng"])
        self._fresh = deque((stream, start) for stream, start in state["fresh"])
        self._fresh_start = dict(state["fresh_start"])
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

    def _windows(self, count: int) -> list[tuple[int, int]]:
        """Stream and first row of each window of a batch."""
        streams = self.store.stream_ids
        bounds = np.array([self.store.bounds(stream) for stream in streams]).reshape(-1, 2)
        ends = np.cumsum(np.maximum(bounds[:, 1] - bounds[:, 0] - self.sequence_length + 1, 0))
        if not len(ends) or not ends[-1]:
            raise UserError(
                f"the replay holds {self.num_steps} steps, too few for one sequence of "
                f"{self.sequence_length} in any stream: collect more first (prefill)"
            )
        windows = [self._fresh.popleft() for _ in range(min(count, len(self._fresh)))]
        drawn = self._rng.integers(ends[-1], size=count - len(windows))
        which = np.searchsorted(ends, drawn, side="right")
        rows = bounds[which, 1] - self.sequence_length + 1 - (ends[which] - drawn)
        windows += [(streams[i], row) for i, row in zip(which.tolist(), rows.tolist(), strict=True)]
        return windows

    def _evict(self) -> None:
        while self.store.num_steps > self.capacity:
            stream = self.store.evict_oldest()
            first, _ = self.store.bounds(stream)
            self._latents.drop(stream, first)
            self._fresh_start[stream] = max(self._fresh_start[stream], first)
            self._fresh = deque(w for w in self._fresh if w[0] != stream or w[1] >= first)
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
