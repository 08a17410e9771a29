"""What the rows of a results folder say: final scores, curves and comparisons."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import statistics
from benchmarks.cell import METRICS, RETURN, Cell, read_json
from benchmarks.published import Published, load_published
from benchmarks.results import Row, read_rows
from benchmarks.statistics import Interval
from benchmarks.suite import Suite, parse_suite
from benchmarks.svg import NEUTRAL
from datamodules.errors import UserError

Floats = npt.NDArray[np.float64]

MANIFEST = "suite.json"


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run during its training, each `(points,)`; `wall_s` None if unknown."""

    env_steps: Floats
    updates: Floats
    wall_s: Floats | None
    value: Floats


@dataclass(frozen=True)
class Score:
    """All runs of one model on one task.

    Attributes:
        finals: the score of each run's final evaluation, `(runs,)`.
        episodes: final episodes of all runs together.
        env_steps: the largest training budget that a run used.
        wall_s: mean seconds of training, None if unknown.
        interval: IQM of `finals` with its stratified-bootstrap interval.
        metrics: last value of every other metric, mean over runs.
        curves: one for each run that was evaluated during training.
    """

    label: str
    model: str
    preset: str
    task: str
    seeds: tuple[int, ...]
    finals: Floats
    episodes: int
    env_steps: int
    wall_s: float | None
    interval: Interval
    metrics: dict[str, float]
    curves: tuple[Curve, ...]

    @classmethod
    def of(cls, label: str, rows: Sequence[Row], metric: str = RETURN) -> "Score":
        """Summarise the rows of one model, preset and task; `metric` is what counts."""
        by_seed: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_seed[row.seed].append(row)
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        scored = [[row for row in run if row.metric == metric] for run in runs]
        last = [run[-1] for run in scored]
        finals = np.array([row.value for row in last])
        walls = [row.wall_s for row in last if row.wall_s is not None]
        return cls(
            label=label,
            model=rows[0].model,
            preset=rows[0].preset,
            task=rows[0].task,
            seeds=tuple(sorted(by_seed)),
            finals=finals,
            episodes=sum(row.n for row in last),
            env_steps=max(row.env_steps for row in last),
            wall_s=float(np.mean(walls)) if walls else None,
            interval=statistics.bootstrap([finals]),
            metrics=_last_metrics(runs, {metric, "return_std"}),
            curves=tuple(_curve(run[:-1]) for run in scored if len(run) > 1),
        )

    def mean_curve(
        self, axis: str
    ) -> tuple[Floats, statistics.Band, list[tuple[Floats, Floats]]] | None:
        """Points, IQM over runs with band, and the single runs; None if there is nothing to draw.

        Runs are interpolated between their evaluations, over the range that all of them cover.

        Args:
            axis: `env_steps`, `updates` or `wall_s`.
        """
        runs = [(getattr(curve, axis), curve.value) for curve in self.curves]
        if not runs or any(x is None for x, _ in runs):
            return None
        # Every evaluation of every run is a point, so that no peak falls between two.
        grid = np.unique(np.concatenate([x for x, _ in runs]))
        start, end = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
        grid = grid[(start <= grid) & (grid <= end)]
        if not grid.size:
            return None
        return grid, statistics.curve_band([np.interp(grid, x, y) for x, y in runs]), runs


