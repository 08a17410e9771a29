"""What callbacks that look at clips have in common: held-out ones, or else the batch's."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from callbacks.schedule import EveryEnvSteps


class Clips(NamedTuple):
    """N clips, padded at their ends.

    Attributes:
        obs: {key: (N, T, ...)} on the model's device.
        valid: (N, T) bool, what is not padding.
    """

    obs: dict[str, Tensor]
    valid: Tensor


STEPS = 16  # of clips, where the data has single frames or no clips


class WatchesClips(EveryEnvSteps):
    """Measures on held-out clips, or on the batch if none are held out; needs no environment."""

    _batch: Any = None

    def lacks(self, data: Any) -> str:
        """Nothing."""
        return ""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures if it is time."""
        self._batch = batch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch = None

    def clips(self, data: Any, model: Any, most: int) -> Clips | None:
        """At most so many clips; None before the first batch, where none are held out."""
        if len(getattr(data, "val_episodes", [])):
            steps = getattr(data, "clip_length", 1)
            steps = steps if steps > 1 else STEPS  # a first frame alone tells little
            held_out = data.validation_episodes(most, steps - 1)
            obs, length = held_out.batch["obs"], held_out.length
        elif self._batch is not None:
            obs = {key: value[:most] for key, value in self._batch["obs"].items()}
            length = None
        else:
            return None
        obs = move_data_to_device(
            {key: obs[key] for key in obs if key in model.spec.obs}, model.device
        )
        count, steps = next(iter(obs.values())).shape[:2]
        if length is None:
            length = torch.full((count,), steps)
        valid = (torch.arange(steps) < length.cpu()[:, None]).to(model.device)
        return Clips(obs, valid)
