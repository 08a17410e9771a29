"""Batches of sequences drawn from recorded episodes: windows, pieces, or contexts.

The chosen episodes form one stream of N steps. A batch is drawn as positions (B, T) in that stream
and gathered by one indexing per key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.samplers import PieceSampler
from datamodules.store import Episode, Field

Sampling = Literal["windows", "pieces", "contexts"]


class Sequences:
    """Sequences of some episodes, drawn with replacement.

    - windows: T consecutive steps from anywhere in the stream; they may cross episodes.
    - pieces: stretches of episodes that go on from batch to batch (see `PieceSampler`).
    - contexts: up to T consecutive steps with an action of one episode, padded with zeros on the
      left. They lie anywhere, also across the ends of the episode, which cut them, so that each
      step comes equally often: it is in T of them.

    Args:
        episodes: the data.
        chosen: numbers of the episodes that take part, in the order of the stream.
        length: steps T of a sequence, context steps of windows and pieces included.
        seed: of the draws.
        sampling: see above.
        context: how many steps at the front of pieces repeat earlier ones.
        piece_length, prioritize_ends: see `PieceSampler`.
        latent_fields: arrays that a model keeps with each step; zeros until given.

    Raises:
        UserError: too few steps for one sequence.
    """

    def __init__(
        self,
        episodes: Episodes,
        chosen: Sequence[int] | np.ndarray,
        length: int,
        seed: np.random.SeedSequence | int = 0,
        sampling: Sampling = "windows",
        context: int = 0,
        piece_length: int | None = None,
        prioritize_ends: bool = True,
        latent_fields: Mapping[str, Field] | None = None,
    ) -> None:
        self._arrays = episodes.arrays
        self.length, self.sampling = length, sampling
        chosen = np.asarray(chosen, np.int64)
        first, stop = episodes.starts[chosen], episodes.starts[chosen + 1]
        lengths = stop - first
        #: (E + 1,) first position of each chosen episode, and N
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        # Row of each position; where the first episodes are chosen it is the position itself.
        shift = np.repeat(first - self.starts[:-1], lengths)
        self._rows = np.arange(self.num_steps) + shift if shift.any() else None
        if sampling != "contexts" and self.num_steps < length:
            raise UserError(
                f"{episodes.name} has {self.num_steps} steps here, too few for one sequence of "
                f"{length}: shorten sequence_length or add data"
            )
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._latents = {
            key: np.zeros((self.num_steps, *f.shape), f.dtype)
            for key, f in (latent_fields or {}).items()
        }
        if sampling == "contexts":
            self._prepare_contexts(lengths)
        elif sampling == "pieces":
            self._pieces = PieceSampler(
                _Stream(episodes.name, self.starts),  # type: ignore[arg-type]
                length,
                self._rng,
                context,
                piece_length,
                prioritize_ends,
            )

    @property
    def num_steps(self) -> int:
        """Steps N of the stream."""
        return int(self.starts[-1])

    def sample(
        self,
        batch_size: int,
        steps: int | None = None,
        observations: tuple[str, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """Draws a batch.

        Args:
            batch_size: number of sequences B.
            steps: only the first so many steps of each; by default all.
            observations: only these of the observations; by default all.

        Returns:
            Arrays (B, T, ...): the fields of a step, `step_id` (int64; positions in the stream) and
            `latents/<key>`; for contexts see `contexts`.
        """
        if self.sampling == "contexts":
            drawn = self._rng.integers(self._windows[-1], size=batch_size)
            return self.contexts(*self._window(drawn), observations)
        begins = None
        if self.sampling == "windows":
            starts = self._rng.integers(self.num_steps - self.length + 1, size=batch_size)
            positions = starts[:, None] + np.arange(self.length)
        else:
            positions, begins = self._draw_pieces(batch_size)
        positions = positions[:, :steps]
        batch = self._gather(positions, observations)
        if begins is not None:
            batch["is_first"] |= begins[:, :steps]
        return batch

    def contexts(
        self,
        ends: np.ndarray,
        steps: np.ndarray | int | None = None,
        observations: tuple[str, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """Contexts that end at positions (B,), which have an action.

        Args:
            ends: see above.
            steps: how many steps (B,) they have at most, up to T; by default T.
            observations: only these of the observations; by default all.

        Returns:
            Arrays (B, T, ...): `obs/<key>`, `action`, `reward`, `return_to_go` (float32, the
            undiscounted sum of what action t and all later ones of the episode earn), `timestep`
            (int64, from 0 at the first step of the episode) and `mask` (bool, False where padded).
        """
        back = np.arange(1 - self.length, 1)
        most = np.minimum(self._timestep[ends] + 1, self.length if steps is None else steps)
        mask = back > -most[:, None]
        positions = np.where(mask, ends[:, None] + back, ends[:, None])
        keys = [key for key in self._arrays if not key.startswith("is_")]
        batch = self._gather(positions, observations, keys)
        batch["return_to_go"] = self._return_to_go[positions]
        batch["timestep"] = self._timestep[positions]
        padding = ~mask
        if padding.any():
            for value in batch.values():
                value[padding] = 0
        return {**batch, "mask": mask}

    def all(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every step once, but for an incomplete window at the end of the stream; in order."""
        if self.sampling == "contexts":
            left = np.repeat(np.diff(self.starts) - 2, np.diff(self.starts)) - self._timestep
            ends = np.flatnonzero((left >= 0) & (left % self.length == 0))
        else:
            ends = np.arange(self.length - 1, self.num_steps, self.length)
        for begin in range(0, len(ends), batch_size):
            some = ends[begin : begin + batch_size]
            if self.sampling == "contexts":
                yield self.contexts(some)
            else:
                yield self._gather(some[:, None] + np.arange(1 - self.length, 1), None)

    def sweep(
        self, steps: int, observations: tuple[str, ...] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """All steps, once, as batches (1, T, ...) with T up to `steps`."""
        for start in range(0, self.num_steps, steps):
            positions = np.arange(start, min(start + steps, self.num_steps))
            yield self._gather(positions[None], observations)

    def first_steps(self, limit: int) -> dict[str, np.ndarray]:
        """First steps of at most `limit` episodes, evenly spread, a batch (N, 1, ...)."""
        total = len(self.starts) - 1
        chosen = np.linspace(0, total - 1, min(limit, total)).astype(int)
        return self._gather(self.starts[chosen][:, None], None)

    def write_back(self, step_ids: np.ndarray, latents: Mapping[str, np.ndarray]) -> None:
        """Replaces the latents (B, T, ...) of steps (B, T)."""
        for key, value in latents.items():
            self._latents[key][step_ids] = value

    def state_dict(self) -> dict[str, Any]:
        """What goes on: the generator, the pieces and the latents."""
        return {
            "sampling": self.sampling,
            "length": self.length,
            "num_steps": self.num_steps,
            "rng": json.dumps(self._rng.bit_generator.state),
            "pieces": self._pieces.state_dict() if self.sampling == "pieces" else {},
            "latents": {key: torch.from_numpy(v.copy()) for key, v in self._latents.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            UserError: it is of other data or of other sequences.
        """
        for name, now in (
            ("sampling", self.sampling),
            ("length", self.length),
            ("num_steps", self.num_steps),
        ):
            if state[name] != now:
                what = {"length": "sequence_length", "num_steps": "number of steps of the data"}
                raise UserError(
                    f"the checkpoint has the {what.get(name, name)} {state[name]}, this run {now}: "
                    "resume with the data and settings that it began with"
                )
        self._rng.bit_generator.state = json.loads(state["rng"])
        if self.sampling == "pieces":
            self._pieces.load_state_dict(state["pieces"])
        self._latents = {key: value.numpy().copy() for key, value in state["latents"].items()}

    def _gather(
        self,
        positions: np.ndarray,
        observations: tuple[str, ...] | None,
        keys: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """New arrays (B, T, ...) at positions (B, T)."""
        rows = positions if self._rows is None else self._rows[positions]
        wanted = None if observations is None else {f"obs/{key}" for key in observations}
        batch = {
            key: self._arrays[key].take(rows, 0)
            for key in keys or self._arrays
            if wanted is None or not key.startswith("obs/") or key in wanted
        }
        if keys is None:
            batch["step_id"] = positions
            batch |= {f"latents/{k}": value[positions] for k, value in self._latents.items()}
        return batch

    def _prepare_contexts(self, lengths: np.ndarray) -> None:
        """Finds the steps with an action, the time of each step and its return-to-go."""
        begin = np.repeat(self.starts[:-1], lengths)
        self._timestep = np.arange(self.num_steps) - begin
        last = np.repeat(self.starts[1:] - 1, lengths)
        # How many windows of T steps there are up to the end of each episode, which has one from
        # each step, T - 1 before it to its last with an action.
        acting = lengths - 1
        self._windows = np.cumsum(np.where(acting > 0, acting + self.length - 1, 0))
        reward = self._arrays["reward"]
        reward = reward[: self.num_steps] if self._rows is None else reward[self._rows]
        # In float64, for the sums run over all episodes.
        earned = np.cumsum(reward, dtype=np.float64)
        self._return_to_go = (earned[last] - earned).astype(np.float32)

    def _window(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Last positions (B,) of windows, and how many steps (B,) they have until there.

        Args:
            number: (B,) below the number of all windows.
        """
        episode = np.searchsorted(self._windows, number, "right")
        left = self._windows[episode] - 1 - number  # windows of the episode that begin later
        last = self.starts[episode + 1] - 2
        steps = np.minimum(left + 1, self.length)
        return last - left - 1 + steps, steps

    def _draw_pieces(self, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (B, T), and where a piece begins (B, T) bool."""
        positions = np.empty((batch_size, self.length), np.int64)
        begins = np.zeros((batch_size, self.length), bool)
        for row, segments in enumerate(self._pieces.draw(batch_size)):
            at = 0
            for _, start, length, begin in segments:
                positions[row, at : at + length] = np.arange(start, start + length)
                begins[row, at] |= begin
                at += length
        return positions, begins


class _Stream:
    """The chosen episodes as `PieceSampler` sees a store: one stream that has ended."""

    def __init__(self, name: str, starts: np.ndarray) -> None:
        self.path, self._starts = name, starts.tolist()
        self.fields = {"is_first": Field((), "bool"), "is_last": Field((), "bool")}
        self.stream_ids = [0]

    def bounds(self, stream: int) -> tuple[int, int]:
        return 0, self._starts[-1]

    def episodes(self) -> list[Episode]:
        pairs = zip(self._starts, self._starts[1:], strict=False)
        return [Episode(0, start, stop - start, True) for start, stop in pairs]

    def read(self, stream: int, start: int, length: int, out: dict[str, np.ndarray]) -> None:
        """Only asked whether the last step ends an episode, which it does."""
        out["is_last"][:] = True
