"""`RunCheckpoint`: a run that can be killed at any moment, and the best weights it had.

In the run's folder (the Trainer's `default_root_dir`):

- `checkpoints/last.ckpt` resumes exactly. It is written at batch ends, atomically, after the first
  evaluation, at intervals, at the end and when a signal asks to stop; never in a NaN state and
  never because of an exception.
- `checkpoints/best.ckpt` has the weights of the best evaluation, for evaluation and fine-tuning.
- `done.json` says that the run is complete: `env_steps`, `updates`, `best`, `wall_s`.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from callbacks.counters import counters
from callbacks.files import AtomicCheckpointIO, atomic_file
from callbacks.finite import check_loss, check_parameters, total_loss
from callbacks.logger import RunLogger
from callbacks.signals import StopSignals
from datamodules.errors import UserError


class RunCheckpoint(Checkpoint):
    """Saves `last.ckpt`, `best.ckpt` and `done.json`, and stops in order on SIGTERM and Ctrl-C.

    The first signal lets the update end (or a step of collecting), saves and stops;
    `interrupted_by_signal` then holds its number. A second one raises KeyboardInterrupt at once. A
    loss that is not finite ends the run with the last good checkpoint in place; accelerators look
    at it when Lightning logs (every `log_every_n_steps` updates) and before they save, because
    looking waits for the device.

    Lightning runs it after all other callbacks, so a checkpoint has their newest states.

    Args:
        every_updates: save at multiples of this many updates.
        every_minutes: save when so many minutes have passed since the last time, also in the middle
            of collecting.
        monitor: the metric of `best.ckpt`; higher is better, and of equal ones the later.
    """

    def __init__(
        self,
        every_updates: int | None = None,
        every_minutes: float | None = 10.0,
        monitor: str = "eval/return_mean",
    ) -> None:
        super().__init__()
        for name, value in (("every_updates", every_updates), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"RunCheckpoint: {name} is {value}, must be positive")
        self.every_updates = every_updates
        self.every_minutes = every_minutes
        self.monitor = monitor
        self.best: float | None = None
        self.interrupted_by_signal: int | None = None
        self._signals = StopSignals()
        self._logger: RunLogger | None = None
        self._run = Path()
        self._updates = -1  # of the last batch
        self._saved_updates: int | None = None
        self._saved_at = 0.0
        self._wall_before = 0.0
        self._started_at = 0.0
        self._trained = False
        self._fast_dev_run = False
        self._check_every = 1

    @property
    def last_path(self) -> Path:
        """Where `last.ckpt` is."""
        return self._run / "checkpoints" / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Where `best.ckpt` is."""
        return self._run / "checkpoints" / "best.ckpt"

    @property
    def done_path(self) -> Path:
        """Where `done.json` is."""
        return self._run / "done.json"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connects the logger and makes Lightning's own writing atomic."""
        if stage != "fit":
            return
        self._run = Path(trainer.default_root_dir)
        options: Any = trainer
        self._fast_dev_run = bool(options.fast_dev_run)
        self._check_every = max(options.log_every_n_steps, 1)
        self._logger = next((x for x in trainer.loggers if isinstance(x, RunLogger)), None)
        if self._logger is not None:
            self._logger.attach(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over: from here on there is something to save."""
        self.interrupted_by_signal = None
        self._signals.install()
        if trainer.received_sigterm:  # it came after Lightning installed its handler, before ours
            self._signals.received = int(signal.SIGTERM)
            trainer._signal_connector.received_sigterm = False
        self._started_at = self._saved_at = time.monotonic()
        self._updates = counters(pl_module).updates
        self._trained = False
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "collecting"):
            data.collecting = partial(self._while_collecting, trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A run that goes on is not done."""
        if not self._trained:
            self._trained = True
            if trainer.is_global_zero:
                self.done_path.unlink(missing_ok=True)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Looks at the loss, at the signals and at the clock."""
        updates = counters(pl_module).updates
        loss = total_loss(outputs)
        if loss is not None and (loss.device.type == "cpu" or updates % self._check_every == 0):
            check_loss(loss, pl_module, self._kept())
        if updates == self._updates:
            return  # gradients are being accumulated, and a checkpoint does not hold them
        self._updates = updates
        interrupted = self._signals.received is not None
        if trainer.strategy.reduce_boolean_decision(interrupted or self._overdue(), all=False):
            due = True
            if trainer.strategy.reduce_boolean_decision(interrupted, all=False):
                self.interrupted_by_signal = self._signals.received or int(signal.SIGTERM)
                trainer.should_stop = True
        else:
            due = self.every_updates is not None and updates % self.every_updates == 0
        if due or trainer.should_stop or _at_limit(trainer):
            if loss is not None:
                check_loss(loss, pl_module, self._kept())
            if self._logger is not None:
                self._logger.write_early()
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves what is not saved yet and says that the run is done, unless it was interrupted."""
        if self._saved_updates != counters(pl_module).updates:
            self.save(trainer, pl_module)
        if self.interrupted_by_signal is None and not self._fast_dev_run:
            self._write_done(trainer, pl_module)
        self._signals.restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the signals back; `last.ckpt` stays as it was, for the state may be half-made."""
        self._signals.restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._signals.restore()

    def on_metrics(self, trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        """Keeps the weights if the monitored metric is the best so far."""
        value = metrics.get(self.monitor, math.nan)
        if not math.isfinite(value) or (self.best is not None and value < self.best):
            return
        self.best = value
        self._save_best(trainer)

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes `last.ckpt`; every rank calls it.

        Raises:
            UserError: a parameter is not finite; nothing is written then.
        """
        if self._fast_dev_run:
            return
        check_parameters(pl_module, self._kept())
        trainer.save_checkpoint(self.last_path)
        self._saved_updates = counters(pl_module).updates
        self._saved_at = time.monotonic()

    def _while_collecting(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves and stops between two updates, too: collecting may take hours.

        With several ranks both wait for the update, for they do not collect in step.
        """
        if trainer.world_size > 1:
            return
        if self._signals.received is not None:
            self.save(trainer, pl_module)
            self.interrupted_by_signal = self._signals.received
            raise KeyboardInterrupt  # Lightning knows no other way to stop before a batch
        if self._overdue():
            self.save(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The best score, the wall time, and how much of the log belongs to this checkpoint."""
        return {
            "best": self.best,
            "updates": self._updates,
            "wall_s": self._wall_s(),
            "log": {} if self._logger is None else self._logger.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`: also cuts the log back to where it was."""
        self.best = state_dict["best"]
        self._saved_updates = state_dict["updates"]
        self._wall_before = state_dict["wall_s"]
        if self._logger is not None and state_dict["log"]:
            self._logger.load_state_dict(state_dict["log"])

    def _save_best(self, trainer: pl.Trainer) -> None:
        """Writes weights and what is needed to build the model around them.

        `Trainer.save_checkpoint(weights_only=True)` would not do: it asks the datamodule for its
        state, which flushes the replay.
        """
        model = trainer.lightning_module
        weights = trainer.strategy.lightning_module_state_dict()  # a collective in some strategies
        if self._fast_dev_run or not trainer.is_global_zero:
            return
        checkpoint = {
            "state_dict": weights,
            "hyper_parameters": dict(model.hparams),
            "pytorch-lightning_version": pl.__version__,
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "best": {self.monitor: self.best},
        }
        model.on_save_checkpoint(checkpoint)
        with atomic_file(self.best_path) as file:
            torch.save(checkpoint, file)

    def _write_done(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            done = {
                **counters(pl_module)._asdict(),
                "best": self.best,
                "wall_s": self._wall_s(),
            }
            with atomic_file(self.done_path) as file:
                file.write(json.dumps(done).encode() + b"\n")

    def _wall_s(self) -> float:
        return self._wall_before + time.monotonic() - self._started_at

    def _overdue(self) -> bool:
        if self.best is not None and self._saved_updates is None:
            return True  # nobody could go on from a best.ckpt alone
        minutes = self.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _kept(self) -> str:
        if self._saved_updates is None:
            return "there was no checkpoint yet"
        return f"the last good checkpoint is {self.last_path} of update {self._saved_updates}"


def _at_limit(trainer: pl.Trainer) -> bool:
    """Whether the Trainer's own limits end the run after this batch.

    Saving here, not after the loop, keeps the loop's counters those of a run that goes on.
    """
    if trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps:
        return True
    return bool(trainer.is_last_batch) and trainer.current_epoch + 1 == trainer.max_epochs
