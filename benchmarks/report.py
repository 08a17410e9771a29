"""The report of a results folder: two tables for machines, two documents for people.

    results.csv   every measured number, in long form
    summary.csv   one line per model and task, and one per model over all tasks
    report.md     for a repository's page, with figures/*.svg beside it
    report.html   one file that needs nothing else: charts, dreams and numbers

What failed or is missing is listed. Nothing here computes a score: `benchmarks.summary` does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import svg
from benchmarks.figures import draw_figures, slug
from benchmarks.page import render_page
from benchmarks.published import Published
from benchmarks.results import write_rows, write_table
from benchmarks.statistics import Interval
from benchmarks.summary import Score, Summary
from benchmarks.tables import (
    AGGREGATE_HEADER,
    aggregate_rows,
    commands,
    counted,
    failures,
    improvement_rows,
    measured,
    notes,
    published_notes,
    published_rows,
    score_header,
    score_rows,
    task_means,
)

_SUMMARY_COLUMNS = (
    "suite",
    "model",
    "preset",
    "task",
    "runs",
    "episodes",
    "env_steps",
    "wall_s",
    "score",
    "score_iqm",
    "score_iqm_low",
    "score_iqm_high",
    "score_mean",
    "score_min",
    "score_max",
    "normalized_iqm",
    "normalized_iqm_low",
    "normalized_iqm_high",
    "normalized_median",
    "normalized_mean",
    "optimality_gap",
    "above_expert",
)


def write_report(out: Path | str) -> Summary:
    """Read the cells under `out` (or its results.csv) and write the four files into it.

    Raises:
        UserError: the folder holds no results, or a file in it is broken.
    """
    summary = Summary(Path(out))
    figures = draw_figures(summary)
    write_rows(summary.out / "results.csv", summary.rows)
    columns, records = _summary_table(summary)
    write_table(summary.out / "summary.csv", columns, records)
    folder = summary.out / "figures"
    folder.mkdir(exist_ok=True)
    for name, chart in figures.items():
        (folder / f"{name}.svg").write_text(svg.standalone(chart))
    (summary.out / "report.md").write_text(_markdown(summary, list(figures)))
    (summary.out / "report.html").write_text(render_page(summary, figures))
    return summary


def _summary_table(summary: Summary) -> tuple[list[str], list[dict[str, Any]]]:
    metrics = list(dict.fromkeys(name for score in summary.scores for name in score.metrics))
    suite = summary.suite.name if summary.suite else summary.rows[0].suite
    records = [_score_record(summary, score, suite) for score in summary.scores]
    for label, aggregates in summary.aggregates.items():
        records.append(
            {
                "suite": suite,
                "model": next(score.model for score in summary.scores if score.label == label),
                "preset": "(all)",
                "task": "(all)",
                "runs": sum(len(task) for task in summary.normalized(label).values()),
                **_aggregate_record(aggregates),
            }
        )
    records += [_published_record(summary, row, suite) for row in summary.published]
    return [*_SUMMARY_COLUMNS, *metrics], records


def _score_record(summary: Summary, score: Score, suite: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "suite": suite,
        "model": score.model,
        "preset": score.preset,
        "task": score.task,
        "runs": len(score.finals),
        "episodes": score.episodes,
        "env_steps": score.env_steps,
        "wall_s": score.wall_s,
        "score": summary.metric,
        "score_iqm": score.interval.value,
        "score_iqm_low": score.interval.low,
        "score_iqm_high": score.interval.high,
        "score_mean": float(score.finals.mean()),
        "score_min": float(score.finals.min()),
        "score_max": float(score.finals.max()),
        **score.metrics,
    }
    reference = summary.suite.tasks.get(score.task) if summary.suite else None
    if reference:
        for key in ("", "_low", "_high"):
            record[f"normalized_iqm{key}"] = reference.normalize(record[f"score_iqm{key}"])
    return record


def _published_record(summary: Summary, row: Published, suite: str) -> dict[str, Any]:
    return {
        "suite": suite,
        "model": row.label,
        "preset": "(published)",
        "task": "(all)",
        "runs": sum(len(scores) for scores in row.runs.values()) or None,
        **_aggregate_record(summary.published_aggregates[row.label]),
    }


def _aggregate_record(aggregates: dict[str, Interval]) -> dict[str, float]:
    record = {
        name if name in _SUMMARY_COLUMNS else f"normalized_{name}": interval.value
        for name, interval in aggregates.items()
    }
    if "iqm" in aggregates:
        record["normalized_iqm_low"] = aggregates["iqm"].low
        record["normalized_iqm_high"] = aggregates["iqm"].high
    return record


def _markdown(summary: Summary, figures: Sequence[str]) -> str:
    lines = [f"# {summary.title}", ""]
    if summary.suite and summary.suite.about:
        lines += [summary.suite.about, ""]
    failed = failures(summary)
    if failed:
        lines += [f"**Without a result: {counted(len(failed), 'cell')}**", ""]
        lines += [f"- {name}: {words.splitlines()[-1]}" for name, words in failed] + [""]
    for task in summary.tasks:
        lines += [
            f"## {task}",
            "",
            *_markdown_table(score_header(summary), score_rows(summary, task)),
            "",
        ]
        drawn = [name for name in figures if name.startswith(f"{slug(task)}-")]
        lines += [f"![{name}](figures/{name}.svg)" for name in drawn] + [""]
    rows = aggregate_rows(summary)
    if rows:
        lines += ["## Over all tasks, normalised", "", *_markdown_table(AGGREGATE_HEADER, rows), ""]
    if summary.published:
        header, means = task_means(summary)
        lines += ["## Published, normalised", ""]
        lines += [*_markdown_table(AGGREGATE_HEADER, published_rows(summary)), ""]
        lines += [*(f"- {note}" for note in published_notes(summary)), ""]
        lines += ["## Mean scores", "", *_markdown_table(header, means), ""]
    if "performance-profile" in figures:
        lines += ["![performance profile](figures/performance-profile.svg)", ""]
    if len(summary.labels) > 1:
        lines += ["## Probability that a run of the row beats a run of the column", ""]
        lines += [*_markdown_table(("", *summary.labels), improvement_rows(summary)), ""]
    lines += ["## Beside the score", "", "Means over runs of the last value measured.", ""]
    for task in summary.tasks:
        header, rows = measured(summary, task)
        lines += [*_markdown_table(header, rows), ""] if rows else []
    lines += ["## How to read this", "", *(f"- {note}" for note in notes(summary)), ""]
    lines += ["## Made with", ""]
    for column in ("git_sha", "versions", "hardware"):
        lines += [f"- {column}: {value}" for value in summary.distinct(column)]
    if commands(summary):
        lines += ["", "```", *commands(summary), "```"]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(line)} |" for line in (header, ruler, *rows)]
