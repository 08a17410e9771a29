"""`Budget`: training ends at a number of environment steps or updates."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from callbacks.counters import counters, counts_env_steps
from datamodules.errors import UserError


class Budget(pl.Callback):
    """Stops at the first batch end at which one of the budgets is used up.

    A run that is resumed with its budget used up stops without another update. Without a budget
    the Trainer's own limits decide.

    Args:
        env_steps: frames the agent may cause.
        updates: optimizer steps.
    """

    def __init__(self, env_steps: int | None = None, updates: int | None = None) -> None:
        for name, value in (("env_steps", env_steps), ("updates", updates)):
            if value is not None and value < 1:
                raise UserError(f"Budget: {name} is {value}, must be at least 1")
        self.env_steps = env_steps
        self.updates = updates

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
        if self.env_steps is not None and self.updates is None and not counts_env_steps(trainer):
            raise UserError(
                f"Budget: env_steps is {self.env_steps}, but recorded data has none, so the "
                "training would not end: give a number of updates instead"
            )
        if self.spent(pl_module):
            trainer.should_stop = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stops when the budget is used up."""
        if self.spent(pl_module):
            trainer.should_stop = True
