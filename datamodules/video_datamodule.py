"""`VideoDataModule`: clips of video, with actions where there are some.

`Trainer.fit(model, VideoDataModule("folder/of/videos"))` is all a user writes. A batch is
{"obs": {"image": (B, T, H, W, C) uint8, ...}, "is_first", "is_last", "is_terminal": (B, T) bool,
"step_id": (B, T) int64}, with `action` and `reward` as everywhere where the data has them and the
frames are consecutive. A clip lies within one episode (file) and is whole: it needs no mask.

What lies in a store (videos that were ingested, collected data, the replay of a run) stays on disk
and is gathered from there; other data is read into memory, or into a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from datamodules.batches import nest
from datamodules.clips import Clips, clip_counts, frame_offsets
from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.recorded_datamodule import RecordedDataModule
from datamodules.sources.opening import open_source
from datamodules.sources.source import Source
from datamodules.spec import ArraySpec, Spec


class VideoDataModule(RecordedDataModule[Clips]):
    """Clips of recorded episodes, drawn uniformly over all clips there are.

    Episodes that are shorter than a clip are left out, which is said. With several processes each
    draws from its share of the training episodes (from all of them, if there are fewer episodes
    than processes).

    Args:
        source: a video, a folder of videos or of folders of numbered images, a LeRobot data set, a
            store, a run directory or its replay, a Minari data set by its id or folder, or an HDF5
            file; or a list of these, which are joined.
        batch_size: clips per batch.
        clip_length: frames per clip.
        stride: every how-manieth frame to take.
        fps: frames per second to take of the recording's (the nearest ones), before `stride`; by
            default all.
        size: side in pixels to which images are resized. Images of a store that have another size
            are then read into memory or into the cache.
        crop: side in pixels of a square that is cut from the images then: anywhere in training,
            the same for all frames of a clip, and in the middle in validation.
        square: cut the frames of videos to their central square before they are resized; otherwise
            they are squeezed.
        stack_actions: with a stride, keep `action` as (B, T, stride, ...), what was done from each
            frame on, and `reward` summed over the steps that led to it.
        validation: share of the episodes that is held out, in [0, 1).
        seed: of the split and of all draws.
        updates_per_epoch: length of a Lightning epoch, which means nothing else here.
        observations: keys of the observations to read; by default all.
        clip_actions: bring actions that are out of bounds to the bounds, instead of refusing them.
        ingest: folder for the store that videos are decoded into, once; by default below the user's
            cache folder.
        errors: "stop" at the first video that cannot be read, or "skip" and count them.
        cache: folder for memory-mapped copies of data that is not in a store; None reads that into
            memory.
        env: the environment of the data, if it is to be played in for evaluation; training needs
            none.
        action_repeat, time_limit, env_kwargs: of `env`, as for `EnvDataModule`.

    Raises:
        UserError: a bad argument; later, whatever is wrong with the data.
    """

    def __init__(
        self,
        source: str | list[str],
        batch_size: int = 16,
        clip_length: int = 16,
        stride: int = 1,
        fps: float | None = None,
        size: int | None = None,
        crop: int | None = None,
        square: bool = False,
        stack_actions: bool = False,
        validation: float = 0.0,
        seed: int = 0,
        updates_per_epoch: int = 1000,
        observations: list[str] | None = None,
        clip_actions: bool = False,
        ingest: str | None = None,
        errors: Literal["stop", "skip"] = "stop",
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
        self._must_be_positive(clip_length=clip_length, stride=stride, crop=crop)
        if fps is not None and not 0 < fps < float("inf"):
            raise UserError(f"VideoDataModule needs a positive fps, got {fps}")
        if stack_actions and fps is not None:
            raise UserError("stack_actions keeps the actions of whole strides: leave fps out")
        if errors not in ("stop", "skip"):
            raise UserError(f"VideoDataModule has errors='{errors}': choose stop or skip")
        if crop is not None and env is not None:
            raise UserError(
                f"crop={crop} would show a model less than the environment does: with env, resize "
                "by size instead"
            )
        self.clip_length, self.stride, self.fps = clip_length, stride, fps
        self.crop, self.square, self.stack_actions = crop, square, stack_actions
        self.ingest, self.errors = ingest, errors
        self._step: np.ndarray

    def next_batch(self) -> dict[str, Any]:
        """Draws a batch (B, T, ...)."""
        clips = self._started()
        self.served += 1
        return nest(clips.sample(self.batch_size))

    def _open(self) -> Source:
        source = open_source(
            self.source,
            self.observations,
            self.size,
            crop=self.square,
            ingest=self.ingest,
            errors=self.errors,
        )
        images = source.spec.images
        if not images:
            raise UserError(
                f"{source.name} has no images, its observations are {source.spec}: use "
                "OfflineDataModule"
            )
        small = [
            key for key in images if self.crop and min(source.spec.obs[key].shape[:2]) < self.crop
        ]
        if small:
            height, width, _ = source.spec.obs[small[0]].shape
            raise UserError(
                f"crop={self.crop} does not fit into the images '{small[0]}' of {source.name}, "
                f"which are {height} x {width}: choose a smaller one, or resize by size first"
            )
        return source

    def _load(self, source: Source) -> Episodes:
        self._step = self.stride * self._frames_per_frame(source)
        episodes = Episodes.load(source, self.clip_actions, self.cache, in_place=True)
        frames = episodes.lengths + 1
        short = np.flatnonzero(clip_counts(frames, self.clip_length, self._step) == 0)
        needed = frame_offsets(self.clip_length, self._step.min())[-1] + 1
        if len(short) == len(frames):
            raise UserError(
                f"no episode of {source.name} has the {needed} frames of a clip, the longest has "
                f"{frames.max()}: shorten clip_length or stride"
            )
        if len(short):
            episodes.notes.append(
                f"{source.name}: {len(short)} of {len(frames)} episodes are shorter than a clip "
                f"and are left out, the first is {source.where(int(short[0]))}"
            )
        return episodes

    def _frames_per_frame(self, source: Source) -> np.ndarray:
        """(E,) recorded frames for each that is taken."""
        if self.fps is None:
            return np.ones(source.num_episodes)
        recorded = np.full(source.num_episodes, np.nan) if source.fps is None else source.fps
        unknown = np.flatnonzero(~np.isfinite(recorded))
        if len(unknown):
            raise UserError(
                f"fps={self.fps:g} needs the frame rate of the recording, which "
                f"{source.where(int(unknown[0]))} does not tell: leave fps out, and set stride"
            )
        return recorded / self.fps

    def _make_sequences(self, chosen: np.ndarray) -> Clips:
        seed = np.random.SeedSequence(self.seed, spawn_key=(self._rank,))
        episodes = self.episodes  # read first: then the steps are known
        return Clips(
            episodes, chosen, self.clip_length, seed, self._step, self.crop, self.stack_actions
        )

    def _shown(self, recorded: Spec) -> Spec:
        if self.crop is None:
            return recorded
        obs = {
            key: ArraySpec((self.crop, self.crop, a.shape[2]), a.dtype) if a.is_image else a
            for key, a in recorded.obs.items()
        }
        return Spec(obs, recorded.action)

    def _candidates(self) -> np.ndarray:
        frames = self.episodes.lengths + 1
        return np.flatnonzero(clip_counts(frames, self.clip_length, self._step))

    def _timeline(self, chosen: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        step = self._step[chosen]
        most = min(most, int((self.episodes.lengths[chosen] / step).max()) + 2)
        offsets = frame_offsets(most, step)
        there = offsets <= self.episodes.lengths[chosen][:, None]
        length = there.sum(1)
        rows = self.episodes.starts[chosen][:, None] + np.where(there, offsets, 0)
        return rows[:, : length.max()], length

    def _gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._make_sequences(self._candidates()).gather(rows)
