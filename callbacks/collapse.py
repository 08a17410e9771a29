"""`CollapseMonitor`: are the features still telling anything?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from callbacks.watching import WatchesClips
from datamodules.errors import UserError
from zoo.base import Encoder

COLLAPSED_STD = 0.1  # of the features' root mean square
GONE = 0.01  # of the same: nothing is left, whatever the predictor does
COPYING = 0.9  # prediction error over that of copying
CLIPS = 64
REMEDY = "raise what prevents it, lower the learning rate, or start anew from an earlier checkpoint"


class CollapseMonitor(WatchesClips):
    """Watches the features (`encode`) of held-out episodes, or of the batch if none are held out.

    - `eval/relative_std`: standard deviation of the features, over their root mean square: 0 where
      all observations look alike, at most 1;
    - `eval/relative_std_before`: the same before the model's last norm or projector, of models that
      have an `encode_before`;
    - `eval/rank_me`: exponential of the entropy of the singular values (Garrido et al., 2023);
    - `eval/covariance_rank`: (sum of eigenvalues)^2 / sum of their squares, of the covariance.

    A collapse is said once, with its remedy: when the deviation is below a tenth of the root mean
    square and the model's own `train/copy_ratio` is above 0.9, so that its predictor knows nothing
    that copying does not; or when the deviation is below a hundredth. Ranks are shown and not
    judged: what little is left of collapsed features may have a high one.

    Args:
        every_env_steps: how often, in frames.
        seed: of nothing here.
        at_start: measure the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 1000,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        self._said = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models without features."""
        if not isinstance(pl_module, Encoder):
            raise UserError(
                f"CollapseMonitor needs a model that is an Encoder, which "
                f"{type(pl_module).__name__} is not: remove it from the callbacks"
            )

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """The metrics of the class's description, and `time/collapse_s`."""
        started = time.perf_counter()
        clips = self.clips(trainer.datamodule, model, CLIPS)
        if clips is None:
            return {}
        x = model.encode(clips.obs).float()[clips.valid]
        metrics = {
            "eval/relative_std": relative_std(x),
            "eval/rank_me": rank_me(x),
            "eval/covariance_rank": covariance_rank(x),
        }
        if hasattr(model, "encode_before"):
            before = model.encode_before(clips.obs).float()[clips.valid]
            metrics["eval/relative_std_before"] = relative_std(before)
        copying = trainer.callback_metrics.get("train/copy_ratio")
        copies = copying is not None and copying > COPYING
        std = metrics["eval/relative_std"]
        if not self._said and len(x) > 1 and (std < GONE or (std < COLLAPSED_STD and copies)):
            self._said = True
            told = ""
            if copying is not None:
                told = f", and the predictor's error is {copying:.2f} of that of copying"
            rank_zero_warn(
                f"the features have collapsed: their standard deviation is {std:.3f} of their root "
                f"mean square{told}; {getattr(model, 'collapse_remedy', REMEDY)}"
            )
        return {**metrics, "time/collapse_s": time.perf_counter() - started}


def relative_std(x: Tensor) -> float:
    """Standard deviation of features (..., F) over the rows, by their root mean square."""
    x = x.flatten(0, -2)
    spread = x.var(0, correction=0).mean().sqrt()
    return float(spread / x.square().mean().sqrt().clamp(min=1e-12))


def rank_me(x: Tensor) -> float:
    """exp(-sum p log p) of the singular values of features (..., F), p their shares of the sum."""
    values = torch.linalg.svdvals(x.flatten(0, -2))
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def covariance_rank(x: Tensor) -> float:
    """(sum of eigenvalues)^2 / sum of their squares, of the covariance of features (..., F)."""
    x = x.flatten(0, -2)
    covariance = torch.atleast_2d(torch.cov(x.T, correction=0))
    return float(covariance.trace().square() / covariance.square().sum().clamp(min=1e-24))
