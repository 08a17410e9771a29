"""`ActionGrid`: what each latent action does, side by side."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.counters import counters
from callbacks.logger import RunLogger
from callbacks.pictures import grid_frames
from callbacks.watching import WatchesClips
from datamodules.errors import UserError
from zoo.base import Imaginer, LatentActions


class ActionGrid(WatchesClips):
    """Makes GIFs of dreams that hold one latent action each, from the same start.

    One row for each start (the end of a held-out clip, or of one of the batch), one column for each
    latent action; the first frame is the start as the model sees it. In
    `videos/actions-<updates>.gif` and in TensorBoard as `actions`.

    Args:
        every_env_steps: how often, in frames.
        starts: rows.
        horizon: frames that are dreamed.
        seed: of the dreams' noise.
        at_start: film the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        starts: int = 2,
        horizon: int = 12,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        for name, value in (("starts", starts), ("horizon", horizon)):
            if value < 1:
                raise UserError(f"ActionGrid: {name} is {value}, must be at least 1")
        self.starts, self.horizon = starts, horizon

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models that find no actions, or do not dream."""
        for protocol in (LatentActions, Imaginer):
            if not isinstance(pl_module, protocol):
                raise UserError(
                    f"ActionGrid needs a model of {protocol.__name__}, which "
                    f"{type(pl_module).__name__} is not: remove it from the callbacks"
                )

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """Writes the picture; `time/action_grid_s`."""
        started = time.perf_counter()
        clips = self.clips(trainer.datamodule, model, self.starts)
        if clips is None or model.num_latent_actions < 2:  # continuous ones cannot be listed
            return {}
        (key,) = model.spec.images
        frames = grid_frames(unroll(model, clips.obs[key], self.horizon).cpu().numpy())
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_gif("actions", frames, counters(model).axis)
        return {"time/action_grid_s": time.perf_counter() - started}


@torch.no_grad()
def unroll(model: Any, video: Tensor, horizon: int) -> Tensor:
    """Dreams (N, K, 1 + H, H, W, C) in [0, 1] that hold each of K latent actions.

    Args:
        model: what dreams.
        video: uint8 (N, T, H, W, C); the dreams begin from the last frame.
        horizon: H.
    """
    (key,), count = model.spec.images, model.num_latent_actions
    states = model.observe({"obs": {key: video}})
    start = {name: value[:, -1].repeat_interleave(count, 0) for name, value in states.items()}
    actions = torch.arange(count, device=video.device).repeat(len(video))
    dream = model.imagine(start, actions[:, None].expand(-1, horizon), horizon)
    states = {name: torch.cat([start[name][:, None], dream.state[name]], 1) for name in start}
    frames: Tensor = model.decode(states)[key].float()
    return frames.unflatten(0, (len(video), count))
