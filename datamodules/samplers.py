"""Samplers: which rows of a store make up a batch of the replay.

`WindowSampler` draws windows of consecutive rows (Dreamer V3), `PieceSampler` fills each batch row
with pieces of episodes, one after the other, and goes on in the next batch where the last one ended
(Dreamer V2), `RecentSampler` draws windows of recent episodes more often (DIAMOND). A sampler hears
of every row that the replay adds or evicts, so that drawing needs no look at the rows themselves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from datamodules.errors import UserError
from datamodules.store import EpisodeStore


class Segment(NamedTuple):
    """Rows [start, start + length) of a stream; `begins` sets `is_first` at the first of them."""

    stream: int
    start: int
    length: int
    begins: bool = False


class Sampler(Protocol):
    """What the replay asks of a sampler."""

    name: ClassVar[str]

    @property
    def can_sample(self) -> bool:
        """Whether the rows held now are enough for a batch."""

    def added(self, stream: int, step: Mapping[str, np.ndarray]) -> None:
        """Hears of a row that was appended to a stream."""

    def evicted(self, stream: int) -> None:
        """Hears of a stream whose oldest rows have left."""

    def draw(self, batch_size: int, steps: int | None = None) -> list[list[Segment]]:
        """The segments of each row of a batch, `sequence_length` steps together.

        Only called where `can_sample`. Where only the first `steps` of each row will be read, a
        sampler may leave out the others.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain data, without the random generator and what the store itself tells."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state; the store is already back at that time."""


