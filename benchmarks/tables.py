"""What every form of the report shows, as text: tables, notes, failures and commands."""

from pathlib import Path

from benchmarks import statistics
from benchmarks.baselines import BASELINES
from benchmarks.cell import RETURN, fit_command
from benchmarks.display import duration
from benchmarks.pool import read_failure
from benchmarks.statistics import Interval
from benchmarks.summary import Summary

AGGREGATE_HEADER = ("model", "tasks", "runs", "IQM", "median", "mean", "optimality gap")
_FEW_SEEDS = 5


def score_header(summary: Summary) -> tuple[str, ...]:
    """Columns of the main tables."""
    plural = "returns" if summary.metric == RETURN else summary.score_name
    name = f"IQM of {plural} [95% CI]"
    return (
        "model",
        name,
        "mean",
        "runs",
        "episodes" if summary.metric == RETURN else "clips",
        "env steps",
        "training",
    )


def score_rows(summary: Summary, task: str) -> list[list[str]]:
    """The cells of the main table for one task, best first, in the order of `score_header`."""
    return [
        [
            score.label,
            interval_text(score.interval, len(score.finals)),
            number(float(score.finals.mean())),
            str(len(score.finals)),
            f"{score.episodes:,}",
            f"{score.env_steps:,}",
            duration(score.wall_s),
        ]
        for score in summary.ranked(task)
    ]


def aggregate_rows(summary: Summary) -> list[list[str]]:
    """The cells of the table over tasks, in the order of `AGGREGATE_HEADER`; best first.

    Empty for a single task: its own table says the same.
    """
    rows: list[tuple[float, list[str]]] = []
    if len(summary.tasks) < 2:
        return []
    for label in summary.labels:
        scores, aggregates = summary.normalized(label), summary.aggregates(label)
        if aggregates:
            runs = sum(len(task) for task in scores.values())
            texts = [interval_text(aggregate, runs, "{:.2f}") for aggregate in aggregates.values()]
            covered = f"{len(scores)} of {len(summary.tasks)}"
            rows.append((aggregates["iqm"].value, [label, covered, str(runs), *texts]))
    return [row for _, row in sorted(rows, key=lambda item: -item[0])]


def improvement_rows(summary: Summary) -> list[list[str]]:
    """Rows of the matrix of P(row beats column), with intervals."""
    rows = []
    for x in summary.labels:
        row = [x]
        for y in summary.labels:
            interval = None if x == y else summary.improvement(x, y)
            runs = max(summary.runs(x), summary.runs(y))
            row.append("" if interval is None else interval_text(interval, runs, "{:.2f}"))
        rows.append(row)
    return rows


def measured(summary: Summary, task: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what was measured beside the returns, a column for each model."""
    scores = summary.ranked(task)
    names = list(dict.fromkeys(name for score in scores for name in score.metrics))
    rows = [
        [
            name.replace("_", " "),
            *(number(score.metrics[name]) if name in score.metrics else "" for score in scores),
        ]
        for name in names
    ]
    return [task, *(score.label for score in scores)], rows


def interval_text(interval: Interval, runs: int, form: str | None = None) -> str:
    """`487 [461, 500]`; one run has no interval."""
    # Adding 0 turns the -0.00 of a rounded value into 0.00.
    texts = [form.format(round(value, 2) + 0) if form else number(value) for value in interval]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if runs > 1 else f"{texts[0]} (one run)"


def number(value: float) -> str:
    """Three or four telling digits: 0.123, 12.3, 487.1, 12,345."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def notes(summary: Summary) -> list[str]:
    """What a reader must know to judge the numbers, one sentence each."""
    said = [
        "A run's score is the mean return of fresh greedy episodes of its best checkpoint, which "
        "was chosen on other episodes during training."
        if summary.metric == RETURN
        else f"A run's score is the {summary.score_name} on fresh clips.",
        "IQM is the mean of the middle half of the runs; intervals are 95% percentiles of "
        f"{statistics.REPLICATIONS:,} stratified bootstrap resamples of runs within tasks.",
        "Learning curves show the IQM over runs with its 95% band, single runs behind it. env "
        "steps count frames that the agent caused.",
    ]
    fewest = min((len(score.finals) for score in summary.scores), default=0)
    if fewest < _FEW_SEEDS:
        said.append(
            f"With as few as {counted(fewest, 'run')} per model an interval says little and is too "
            f"narrow; claims need {_FEW_SEEDS} or more."
        )
    if summary.suite:
        said += [
            f"Normalised score on {task}: 0 is {number(reference.random)} (random), 1 is "
            f"{number(reference.expert)}. Source: {reference.source}."
            for task, reference in summary.suite.tasks.items()
        ]
    untimed = [
        score.label for score in summary.scores if any(c.wall_s is None for c in score.curves)
    ]
    if untimed:
        said.append(f"Not drawn against seconds, for lack of times: {', '.join(untimed)}.")
    return said


def commands(summary: Summary) -> list[str]:
    """How to make the results again: the whole suite, then each model's first run alone."""
    lines = [summary.command] if summary.command else []
    for score in summary.scores:
        cells = [
            cell
            for cell in (summary.suite.cells(1) if summary.suite else [])
            if (cell.model, cell.preset) == (score.model, score.preset)
        ]
        if cells and score.model not in BASELINES:
            run = Path("runs") / score.model / score.preset / "seed=0"
            lines.append(f"zoo fit {' '.join(fit_command(cells[0], run))}")
    return lines


def failures(summary: Summary) -> list[tuple[str, str]]:
    """Cells without a result: name, and the last words of those that failed."""
    return [(cell.name, read_failure(cell, summary.out) or "not run") for cell in summary.missing]


def counted(count: int, noun: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
