"""Runs the cells of a suite as processes side by side, one thread each.

A cell that fails does not stop the others: its last words are kept in `failed.json` and reported at
the end. Ctrl-C asks every running cell to save and stop; calling again continues them.

`--shard i/n` splits a suite over machines that share nothing: every machine runs its part into its
own folder (or all into a shared one), and the report reads whatever is there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.cell import RETURN, Cell, read_json, read_metrics, write_json
from datamodules.errors import UserError

# One thread per cell: cells are the parallelism. Spinning OpenMP threads would take each other's
# cores, so idle ones sleep.
THREADS = {
    **dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
    ),
    "OMP_WAIT_POLICY": "passive",
    "KMP_BLOCKTIME": "0",
}
_POLL_S = 0.2
_REFRESH_S = 1.0
_STOP_S = 30.0
_LOG_LINES = 12


def shard(cells: Sequence[Cell], spec: str) -> list[Cell]:
    """The part of the cells that belongs to shard `i/n`; the n parts cover every cell once.

    `i` counts modulo n, so both 0..n-1 and 1..n number the shards of a job array.

    Raises:
        UserError: `spec` is not `i/n` with 0 <= i <= n and n >= 1.
    """
    try:
        index, count = (int(part) for part in spec.split("/"))
    except ValueError:
        index, count = -1, 0
    if not (count >= 1 and 0 <= index <= count):
        raise UserError(f"--shard {spec} is not of the form i/n with i up to n, for example 1/4")
    return list(cells[index % count :: count])


@dataclass
class Progress:
    """How far one running cell is."""

    cell: Cell
    seconds: float
    env_steps: int = 0
    score: float | None = None

    @property
    def share(self) -> float:
        """Share of the budget that is done, 0 where unknown."""
        if self.cell.seconds:
            return min(1.0, self.seconds / self.cell.seconds)
        return min(1.0, self.env_steps / self.cell.env_steps) if self.cell.env_steps else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds that are left at the present pace; None where unknown."""
        return self.seconds * (1 - self.share) / self.share if self.share > 0.02 else None


class Display(Protocol):
    """Shows a pool at work."""

    def update(self, state: "State") -> None:
        """Called about once a second."""

    def message(self, text: str) -> None:
        """Called when a cell starts, ends or fails."""


@dataclass
class State:
    """The pool at one moment."""

    total: int
    jobs: int
    running: list[Progress] = field(default_factory=list)
    waiting: list[Cell] = field(default_factory=list)
    finished: dict[Cell, float] = field(default_factory=dict)
    failed: list[Cell] = field(default_factory=list)

    @property
    def eta(self) -> float | None:
        """Seconds until the pool is empty; None until every kind of cell has shown its pace."""
        times: dict[tuple[str, str], float] = {}
        for progress in self.running:
            if progress.remaining is not None:
                key = (progress.cell.model, progress.cell.preset)
                times[key] = progress.seconds + progress.remaining
        for cell, seconds in self.finished.items():
            times[(cell.model, cell.preset)] = seconds
        kinds = [(cell.model, cell.preset) for cell in self.waiting]
        left = [progress.remaining for progress in self.running]
        if any(kind not in times for kind in kinds) or None in left:
            return None
        return (sum(times[kind] for kind in kinds) + sum(filter(None, left))) / self.jobs


@dataclass
class _Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    started: float


def run_pool(
    cells: Sequence[Cell], out: Path, jobs: int, display: Display, command: Sequence[str] = ()
) -> list[Cell]:
    """Run cells, at most `jobs` at a time, and return those that failed.

    Args:
        cells: finished ones are passed over.
        out: the results folder.
        jobs: at least 1.
        display: where progress goes.
        command: what runs a cell, `[*command, CELL_JSON, "--out", OUT]`; by default
            `python -m benchmarks.cell`.

    Raises:
        UserError: `jobs` is below 1.
        KeyboardInterrupt: after every running cell was asked to stop and did.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs} is not a number of processes; it must be at least 1")
    command = command or (sys.executable, "-u", "-m", "benchmarks.cell")
    todo = [cell for cell in cells if not cell.result(out).exists()]
    if len(todo) < len(cells):
        display.message(f"{len(cells) - len(todo)} of {len(cells)} cells are already finished")
    state = State(total=len(todo), jobs=min(jobs, max(1, len(todo))), waiting=todo)
    running: list[_Job] = []
    refreshed = 0.0
    with _stopped_at_the_end(running):
        while state.waiting or running:
            while state.waiting and len(running) < jobs:
                running.append(_start(state.waiting.pop(0), out, command))
                display.message(f"start {running[-1].cell.name}")
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _finish(job, out, state, display)
            if time.monotonic() - refreshed > _REFRESH_S:
                refreshed = time.monotonic()
                state.running = [_progress(job, out) for job in running]
                display.update(state)
            if running:
                time.sleep(_POLL_S)
        state.running = []
        display.update(state)
    return state.failed


def read_failure(cell: Cell, out: Path) -> str | None:
    """The last words of a cell that failed, or None."""
    path = cell.folder(out) / "failed.json"
    return str(read_json(path)["log"]) if path.exists() else None


def _start(cell: Cell, out: Path, command: Sequence[str]) -> _Job:
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.json").unlink(missing_ok=True)
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [*command, json.dumps(asdict(cell)), "--out", str(out)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **THREADS},
            # Ctrl-C reaches only the pool, which then stops its cells in order.
            start_new_session=True,
        )
    return _Job(cell, process, time.monotonic())


def _finish(job: _Job, out: Path, state: State, display: Display) -> None:
    seconds = time.monotonic() - job.started
    cell, code = job.cell, job.process.returncode
    if code == 0 and cell.result(out).exists():
        state.finished[cell] = seconds
        score = _final_score(cell, read_json(cell.result(out)))
        what = "return" if cell.score == RETURN else cell.score
        display.message(f"done  {cell.name}: {what} {score:.4g} in {seconds:.0f} s")
        return
    log = cell.folder(out) / "log.txt"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    write_json(cell.folder(out) / "failed.json", {"ending": ending, "log": last})
    state.failed.append(cell)
    display.message(f"FAILED {cell.name}: {ending} after {seconds:.0f} s, log in {log}")


def _final_score(cell: Cell, result: Mapping[str, list[Mapping[str, float]]]) -> float:
    return [row["value"] for row in result["rows"] if row["metric"] == cell.score][-1]


def _progress(job: _Job, out: Path) -> Progress:
    progress = Progress(job.cell, time.monotonic() - job.started)
    for line in read_metrics(job.cell.run(out)):
        progress.env_steps = line.env_steps
        if line.metric == f"eval/{job.cell.score}":
            progress.score = line.value
    return progress


@contextmanager
def _stopped_at_the_end(running: list[_Job]) -> Iterator[None]:
    """Stop what still runs when the block is left, be it by an error, Ctrl-C or SIGTERM."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for job in running:
            job.process.terminate()  # a zoo model saves a checkpoint on SIGTERM
        deadline = time.monotonic() + _STOP_S
        for job in running:
            try:
                job.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        signal.signal(signal.SIGTERM, before)