class Summary:
    """A results folder, read.

    Attributes:
        out: the folder.
        rows: all rows, run after run.
        suite: what was asked, None if the folder does not say.
        command: how it was asked, empty if the folder does not say.
        missing: cells that were asked for and have no result.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.suite: Suite | None = None
        self.command = ""
        self.missing: list[Cell] = []
        cells: list[Cell] = []
        if (out / MANIFEST).exists():
            manifest = read_json(out / MANIFEST)
            self.suite = parse_suite(manifest["suite"])
            self.command = manifest["command"]
            cells = self.suite.cells(manifest["seeds"])
            self.missing = [cell for cell in cells if not cell.result(out).exists()]
        self.rows = _read_cells(out, cells)
        if not self.rows and (out / "results.csv").exists():
            self.rows = read_rows(out / "results.csv")
            there = {(row.model, row.preset, row.seed) for row in self.rows}
            self.missing = [
                cell for cell in cells if (cell.model, cell.preset, cell.seed) not in there
            ]
        if not self.rows and not cells:
            raise UserError(f"{out} holds no results: neither cells nor results.csv")

    @property
    def title(self) -> str:
        """Of the report."""
        if self.suite:
            return self.suite.title
        return self.rows[0].suite or "Benchmark"

    @property
    def metric(self) -> str:
        """What is compared."""
        return self.suite.score if self.suite else RETURN

    @property
    def score_name(self) -> str:
        """What people call it."""
        return (
            "return"
            if self.metric == RETURN
            else self.metric.replace("_r2", " R^2").replace("_", " ")
        )

    @cached_property
    def scores(self) -> list[Score]:
        """One per model and task, in the order of the rows."""
        groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[(row.model, row.preset, row.task)].append(row)
        places = [(model, task) for model, _, task in groups]
        return [
            Score.of(
                model if places.count((model, task)) == 1 else f"{model}/{preset}",
                rows,
                self.metric,
            )
            for (model, preset, task), rows in groups.items()
        ]

    @cached_property
    def labels(self) -> list[str]:
        """Names of what is compared, in the order of the suite."""
        return list(dict.fromkeys(score.label for score in self.scores))

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks that have results."""
        return list(dict.fromkeys(score.task for score in self.scores))

    def color(self, label: str) -> int:
        """Number of the label's colour, the same in every figure; chance is grey."""
        coloured = [name for name in self.labels if name.split("/")[0] != "random"]
        return coloured.index(label) if label in coloured else NEUTRAL

    def runs(self, label: str) -> int:
        """Finished runs of a label, over all tasks."""
        return sum(len(score.finals) for score in self.scores if score.label == label)

    def ranked(self, task: str) -> list[Score]:
        """Scores on one task, best first."""
        there = [score for score in self.scores if score.task == task]
        return sorted(there, key=lambda score: -score.interval.value)

    def normalized(self, label: str) -> dict[str, Floats]:
        """Normalised final scores of each run, by task; only tasks that have references."""
        return self._normalize(
            {score.task: score.finals for score in self.scores if score.label == label}
        )

    @cached_property
    def aggregates(self) -> dict[str, dict[str, Interval]]:
        """By label: each of `statistics.AGGREGATES` over its normalised tasks, if it has any."""
        normalized = {label: list(self.normalized(label).values()) for label in self.labels}
        return {
            label: {
                name: statistics.bootstrap(tasks, of) for name, of in statistics.AGGREGATES.items()
            }
            for label, tasks in normalized.items()
            if tasks
        }

    @cached_property
    def published(self) -> list[Published]:
        """What the suite names to read its results beside, on the suite's tasks."""
        if not (self.suite and self.suite.published):
            return []
        rows = [row.on(self.suite.tasks) for row in load_published(self.suite.published)]
        return [row for row in rows if row.scores]

    @cached_property
    def published_aggregates(self) -> dict[str, dict[str, Interval]]:
        """By label: what is known of `statistics.AGGREGATES`, normalised as our own."""
        return {
            row.label: row.aggregates(list(self._normalize(row.scores).values()))
            for row in self.published
        }

    def _normalize(self, scores: Mapping[str, Floats]) -> dict[str, Floats]:
        references = self.suite.tasks if self.suite else {}
        return {
            task: np.array([references[task].normalize(value) for value in values])
            for task, values in scores.items()
            if task in references
        }

    def improvement(self, x: str, y: str) -> Interval | None:
        """P(a run of x beats a run of y), over the tasks that both have; None if there are none."""
        ours = {score.task: score.finals for score in self.scores if score.label == x}
        theirs = {score.task: score.finals for score in self.scores if score.label == y}
        shared = [task for task in ours if task in theirs]
        if not shared:
            return None
        return statistics.probability_of_improvement(
            [ours[task] for task in shared], [theirs[task] for task in shared]
        )

    def distinct(self, column: str) -> list[str]:
        """Different values of one column, e.g. `hardware`."""
        return list(dict.fromkeys(getattr(row, column) for row in self.rows))


def _read_cells(out: Path, cells: Sequence[Cell]) -> list[Row]:
    """Rows of all finished cells: first those of the suite in its order, then any others."""
    asked = [cell.result(out) for cell in cells]
    others = sorted(set((out / "cells").glob("*/*/*/result.json")) - set(asked))
    found = [path for path in [*asked, *others] if path.exists()]
    return [Row(**row) for path in found for row in read_json(path)["rows"]]


def _curve(rows: Sequence[Row]) -> Curve:
    walls = [row.wall_s for row in rows]
    return Curve(
        env_steps=np.array([row.env_steps for row in rows], dtype=np.float64),
        updates=np.array([row.updates for row in rows], dtype=np.float64),
        wall_s=None if None in walls else np.array(walls, dtype=np.float64),
        value=np.array([row.value for row in rows]),
    )


def _last_metrics(runs: Sequence[Sequence[Row]], shown: set[str]) -> dict[str, float]:
    """Mean over runs of the last value of each metric that is not shown as the score."""
    last = [{row.metric: row.value for row in run} for run in runs]
    names = dict.fromkeys(name for run in last for name in run)
    return {
        name: float(np.mean([run[name] for run in last if name in run]))
        for name in names
        if name.split("@")[0] in METRICS - shown
    }
