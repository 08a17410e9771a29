"""Batches of clips: frames of one episode each, evenly spaced in time, whole and never padded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.episodes import Episodes
from datamodules.errors import UserError


def frame_offsets(length: int, step: np.ndarray) -> np.ndarray:
    """How many frames after its first each frame of a clip is: (..., T) int64 of step (...)."""
    return np.rint(np.arange(length) * np.asarray(step)[..., None]).astype(np.int64)


def clip_counts(frames: np.ndarray, length: int, step: np.ndarray) -> np.ndarray:
    """At how many frames a clip can begin in episodes of so many frames (E,), at steps (E,)."""
    return np.maximum(frames - frame_offsets(length, step)[..., -1], 0)


class Clips:
    """Clips of some episodes, drawn with replacement, each as likely as any other.

    Args:
        episodes: the data.
        chosen: numbers of the episodes that take part.
        length: frames T of a clip.
        seed: of the draws.
        step: frames of the recording from one frame of a clip to the next, one number for each
            episode of the data; between whole frames the nearest is taken.
        crop: side in pixels of a square that is cut from the images.
        stack_actions: keep what was done between frames that are a whole number of steps apart.

    Raises:
        UserError: no episode is long enough.
    """

    def __init__(
        self,
        episodes: Episodes,
        chosen: Sequence[int] | np.ndarray,
        length: int,
        seed: np.random.SeedSequence | int,
        step: np.ndarray,
        crop: int | None = None,
        stack_actions: bool = False,
    ) -> None:
        self._arrays, self._starts = episodes.arrays, episodes.starts
        self.length, self.crop = length, crop
        self._chosen = np.asarray(chosen, np.int64)
        self._step = step[self._chosen]
        frames = episodes.lengths[self._chosen] + 1
        self._counts = clip_counts(frames, length, self._step)
        self._ends = np.cumsum(self._counts)
        if not self._counts.any():
            raise UserError(
                f"none of these episodes of {episodes.name} has the "
                f"{frame_offsets(length, self._step.min())[-1] + 1} frames of a clip: shorten "
                "clip_length or stride"
            )
        # Of all episodes, so that batches look alike on all ranks.
        same = (step == step[0]).all() and float(step[0]).is_integer()
        self._gap = int(step[0]) if same else 0  # 0: no whole number
        self._stacked = stack_actions
        self._rng = np.random.Generator(np.random.PCG64(seed))

    @property
    def num_clips(self) -> int:
        """Different clips that can be drawn."""
        return int(self._ends[-1])

    def sample(self, batch_size: int) -> dict[str, np.ndarray]:
        """Draws a batch, each clip cropped somewhere else; see `gather`."""
        drawn = self._rng.integers(self.num_clips, size=batch_size)
        place = np.searchsorted(self._ends, drawn, side="right")
        begin = drawn - (self._ends - self._counts)[place]
        corners = self._rng.random((batch_size, 2)) if self.crop else None
        return self.gather(self._rows(place, begin), corners)

    def all(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Clips one after the other, cropped in the middle; what is left of an episode is not."""
        hop = frame_offsets(self.length, self._step)[:, -1] + 1
        whole = -(-self._counts // hop)
        place = np.repeat(np.arange(len(whole)), whole)
        number = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
        begin = number * hop[place]
        for start in range(0, len(place), batch_size):
            some = slice(start, start + batch_size)
            yield self.gather(self._rows(place[some], begin[some]))

    def gather(self, rows: np.ndarray, corners: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """New arrays (B, T, ...) of rows (B, T) of the data.

        Args:
            rows: each row of it from one episode, in order.
            corners: (B, 2) in [0, 1), how far right and down each crop lies between the edges of
                the image; by default in the middle.

        Returns:
            `obs/<key>` and the flags of these frames, and `step_id` (their rows). Where frames are
            1 step apart also `action` and `reward`; stacked, where they are s steps apart, `action`
            (B, T, s, ...) of the s steps from each frame on, zeros from the end of the episode on,
            and `reward` summed over the s steps that led to it.
        """
        batch = {"step_id": rows}
        for key, array in self._arrays.items():
            if key in ("action", "reward"):
                if self._stacked and self._gap > 1:
                    batch[key] = self._between(rows, array, ahead=key == "action")
                elif self._gap == 1:
                    batch[key] = array.take(rows, 0)
            elif self.crop and array.ndim == 4 and array.dtype == np.uint8:
                batch[key] = self._cropped(array, rows, corners)
            else:
                batch[key] = array.take(rows, 0)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What goes on: the generator."""
        return {**self._identity, "rng": json.dumps(self._rng.bit_generator.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state.

        Raises:
            UserError: it is of other data or of other clips.
        """
        for name, now in self._identity.items():
            before = state.get(name)
            if before != now:
                raise UserError(
                    f"the checkpoint has the {name.replace('_', ' ')} {before}, this run {now}: "
                    "resume with the data and settings that it began with"
                )
        self._rng.bit_generator.state = json.loads(state["rng"])

    @property
    def _identity(self) -> dict[str, int | None]:
        return {"clip_length": self.length, "crop": self.crop, "number_of_clips": self.num_clips}

    def _rows(self, place: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Rows (B, T) of clips that begin at frames (B,) of chosen episodes (B,)."""
        first = self._starts[self._chosen[place]] + begin
        return first[:, None] + frame_offsets(self.length, self._step[place])

    def _between(self, rows: np.ndarray, array: np.ndarray, ahead: bool) -> np.ndarray:
        """The s steps from rows (B, T) on, (B, T, s, ...), or the sum of the s up to them."""
        episode = np.searchsorted(self._starts, rows, side="right")
        span = np.arange(self._gap)
        if ahead:
            last = self._starts[episode] - 1
            return array.take(np.minimum(rows[..., None] + span, last[..., None]), 0)
        first = self._starts[episode - 1]
        return array.take(np.maximum(rows[..., None] - span, first[..., None]), 0).sum(-1)

    def _cropped(
        self, array: np.ndarray, rows: np.ndarray, corners: np.ndarray | None
    ) -> np.ndarray:
        assert self.crop is not None
        play = np.array([array.shape[2], array.shape[1]]) - self.crop + 1
        offsets = (play * (0.5 if corners is None else corners)).astype(np.int64)
        offsets = np.broadcast_to(offsets, (len(rows), 2))
        out = np.empty((*rows.shape, self.crop, self.crop, array.shape[3]), np.uint8)
        for clip, frames, (x, y) in zip(out, rows, offsets.tolist(), strict=True):
            clip[:] = array.take(frames, 0)[:, y : y + self.crop, x : x + self.crop]
        return out
