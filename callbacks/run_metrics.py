"""`RunMetrics`: how the agent fares in training, and how fast the training is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from callbacks.clock import TrainingClock
from callbacks.counters import Counters, counters
from callbacks.schedule import publish


class RunMetrics(pl.Callback):
    """Logs what the datamodule's `metrics()` says and the speed, every `log_every_n_steps` updates.

    That is `env/*` (returns and lengths of the last training episodes, counts), if the datamodule
    has it, and `time/updates_per_s` and `time/env_steps_per_s` since the last time; and, with every
    evaluation, `time/wall_s`: the seconds of training so far, over all resumed parts. None of them
    counts the seconds that other callbacks measured (their `time/*_s`).
    """

    def __init__(self) -> None:
        self._every = 0
        self._clock = TrainingClock()
        self._logged = (Counters(0, 0), 0.0)  # counters and seconds of training when last logged

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._every = trainer.log_every_n_steps
        self._clock.start()
        self._logged = counters(pl_module), self._clock.trained

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
        before, since = self._logged
        now, seconds = counters(pl_module), self._clock.seconds()
        if now.updates == before.updates:
            return
        elapsed = max(seconds - since, 1e-9)
        measure = getattr(trainer.datamodule, "metrics", None)
        publish(
            trainer,
            {
                **(measure() if measure is not None else {}),
                "time/updates_per_s": (now.updates - before.updates) / elapsed,
                "time/env_steps_per_s": (now.env_steps - before.env_steps) / elapsed,
            },
        )
        self._logged = now, seconds

    def on_metrics(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Takes out what was spent on measuring, and adds the clock to each evaluation."""
        self._clock.leave_out(metrics)
        if "eval/return_mean" in metrics:
            publish(trainer, {"time/wall_s": self._clock.seconds()})

    def state_dict(self) -> dict[str, float]:
        """Seconds of training so far."""
        return {"trained": self._clock.seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """The inverse of `state_dict`."""
        self._clock.trained = state_dict["trained"]
