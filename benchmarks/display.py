"""How the pool looks: a live table in a terminal, plain lines everywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.cell import RETURN
from benchmarks.pool import Display, Progress, State

_QUIET_S = 15.0


def duration(seconds: float | None) -> str:
    """`42 s`, `3:05`, `1:02:03`; a dash where unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def open_display() -> Iterator[Display]:
    """A live display if standard output is a terminal, lines if not."""
    if not sys.stdout.isatty():
        yield LineDisplay()
        return
    from rich.live import Live

    with Live(refresh_per_second=4, transient=True) as live:
        yield LiveDisplay(live)


class LineDisplay:
    """One line per event and a summary of the running cells every quarter of a minute."""

    def __init__(self) -> None:
        self._quiet = 0.0

    def update(self, state: State) -> None:
        """Print the running cells unless that was done a moment ago."""
        import time

        now = time.monotonic()
        if self._quiet == 0.0:
            self._quiet = now
        if state.running and now - self._quiet > _QUIET_S:
            self._quiet = now
            cells = "; ".join(_line(progress) for progress in state.running)
            print(f"{_done(state)}  {cells}  ETA {duration(state.eta)}", flush=True)

    def message(self, text: str) -> None:
        """Print an event."""
        print(text, flush=True)


class LiveDisplay:
    """A table of the running cells that is redrawn in place, events scrolling above it."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def update(self, state: State) -> None:
        """Redraw the table."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("cell", "", "env steps", "score", "time", "left"):
            table.add_column(column, justify="left" if column in ("cell", "") else "right")
        for progress in state.running:
            table.add_row(
                progress.cell.name,
                ProgressBar(total=1.0, completed=progress.share, width=24),
                f"{progress.env_steps:,}",
                "-" if progress.score is None else f"{progress.score:.4g}",
                duration(progress.seconds),
                duration(progress.remaining),
            )
        table.add_row(_done(state), "", "", "", "", duration(state.eta), style="bold")
        self._live.update(table)

    def message(self, text: str) -> None:
        """Print an event above the table."""
        self._live.console.print(text, markup=False, highlight=False)


def _line(progress: Progress) -> str:
    what = "return" if progress.cell.score == RETURN else progress.cell.score
    score = "" if progress.score is None else f", {what} {progress.score:.4g}"
    return f"{progress.cell.name}: {progress.env_steps:,} env steps{score}"


def _done(state: State) -> str:
    failed = f", {len(state.failed)} failed" if state.failed else ""
    return f"{len(state.finished)}/{state.total} cells{failed}"
