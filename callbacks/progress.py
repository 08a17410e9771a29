"""`RunProgress`: where a run is, how well it does and when it will be done."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table

from callbacks.budget import Budget
from callbacks.counters import counters

REFRESH_SECONDS = 0.2
LINE_SECONDS = 10.0
WINDOW_SECONDS = 20.0  # rates are means over so long
EPISODES = 10


class _Moment(NamedTuple):
    """Counters at a time."""

    seconds: float
    updates: int
    env_steps: int


class RunProgress(ProgressBar):
    """One live line on a terminal, one plain line every 10 seconds elsewhere.

    Shows environment steps (of the budget, if there is one), updates, the mean return of the last
    10 finished training episodes, the best evaluation, rates and the remaining time. It moves
    during the prefill, too, when the datamodule calls its attribute `progress`.

    Args:
        monitor: the metric whose best value is shown.
        console: where to write; by default standard output.
    """

    def __init__(self, monitor: str = "eval/return_mean", console: Console | None = None) -> None:
        super().__init__()
        self.monitor = monitor
        self._console = console
        self._enabled = True
        self._live: Live | None = None
        self._best: float | None = None
        self._model: pl.LightningModule | None = None
        self._next = 0.0
        self._first_update_shown = False
        self._moments: deque[_Moment] = deque()

    def disable(self) -> None:
        """Shows nothing from now on."""
        self._enabled = False
        self._close()

    def enable(self) -> None:
        """Shows progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the live line."""
        if self._live is not None:
            self._live.console.print(*args)
        else:
            print(*args, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the line."""
        if not self._enabled:
            return
        self._model = pl_module
        self._first_update_shown = False
        self._moments.clear()
        console = self._console or Console()
        self._line_console = console
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()
        self._next = 0.0
        self.tick()
        if hasattr(trainer.datamodule, "progress"):  # type: ignore[attr-defined]
            trainer.datamodule.progress = self.tick  # type: ignore[attr-defined]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves the line, at most five times a second."""
        if not self._first_update_shown:
            self._first_update_shown = True
            self._next = 0.0
        self.tick()

    def tick(self) -> None:
        """Moves the line if it is time to; costs next to nothing if it is not."""
        now = time.monotonic()
        if now < self._next or not self._enabled or self._model is None:
            return
        self._next = now + (LINE_SECONDS if self._live is None else REFRESH_SECONDS)
        self._show(now)

    def on_metrics(self, trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
        """Remembers the best evaluation."""
        value = metrics.get(self.monitor, math.nan)
        if math.isfinite(value):
            self._best = value if self._best is None else max(self._best, value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the end."""
        if self._enabled and self._model is not None:
            shown = self._moments[-1][1:] == counters(self._model)
            if self._live is not None or not shown:
                self._show(time.monotonic())
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the terminal back."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the terminal back."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The best evaluation so far."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._best = state_dict["best"]

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._model = None

    def _show(self, now: float) -> None:
        assert self._model is not None
        moment = _Moment(now, *counters(self._model))
        self._moments.append(moment)
        while len(self._moments) > 2 and self._moments[1].seconds < now - WINDOW_SECONDS:
            self._moments.popleft()
        unit, done, total = self._goal(moment)
        text = "  ".join(self._parts(moment, unit, done, total))
        if self._live is None:
            share = f" ({done / total:.0%})" if total else ""
            self._line_console.print(f"{_count(unit, done, total)}{share}  {text}", soft_wrap=True)
            return
        grid = Table.grid(padding=(0, 1))
        bar = Bar(total=total, completed=done, width=20) if total else ""
        grid.add_row(bar, _count(unit, done, total), text)
        self._live.update(grid, refresh=True)

    def _goal(self, moment: _Moment) -> tuple[str, int, int | None]:
        """Unit, what is done and what is to be done, of the budget that will end the run."""
        trainer: Any = self.trainer
        budget = next((c for c in trainer.callbacks if isinstance(c, Budget)), None)
        if budget is not None and budget.env_steps is not None:
            return "env steps", moment.env_steps, budget.env_steps
        if budget is not None and budget.updates is not None:
            return "updates", moment.updates, budget.updates
        if budget is not None and budget.seconds is not None:
            return "seconds", round(budget.clock.seconds()), round(budget.seconds)
        if trainer.max_steps > 0:
            return "updates", moment.updates, trainer.max_steps
        return "env steps", moment.env_steps, None

    def _parts(self, moment: _Moment, unit: str, done: int, total: int | None) -> list[str]:
        parts = []
        if unit != "updates":
            parts.append(f"{moment.updates:,} updates")
        elif moment.env_steps:
            parts.append(f"{moment.env_steps:,} env steps")
        trainer: Any = self.trainer
        finished = getattr(getattr(trainer.datamodule, "collector", None), "finished", None)
        if finished:
            returns = [episode.return_ for episode in list(finished)[-EPISODES:]]
            parts.append(f"return {sum(returns) / len(returns):.1f}")
        if self._best is not None:
            parts.append(f"best eval {self._best:.1f}")
        first = self._moments[0]
        seconds = moment.seconds - first.seconds
        if seconds > 0:
            steps = moment.env_steps - first.env_steps
            updates = moment.updates - first.updates
            parts.append(f"{updates / seconds:.1f} updates/s")
            if moment.env_steps:
                parts.append(f"{steps / seconds:.0f} env steps/s")
            speed = (updates if unit == "updates" else steps) / seconds
            if total and speed > 0:
                parts.append(f"{_clock(max(total - done, 0) / speed)} left")
        return parts


def _count(unit: str, done: int, total: int | None) -> str:
    return f"{done:,}/{total:,} {unit}" if total else f"{done:,} {unit}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
