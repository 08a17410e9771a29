"""What every form of the report shows, as text: tables, notes, failures and commands."""

import shlex
from pathlib import Path

from benchmarks import statistics
from benchmarks.baselines import BASELINES
from benchmarks.cell import RETURN, fit_command
from benchmarks.display import duration
from benchmarks.pool import read_failure
from benchmarks.statistics import Interval
from benchmarks.summary import Summary

AGGREGATE_HEADER = (
    "model",
    "tasks",
    "runs",
    "IQM",
    "median",
    "mean",
    "optimality gap",
    "above expert",
)
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
    for label, aggregates in summary.aggregates.items():
        scores = summary.normalized(label)
        runs = sum(len(task) for task in scores.values())
        texts = [
            interval_text(aggregate, runs, _form(name)) for name, aggregate in aggregates.items()
        ]
        covered = f"{len(scores)} of {_task_count(summary)}"
        rows.append((aggregates["iqm"].value, [label, covered, str(runs), *texts]))
    return [row for _, row in sorted(rows, key=lambda item: -item[0])]


def published_rows(summary: Summary) -> list[list[str]]:
    """The same of published scores, in the order of their file; a dash where it is not known."""
    rows = []
    for row in summary.published:
        runs = sum(len(scores) for scores in row.runs.values())
        aggregates = summary.published_aggregates[row.label]
        texts = []
        for name in statistics.AGGREGATES:
            if name not in aggregates:
                texts.append("-")
            elif row.runs:
                texts.append(interval_text(aggregates[name], runs, _form(name)))
            else:
                texts.append(_form(name).format(aggregates[name].value))
        covered = f"{len(row.scores)} of {_task_count(summary)}"
        rows.append([row.label, covered, str(runs) if runs else "means only", *texts])
    return rows


def task_means(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of mean scores by task: ours, then published ones.

    Empty unless the suite names published scores.
    """
    if not (summary.suite and summary.published):
        return [], []
    ours = {
        label: {score.task: score.finals for score in summary.scores if score.label == label}
        for label in summary.labels
    }
    theirs = {f"{row.label}, published": row.scores for row in summary.published}
    columns = {**ours, **theirs}
    rows = [
        [
            task,
            number(reference.random),
            number(reference.expert),
            *(number(float(of[task].mean())) if task in of else "" for of in columns.values()),
        ]
        for task, reference in summary.suite.tasks.items()
    ]
    return ["task", "0 is", "1 is", *columns], rows


def published_notes(summary: Summary) -> list[str]:
    """Where each of the published scores comes from, and what must be known of it."""
    return [f"{row.label}: {row.source}. {row.note}".strip() for row in summary.published]


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


def _form(aggregate: str) -> str:
    return "{:.0f}" if aggregate == "above_expert" else "{:.2f}"


def _task_count(summary: Summary) -> int:
    """Tasks that an aggregate should be over: those of the suite, also where none has a result."""
    return len(summary.suite.tasks) if summary.suite else len(summary.tasks)


def number(value: float) -> str:
    """Three or four telling digits: 0.123, 12.3, 487.1, 12,345."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def notes(summary: Summary) -> list[str]:
    """What a reader must know to judge the numbers, one sentence each."""
    said = [
        _score_note(summary),
        "IQM is the mean of the middle half of the runs; intervals are 95% percentiles of "
        f"{statistics.REPLICATIONS:,} stratified bootstrap resamples of runs within tasks.",
        "Learning curves show the IQM over runs with its 95% band, single runs behind it. env "
        "steps count frames that the agent caused.",
    ]
    if len(summary.tasks) > 1:
        said.append(
            "above expert counts the tasks whose mean over runs is above the expert's score; a tie "
            "does not count."
        )
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


def _score_note(summary: Summary) -> str:
    if summary.suite and summary.suite.video:
        return (
            "A run's score is the share of dreamed frames in which the ball is within a pixel of "
            "the truth, on fresh clips; `@k` is k steps ahead, 0 the last frame that the model saw."
        )
    if summary.metric != RETURN:
        return f"A run's score is the {summary.score_name} on fresh clips."
    if summary.suite and summary.suite.checkpoint == "last":
        return "A run's score is the mean return of fresh greedy episodes of its last checkpoint."
    return (
        "A run's score is the mean return of fresh greedy episodes of its best checkpoint, which "
        "was chosen on other episodes during training."
    )


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
            lines.append(shlex.join(["zoo", "fit", *fit_command(cells[0], run)]))
    return lines


def failures(summary: Summary) -> list[tuple[str, str]]:
    """Cells without a result: name, and the last words of those that failed."""
    return [(cell.name, read_failure(cell, summary.out) or "not run") for cell in summary.missing]


def counted(count: int, noun: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
