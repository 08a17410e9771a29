"""Statistics over few runs: what a benchmark may claim, and how sure it may be.

Scores come as one array per task with the runs on the last axis, `(..., runs)`; tasks may have
different numbers of runs. Leading axes are batch axes (the bootstrap uses one for its
replications), so the same function computes an estimate and its distribution.

The definitions are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice" (arXiv:2108.13264).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tasks = Sequence[Array]
Aggregate = Callable[[Tasks], Array]

REPLICATIONS = 50_000
PROFILE_REPLICATIONS = 2_000
# Replications that are resampled at once: enough to amortise numpy's overhead, few enough that
# 130 runs stay within a few megabytes.
_BLOCK = 5_000


class Interval(NamedTuple):
    """A point estimate and the percentile-bootstrap interval around it."""

    value: float
    low: float
    high: float


class Band(NamedTuple):
    """A curve and the pointwise percentile-bootstrap band around it, each of shape `(points,)`."""

    value: Array
    low: Array
    high: Array


def as_tasks(scores: Sequence[npt.ArrayLike]) -> list[Array]:
    """Check and convert one sequence of run scores per task.

    Raises:
        ValueError: no task, a task without runs, or a score that is not finite.
    """
    tasks = [np.atleast_1d(np.asarray(task, dtype=np.float64)) for task in scores]
    if not tasks:
        raise ValueError("scores of at least one task are needed")
    for index, task in enumerate(tasks):
        if task.shape[-1] == 0:
            raise ValueError(f"task {index} has no runs")
        if not np.isfinite(task).all():
            raise ValueError(f"task {index} has scores that are not finite: {task.tolist()}")
    return tasks


def iqm(tasks: Tasks) -> Array:
    """Interquartile mean: the mean of the middle half of all runs of all tasks.

    A quarter of the runs (rounded down) is cut at each end, so up to three runs are all kept.

    Example:
        >>> float(iqm([np.array([0.0, 1.0, 3.0, 100.0])]))
        2.0
    """
    runs = np.sort(np.concatenate(tasks, axis=-1), axis=-1)
    cut = runs.shape[-1] // 4
    return runs[..., cut : runs.shape[-1] - cut].mean(-1)


def mean(tasks: Tasks) -> Array:
    """Mean over tasks of each task's mean over runs."""
    return np.mean([task.mean(-1) for task in tasks], axis=0)


def median(tasks: Tasks) -> Array:
    """Median over tasks of each task's mean over runs."""
    return np.median([task.mean(-1) for task in tasks], axis=0)


def optimality_gap(tasks: Tasks, gamma: float = 1.0) -> Array:
    """How far the runs stay below `gamma` on average; what exceeds it does not count."""
    runs = np.concatenate(tasks, axis=-1)
    return gamma - np.minimum(runs, gamma).mean(-1)


def above_expert(tasks: Tasks) -> Array:
    """Number of tasks whose mean over runs exceeds 1; #superhuman where the expert is human.

    A tie does not count, nor what rounding puts just above one.
    """
    return np.sum([task.mean(-1) > 1 + 1e-9 for task in tasks], axis=0, dtype=np.float64)


AGGREGATES: Mapping[str, Aggregate] = {
    "iqm": iqm,
    "median": median,
    "mean": mean,
    "optimality_gap": optimality_gap,
    "above_expert": above_expert,
}
# Functions of the task means alone; the others of task means are not those of the runs.
OF_MEANS = ("median", "mean", "above_expert")


def bootstrap(
    scores: Sequence[npt.ArrayLike],
    aggregate: Aggregate = iqm,
    replications: int = REPLICATIONS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate with a stratified-bootstrap interval: runs are resampled within each task.

    Args:
        scores: one sequence of run scores per task.
        aggregate: maps tasks `(..., runs)` to `(...)`.
        replications: number of resamples, at least 1.
        confidence: coverage of the percentile interval, in (0, 1).
        seed: of the resampling; the same seed gives the same interval.
    """
    tasks = as_tasks(scores)
    rng = np.random.default_rng(seed)
    samples = [
        aggregate([task[rng.integers(task.size, size=(block, task.size))] for task in tasks])
        for block in _blocks(replications)
    ]
    low, high = _percentiles(np.concatenate(samples), confidence)
    return Interval(float(aggregate(tasks)), float(low), float(high))


def curve_band(
    curves: npt.ArrayLike,
    replications: int = PROFILE_REPLICATIONS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Band:
    """IQM over runs at every point of curves `(runs, points)`, whole runs being resampled."""
    values = np.asarray(curves, dtype=np.float64)
    runs = len(values)
    index = np.random.default_rng(seed).integers(runs, size=(replications, runs))
    columns = [
        _percentiles(iqm([column[index]]), confidence) for column in values.T
    ]  # one point at a time keeps the memory at replications x runs
    low, high = np.array(columns).T
    return Band(iqm([values.T]), low, high)


def performance_profile(
    scores: Sequence[npt.ArrayLike],
    thresholds: npt.ArrayLike,
    replications: int = PROFILE_REPLICATIONS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Band:
    """Share of runs that score above each threshold, with a stratified-bootstrap band.

    Args:
        scores: one sequence of run scores per task.
        thresholds: shape `(points,)`.
    """
    tasks = as_tasks(scores)
    taus = np.asarray(thresholds, dtype=np.float64)
    above = [(task[:, None] > taus).astype(np.float64) for task in tasks]
    total = sum(task.size for task in tasks)
    rng = np.random.default_rng(seed)
    value = np.sum([hits.sum(0) for hits in above], axis=0) / total
    # A resample only matters through how often it drew each run.
    samples = np.sum(
        [
            _counts(rng, task.size, replications) @ hits
            for task, hits in zip(tasks, above, strict=True)
        ],
        axis=0,
    )
    low, high = _percentiles(samples / total, confidence)
    return Band(value, low, high)


def probability_of_improvement(
    x: Sequence[npt.ArrayLike],
    y: Sequence[npt.ArrayLike],
    replications: int = PROFILE_REPLICATIONS,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """P(a run of X beats a run of Y): Mann-Whitney U / (n m), ties count half, mean over tasks.

    Args:
        x: one sequence of run scores per task.
        y: the same tasks in the same order; numbers of runs may differ.
    """
    xs, ys = as_tasks(x), as_tasks(y)
    if len(xs) != len(ys):
        raise ValueError(f"X has {len(xs)} tasks, Y has {len(ys)}: they must be the same tasks")
    rng = np.random.default_rng(seed)
    values, samples = [], []
    for a, b in zip(xs, ys, strict=True):
        wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
        values.append(wins.mean())
        draws_a, draws_b = (_counts(rng, run.size, replications) for run in (a, b))
        samples.append(((draws_a @ wins) * draws_b).sum(-1) / wins.size)
    low, high = _percentiles(np.mean(samples, axis=0), confidence)
    return Interval(float(np.mean(values)), float(low), float(high))


def _counts(rng: np.random.Generator, runs: int, replications: int) -> Array:
    """How often each of `runs` runs is drawn in each resample: `(replications, runs)`."""
    return rng.multinomial(runs, np.full(runs, 1 / runs), size=replications).astype(np.float64)


def _percentiles(samples: Array, confidence: float) -> Array:
    """Lower and upper end of the central interval over the first axis."""
    tail = 50 * (1 - confidence)
    return np.percentile(samples, [tail, 100 - tail], axis=0)


def _blocks(total: int) -> Iterator[int]:
    while total > 0:
        yield min(total, _BLOCK)
        total -= _BLOCK
