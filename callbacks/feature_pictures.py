"""`FeaturePictures`: what an encoder's patches have in common, as colours."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from callbacks.counters import counters
from callbacks.logger import RunLogger
from callbacks.watching import WatchesClips
from datamodules.errors import UserError
from datamodules.sources.video_files import as_rgb

SIDE = 96  # pixels of each picture


class FeaturePictures(WatchesClips):
    """Makes GIFs of held-out clips (or of the batch) beside the principal components of patches.

    The first three components of the features of all patches (`feature_map`) are red, green and
    blue: patches of one colour are alike to the encoder. One column for each clip. In
    `videos/features-<updates>.gif` and in TensorBoard as `features`.

    Args:
        every_env_steps: how often, in frames.
        columns: clips.
        seed: of nothing here.
        at_start: picture the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        columns: int = 6,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        if columns < 1:
            raise UserError(f"FeaturePictures: columns is {columns}, must be at least 1")
        self.columns = columns

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models without features of patches."""
        if not hasattr(pl_module, "feature_map"):
            raise UserError(
                f"FeaturePictures needs a model with a feature_map, which "
                f"{type(pl_module).__name__} has not: remove it from the callbacks"
            )

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """Writes the picture; `time/feature_pictures_s`."""
        started = time.perf_counter()
        clips = self.clips(trainer.datamodule, model, self.columns)
        if clips is None:
            return {}
        frames = feature_frames(model, clips.obs)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_gif("features", frames, counters(model).axis)
        return {"time/feature_pictures_s": time.perf_counter() - started}


@torch.no_grad()
def feature_frames(model: Any, obs: dict[str, Tensor]) -> np.ndarray:
    """Clips of obs {key: (N, T, ...)} above their features: uint8 (T, 2 SIDE, N SIDE, 3)."""
    key = model.spec.images[0]
    tokens = model.feature_map({k: obs[k] for k in model.spec.images}).float()
    colours = principal_colours(tokens).cpu().numpy()
    images = as_rgb(obs[key].cpu().numpy())
    steps = images.shape[1]
    colours = colours.repeat(-(-steps // colours.shape[1]), 1)[:, :steps]
    rows = [
        np.stack([[_scaled(frame) for frame in clip] for clip in part])
        for part in (images, colours)
    ]
    both = np.concatenate(rows, 2)  # (N, T, 2 SIDE, SIDE, 3)
    return np.concatenate(list(both), 2)


def principal_colours(tokens: Tensor) -> Tensor:
    """The first three principal components of features (..., F), scaled to uint8 (..., 3).

    From the second to the 98th percentile of each is the whole range.
    """
    rows = tokens.flatten(0, -2)
    centred = rows - rows.mean(0)
    _, _, basis = torch.linalg.svd(centred, full_matrices=False)
    basis = basis[:3]
    signs = torch.sign(basis.gather(1, basis.abs().argmax(1, keepdim=True)))  # else it is a toss
    shown = centred @ (basis * signs).T
    ordered = shown.sort(0).values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.02, 0.98))
    scaled = 255 * (shown - low) / (high - low).clamp(min=1e-12)
    return scaled.clamp(0, 255).to(torch.uint8).reshape(*tokens.shape[:-1], -1)


def _scaled(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return np.asarray(picture)
