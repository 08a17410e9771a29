"""`Budget`: training ends at a number of environment steps or updates, or after a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl

from callbacks.clock import TrainingClock
from callbacks.counters import counters, counts_env_steps
from datamodules.errors import UserError

TIMERS = {"wall": time.monotonic, "processor": time.process_time}


class Budget(pl.Callback):
    """Stops at the first batch end at which one of the budgets is used up.

    A run that is resumed with its budget used up stops without another update. Without a budget
    the Trainer's own limits decide.

    Args:
        env_steps: frames the agent may cause.
        updates: optimizer steps.
        seconds: of training, over all resumed parts, without what callbacks spend on measuring.
            Schedules of learning rates do not know of it: they are counted in updates.
        clock: which seconds: of the clock on the "wall", or of the "processor" (all threads of
            this process), which is fairer on a CPU that is shared with others.
    """

    def __init__(
        self,
        env_steps: int | None = None,
        updates: int | None = None,
        seconds: float | None = None,
        clock: Literal["wall", "processor"] = "wall",
    ) -> None:
        for name, value in (("env_steps", env_steps), ("updates", updates)):
            if value is not None and value < 1:
                raise UserError(f"Budget: {name} is {value}, must be at least 1")
        if seconds is not None and seconds <= 0:
            raise UserError(f"Budget: seconds is {seconds}, must be positive")
        if clock not in TIMERS:
            raise UserError(f"Budget: clock is {clock!r}, must be one of {', '.join(TIMERS)}")
        self.env_steps = env_steps
        self.updates = updates
        self.seconds = seconds
        self.clock = TrainingClock(TIMERS[clock])

    def spent(self, pl_module: pl.LightningModule) -> bool:
        """Whether a budget is used up."""
        updates, env_steps = counters(pl_module)
        enough_steps = self.env_steps is not None and env_steps >= self.env_steps
        return enough_steps or (self.updates is not None and updates >= self.updates)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops a resumed run that has nothing left to do.

        Raises:
            UserError: only env steps are limited, and there are none on recorded data.
        """
        others = self.updates is not None or self.seconds is not None
        if self.env_steps is not None and not others and not counts_env_steps(trainer):
            raise UserError(
                f"Budget: env_steps is {self.env_steps}, but recorded data has none, so the "
                "training would not end: give a number of updates instead"
            )
        self.clock.start()
        self._stop_if_spent(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops when the budget is used up."""
        self._stop_if_spent(trainer, pl_module)

    def on_metrics(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Takes out what was spent on measuring."""
        self.clock.leave_out(metrics)

    def state_dict(self) -> dict[str, float]:
        """Seconds of training so far."""
        return {"seconds": self.clock.seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """The inverse of `state_dict`."""
        self.clock.trained = state_dict["seconds"]

    def _stop_if_spent(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        spent = self.spent(pl_module)
        if self.seconds is not None:
            late = self.clock.seconds() >= self.seconds
            # Clocks of ranks differ: all stop where the first one does.
            spent = trainer.strategy.reduce_boolean_decision(spent or late, all=False)
        if spent:
            trainer.should_stop = True
