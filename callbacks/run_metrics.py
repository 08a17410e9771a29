"""`RunMetrics`: how the agent fares in training, and how fast the training is."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl

from callbacks.counters import Counters, counters
from callbacks.schedule import publish


class RunMetrics(pl.Callback):
    """Logs what the datamodule's `metrics()` says and the speed, every `log_every_n_steps` updates.

    That is `env/*` (returns and lengths of the last training episodes, counts), if the datamodule
    has it, and `time/updates_per_s` and `time/env_steps_per_s` since the last time.
    """

    def __init__(self) -> None:
        self._every = 0
        self._before = Counters(0, 0)
        self._at = 0.0

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._every = trainer.log_every_n_steps
        self._before, self._at = counters(pl_module), time.monotonic()

    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs if it is time."""
        if not self._every or int(pl_module.updates) % self._every:  # type: ignore[arg-type]
            return
        now, counts = time.monotonic(), counters(pl_module)
        if counts.updates == self._before.updates:
            return
        seconds = max(now - self._at, 1e-9)
        measure = getattr(trainer.datamodule, "metrics", None)
        publish(
            trainer,
            {
                **(measure() if measure is not None else {}),
                "time/updates_per_s": (counts.updates - self._before.updates) / seconds,
                "time/env_steps_per_s": (counts.env_steps - self._before.env_steps) / seconds,
            },
        )
        self._before, self._at = counts, now
