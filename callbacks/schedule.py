"""What callbacks that measure now and then have in common: when, undisturbed, and said to all."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng

from callbacks.counters import counters, counts_env_steps
from callbacks.logger import RunLogger
from datamodules.errors import UserError
from zoo.evaluate import require_env


class EveryEnvSteps(pl.Callback):
    """Calls `measure` at the first batch end after `env_steps` passed each multiple of a number.

    Nothing but `env_steps` (or `updates`, with `every_updates`) decides, and the last multiple is
    in the checkpoint, so a resumed run measures at the same updates with the same seeds. With
    several ranks, rank zero measures and the others wait for its metrics. On recorded data, where
    nobody acts, each update counts like an env step. What cannot measure there says so once.

    Args:
        every_env_steps: the number, in frames.
        seed: all randomness of the n-th measurement derives from (seed, n).
        at_start: measure before the first update, too.
        every_updates: multiples of so many updates instead, for models that collect first and then
            learn.
    """

    def __init__(
        self,
        every_env_steps: int,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        for name, value in (("every_env_steps", every_env_steps), ("every_updates", every_updates)):
            if value is not None and value < 1:
                raise UserError(f"{type(self).__name__}: {name} is {value}, must be at least 1")
        self.every_env_steps, self.every_updates = every_env_steps, every_updates
        self.seed = seed
        self.at_start = at_start
        self._measured = -1
        self._idle = False

    def lacks(self, data: Any) -> str:
        """What the datamodule has not, but measuring needs; nothing if all is there."""
        return "" if hasattr(data, "make_env") else "an environment to play in (`env`)"

    @abstractmethod
    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """Metrics by name. Called on rank zero, in `undisturbed`."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses another environment than that of recorded data; measures if asked to."""
        data: Any = getattr(trainer, "datamodule", None)
        lacking = self.lacks(data)
        self._idle = bool(lacking)
        if lacking:
            rank_zero_warn(
                f"{type(self).__name__} measures nothing: the {type(data).__name__} has not got "
                f"{lacking}"
            )
        else:
            require_env(pl_module, data)  # now, for the first measurement may be hours away
        if self._measured < 0:
            self._measured = 0
            if self.at_start:
                self._measure(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measures if it is time."""
        updates, env_steps = counters(pl_module)
        if self.every_updates is not None:
            multiple = updates // self.every_updates
        elif counts_env_steps(trainer):
            multiple = env_steps // self.every_env_steps
        else:
            multiple = updates // self.every_env_steps
        if multiple > self._measured:
            self._measured = multiple
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._idle:
            return
        metrics: dict[str, float] = {}
        if trainer.is_global_zero:
            seed = np.random.SeedSequence([self.seed, self._measured])
            with undisturbed(pl_module, seed.spawn(1)[0]):
                metrics = self.measure(trainer, pl_module, seed)
        publish(trainer, trainer.strategy.broadcast(metrics))

    def state_dict(self) -> dict[str, int]:
        """Which multiple was measured last."""
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The inverse of `state_dict`."""
        self._measured = state_dict["measured"]


@contextmanager
def undisturbed(model: torch.nn.Module, seed: np.random.SeedSequence) -> Iterator[None]:
    """Runs a block in eval mode, without gradients, with global generators seeded by `seed`.

    Modes and generators are afterwards what they were, so the block leaves no trace in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    numpy_seed, torch_seed, python_seed = (int(n) for n in seed.generate_state(3))
    with isolate_rng(), torch.no_grad():
        np.random.seed(numpy_seed)
        torch.manual_seed(torch_seed)
        random.seed(python_seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def publish(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Logs metrics now, whatever `log_every_n_steps` says, and tells the callbacks that listen.

    Every rank calls it with the same metrics. A callback listens by having a method
    `on_metrics(trainer, metrics)`.
    """
    trainer.callback_metrics.update({k: torch.tensor(float(v)) for k, v in metrics.items()})
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.write(metrics, step)
        else:
            logger.log_metrics(dict(metrics), step)
    for callback in trainer.callbacks:
        if hasattr(callback, "on_metrics"):
            callback.on_metrics(trainer, metrics)