class WindowSampler:
    """Uniform draws, with replacement, from all windows held; they may cross episodes.

    With `fresh_first`, each stream is also cut into windows one after the other as it grows, and
    each of these is served once, before anything is drawn (the online queue of Dreamer V3).

    Args:
        store: whose rows are drawn.
        sequence_length: rows of a window, context rows included.
        rng: source of the draws.
        fresh_first: serve new windows once before drawing.
    """

    name: ClassVar[str] = "windows"

    def __init__(
        self,
        store: EpisodeStore,
        sequence_length: int,
        rng: np.random.Generator,
        fresh_first: bool = True,
    ) -> None:
        self.sequence_length, self.fresh_first = sequence_length, fresh_first
        self._store, self._rng = store, rng
        self._fresh: deque[tuple[int, int]] = deque()
        self._fresh_start = {s: store.bounds(s)[1] for s in store.stream_ids}

    @property
    def can_sample(self) -> bool:
        """Whether there is at least one window."""
        bounds = map(self._store.bounds, self._store.stream_ids)
        return any(end - first >= self.sequence_length for first, end in bounds)

    def added(self, stream: int, step: Mapping[str, np.ndarray]) -> None:
        """Queues the window that the row completes."""
        _, end = self._store.bounds(stream)
        start = self._fresh_start.setdefault(stream, 0)
        if end - start >= self.sequence_length:
            self._fresh_start[stream] = end
            if self.fresh_first:
                self._fresh.append((stream, start))

    def evicted(self, stream: int) -> None:
        """Forgets fresh windows that are no longer whole."""
        first, _ = self._store.bounds(stream)
        self._fresh_start[stream] = max(self._fresh_start[stream], first)
        self._fresh = deque(w for w in self._fresh if w[0] != stream or w[1] >= first)

    def draw(self, batch_size: int, steps: int | None = None) -> list[list[Segment]]:
        """One whole window for each row of a batch."""
        streams = self._store.stream_ids
        bounds = np.array([self._store.bounds(stream) for stream in streams])
        ends = np.cumsum(np.maximum(bounds[:, 1] - bounds[:, 0] - self.sequence_length + 1, 0))
        windows = [self._fresh.popleft() for _ in range(min(batch_size, len(self._fresh)))]
        drawn = self._rng.integers(ends[-1], size=batch_size - len(windows))
        which = np.searchsorted(ends, drawn, side="right")
        rows = bounds[which, 1] - self.sequence_length + 1 - (ends[which] - drawn)
        windows += [(streams[i], row) for i, row in zip(which.tolist(), rows.tolist(), strict=True)]
        return [[Segment(stream, start, self.sequence_length)] for stream, start in windows]

    def state_dict(self) -> dict[str, Any]:
        """The fresh windows, and where each stream's next one starts."""
        return {
            "fresh": [list(window) for window in self._fresh],
            "fresh_start": dict(self._fresh_start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        self._fresh = deque((stream, start) for stream, start in state["fresh"])
        self._fresh_start = dict(state["fresh_start"])


class _Piece(NamedTuple):
    """Rows [start, stop) of one episode, of which those before `next` were served."""

    stream: int
    start: int
    stop: int
    next: int


class PieceSampler:
    """Pieces of episodes, put together to an endless tape for each batch row (Dreamer V2).

    A piece is a random part of an episode that is drawn uniformly from the ended ones; while none
    has ended, from those that run and have enough steps (V2 then waits). Of N = sequence_length -
    context and L = piece_length, a piece has between min(N, L) and L steps. Shorter episodes are
    whole pieces (V2 drops them); of an episode that is partly evicted, what is left counts. With
    `prioritize_ends` the start is drawn from min(N, L) positions more, all of which mean the last
    possible one.

    A batch row takes the next N steps of its tape, so a piece may go on in the same row of the next
    batch. Before them stand the `context` steps that come before in the piece: there a model that
    stores its latents finds the state with which the row's last sequence ended. Where a piece has
    no such steps, its first step is repeated; it does not matter, for `is_first` is set at the
    first step of each piece, and there the model forgets what was before. (V2's code fills the rows
    of a batch from one tape; with its N = L = 50 each row is one piece and nothing is carried.)

    Args:
        store: whose rows are drawn; it needs the fields `is_first` and `is_last`.
        sequence_length: rows of a sequence, context rows included.
        rng: source of the draws.
        context: rows that repeat what the row before served.
        piece_length: longest piece L; N by default.
        prioritize_ends: make the ends of episodes as likely as their middles.

    Raises:
        UserError: a bad argument, or the store lacks the flags.
    """

    name: ClassVar[str] = "pieces"

    def __init__(
        self,
        store: EpisodeStore,
        sequence_length: int,
        rng: np.random.Generator,
        context: int = 0,
        piece_length: int | None = None,
        prioritize_ends: bool = True,
    ) -> None:
        if not 0 <= context < sequence_length:
            raise UserError(f"context is {context}: it must be in 0 .. {sequence_length - 1}")
        if piece_length is not None and piece_length < 1:
            raise UserError(f"piece_length is {piece_length}: it must be at least 1")
        missing = {"is_first", "is_last"} - store.fields.keys()
        if missing:
            raise UserError(
                f"pieces of episodes cannot be sampled from {store.path}, which lacks the fields "
                f"{sorted(missing)}: sample windows, or store them"
            )
        self.context, self.steps = context, sequence_length - context
        self.prioritize_ends = prioritize_ends
        self.max_length = piece_length or self.steps
        self.min_length = min(self.max_length, self.steps)
        self._store, self._rng = store, rng
        self._tapes: list[_Piece] = []
        self._starts = self._find_starts()

    @property
    def can_sample(self) -> bool:
        """Whether an episode has ended or has enough steps."""
        return any(len(starts) > 1 for starts in self._starts.values()) or bool(self._running())

    def added(self, stream: int, step: Mapping[str, np.ndarray]) -> None:
        """Notes where episodes begin and end."""
        _, end = self._store.bounds(stream)
        starts = self._starts.setdefault(stream, [end - 1])
        if step["is_first"] and starts[-1] < end - 1:
            starts.append(end - 1)
        if step["is_last"]:
            starts.append(end)

    def evicted(self, stream: int) -> None:
        """Forgets episodes that have left."""
        first, _ = self._store.bounds(stream)
        starts = self._starts[stream]
        del starts[: bisect_right(starts, first) - 1]
        starts[0] = first

    def draw(self, batch_size: int, steps: int | None = None) -> list[list[Segment]]:
        """The next stretch of each row's tape."""
        while len(self._tapes) < batch_size:
            self._tapes.append(self._draw_piece())
        return [self._advance(row) for row in range(batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """The piece that each row is in."""
        return {"tapes": [list(piece) for piece in self._tapes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        self._tapes = [_Piece(*piece) for piece in state["tapes"]]
        self._starts = self._find_starts()

    def _advance(self, row: int) -> list[Segment]:
        piece = self._tapes[row]
        first, _ = self._store.bounds(piece.stream)
        carried = min(self.context, piece.next - piece.start)
        if piece.next == piece.stop or piece.next - carried < first:
            piece, carried = self._draw_piece(), 0
        segments = [Segment(piece.stream, piece.start, 1, True)] * (self.context - carried)
        piece = piece._replace(next=piece.next - carried)
        needed = carried + self.steps
        while True:
            length = min(needed, piece.stop - piece.next)
            begins = piece.next == piece.start
            segments.append(Segment(piece.stream, piece.next, length, begins))
            piece = piece._replace(next=piece.next + length)
            needed -= length
            if not needed:
                self._tapes[row] = piece
                return segments
            piece = self._draw_piece()

    def _draw_piece(self) -> _Piece:
        stream, first, end = self._draw_episode()
        shortest = min(self.min_length, end - first)
        # Lengths differ so that not all rows begin their pieces in the same batch.
        length = min(self.max_length, end - first) - int(self._rng.integers(self.min_length))
        length = max(length, shortest)
        last = end - first - length
        positions = last + 1 + (self.min_length if self.prioritize_ends else 0)
        start = first + min(int(self._rng.integers(positions)), last)
        return _Piece(stream, start, start + length, start)

    def _draw_episode(self) -> tuple[int, int, int]:
        """Stream, first row and end of an episode."""
        ended = sum(len(starts) - 1 for starts in self._starts.values())
        if not ended:
            running = self._running()
            return running[int(self._rng.integers(len(running)))]
        index = int(self._rng.integers(ended))
        # In the order of the streams, for that is the same after resuming.
        for stream in sorted(self._starts):
            starts = self._starts[stream]
            if index < len(starts) - 1:
                break
            index -= len(starts) - 1
        return stream, starts[index], starts[index + 1]

    def _running(self) -> list[tuple[int, int, int]]:
        """Stream, first row and end of the running episodes that have enough steps."""
        running = [(s, self._starts[s][-1], self._store.bounds(s)[1]) for s in sorted(self._starts)]
        return [episode for episode in running if episode[2] - episode[1] >= self.min_length]

    def _find_starts(self) -> dict[int, list[int]]:
        """The first row held of each episode of each stream, with that of the running one last."""
        starts: dict[int, list[int]] = {stream: [] for stream in self._store.stream_ids}
        for episode in self._store.episodes():
            starts[episode.stream].append(episode.start)
        for stream, rows in starts.items():
            first, end = self._store.bounds(stream)
            ended = {"is_last": np.ones(1, bool)}
            if first < end:
                self._store.read(stream, end - 1, 1, ended)
            if ended["is_last"][0]:
                rows.append(end)
        return starts


class RecentSampler(WindowSampler):
    """Windows of episodes, of which the newest are the likeliest (DIAMOND).

    The episodes held are put in the order in which they began and cut into as many parts as there
    are `weights`, the last of which takes the remainder. A part is drawn by the weights, of the
    part an episode and of the episode a step, evenly. There the window begins, or at one of the
    `lead` rows before the episode, so that first steps, too, come where a model predicts from
    histories of `lead` steps; or at the last row from which it is whole. Windows cross the borders
    of episodes. With fewer episodes than parts, episodes are drawn by their lengths.

    Args:
        store: whose rows are drawn; it needs the field `is_first`.
        sequence_length: rows of a window.
        rng: source of the draws.
        weights: of the parts, from the oldest, with the sum 1.
        lead: see above.

    Raises:
        UserError: the weights are no probabilities, or the store lacks the flag.
    """

    name: ClassVar[str] = "recent"

    def __init__(
        self,
        store: EpisodeStore,
        sequence_length: int,
        rng: np.random.Generator,
        weights: Sequence[float] = (0.1, 0.1, 0.1, 0.7),
        lead: int = 4,
    ) -> None:
        if not weights or min(weights) < 0 or not np.isclose(sum(weights), 1):
            raise UserError(f"weights {list(weights)} must be at least 0 and have the sum 1")
        if "is_first" not in store.fields:
            raise UserError(
                f"recent episodes cannot be sampled from {store.path}, which lacks the field "
                "is_first: sample windows, or store it"
            )
        super().__init__(store, sequence_length, rng, fresh_first=False)
        self.weights, self.lead = np.array(weights), lead
        self._starts = self._find_starts()
        # By the steps of a window, until rows come or go.
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def added(self, stream: int, step: Mapping[str, np.ndarray]) -> None:
        """Notes where episodes begin."""
        super().added(stream, step)
        self._tables.clear()
        starts = self._starts.setdefault(stream, [])
        if step["is_first"] or not starts:
            starts.append(self._store.bounds(stream)[1] - 1)

    def evicted(self, stream: int) -> None:
        """Forgets episodes that have left."""
        super().evicted(stream)
        self._tables.clear()
        first, _ = self._store.bounds(stream)
        starts = self._starts[stream]
        del starts[: bisect_right(starts, first) - 1]
        starts[0] = first

    def draw(self, batch_size: int, steps: int | None = None) -> list[list[Segment]]:
        """One window of `steps` rows, by default a whole one, for each row of a batch."""
        length = steps or self.sequence_length
        if length not in self._tables:
            self._tables[length] = self._table(length)
        episodes, chances = self._tables[length]
        drawn = episodes[self._rng.choice(len(episodes), batch_size, p=chances)]
        streams, begins, stops, firsts, lasts = drawn.T
        starts = self._rng.integers(begins - self.lead, stops).clip(firsts, lasts)
        pairs = zip(streams.tolist(), starts.tolist(), strict=True)
        return [[Segment(stream, start, length)] for stream, start in pairs]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        super().load_state_dict(state)
        self._tables.clear()
        self._starts = self._find_starts()

    def _find_starts(self) -> dict[int, list[int]]:
        """The first row held of each episode of each stream."""
        starts: dict[int, list[int]] = {stream: [] for stream in self._store.stream_ids}
        for episode in self._store.episodes():
            starts[episode.stream].append(episode.start)
        return starts

    def _table(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Episodes (E, 5) in the order in which they began, and their chances (E,).

        Of each: stream, first row, end, and the first and last rows from which its stream has a
        window of `length` rows.
        """
        bounds = {stream: self._store.bounds(stream) for stream in sorted(self._starts)}
        episodes = [
            (begin, stream, stop, first, end - length)
            for stream, (first, end) in bounds.items()
            if end - first >= length
            for begin, stop in pairwise([*self._starts[stream], end])
        ]
        table = np.array(sorted(episodes))[:, [1, 0, 2, 3, 4]]
        count, parts = len(table), len(self.weights)
        if count < parts:
            chances = table[:, 2] - table[:, 1]
        else:
            sizes = np.full(parts, count // parts)
            sizes[-1] += count % parts
            chances = np.repeat(self.weights / sizes, sizes)
        return table, chances / chances.sum()
