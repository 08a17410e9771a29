"""The charts of a report, drawn from a summary."""

import numpy as np

from benchmarks import statistics, svg
from benchmarks.summary import Summary

# Metrics of dreams that are drawn against the steps ahead.
AHEAD = {
    "ball_error": "distance of the ball in pixels",
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
}


def draw_figures(summary: Summary) -> dict[str, str]:
    """All charts by file name, in the order in which a report shows them."""
    figures = {}
    for task in summary.tasks:
        name = slug(task)
        figures[f"{name}-scores"] = _score_chart(summary, task)
        for axis, label in (
            _experience(summary, task),
            ("wall_s", "seconds of training"),
        ):
            chart = _curve_chart(summary, task, axis, label)
            if chart:
                figures[f"{name}-{axis.replace('_', '-')}"] = chart
        errors = _error_chart(summary, task)
        if errors:
            figures[f"{name}-open-loop"] = errors
        for metric, label in AHEAD.items():
            chart = _ahead_chart(summary, task, metric, label)
            if chart:
                figures[f"{name}-{metric.replace('_', '-')}"] = chart
    profile = _profile_chart(summary)
    return {**figures, "performance-profile": profile} if profile else figures


def _experience(summary: Summary, task: str) -> tuple[str, str]:
    """Axis of the learning curves and its label: updates where all learn from recorded data."""
    curves = [curve for score in summary.scores if score.task == task for curve in score.curves]
    if curves and not any(curve.env_steps.any() for curve in curves):
        return "updates", "updates"
    return "env_steps", "env steps"


def _score_chart(summary: Summary, task: str) -> str:
    dots = [
        svg.Dot(
            score.label, summary.color(score.label), *score.interval, points=tuple(score.finals)
        )
        for score in summary.ranked(task)
    ]
    return svg.interval_chart(dots, f"Final scores on {task}", summary.score_name)


def _curve_chart(summary: Summary, task: str, axis: str, label: str) -> str | None:
    lines, flat = [], []
    for score in (score for score in summary.scores if score.task == task):
        curve = score.mean_curve(axis)
        name = f"{score.label} (n={len(score.finals)})"
        color = summary.color(score.label)
        if curve:
            grid, band, runs = curve
            lines.append(svg.Line(name, color, grid, band.value, band.low, band.high, runs))
        elif not score.curves:
            level = np.array([score.interval.value])
            flat.append(svg.Line(name, color, np.array([]), level))
    if not lines:
        return None
    title = f"Learning curves on {task} against {label}"
    return svg.line_chart([*lines, *flat], title, label, summary.score_name)


def _error_chart(summary: Summary, task: str) -> str | None:
    """Error of dreams against steps ahead, relative to copying the last observation."""
    lines = []
    for score in (score for score in summary.scores if score.task == task):
        relative = {}
        for name, value in score.metrics.items():
            metric, _, k = name.partition("@")
            copying = score.metrics.get(f"copy_last_mse@{k}")
            if metric == "open_loop_mse" and copying:
                relative[int(k)] = value / copying
        if relative:
            ahead = np.array(sorted(relative), float)
            name = f"{score.label} (n={len(score.finals)})"
            errors = np.array([relative[k] for k in sorted(relative)])
            lines.append(svg.Line(name, summary.color(score.label), ahead, errors))
    if not lines:
        return None
    lines.append(svg.Line("copying", svg.NEUTRAL, np.array([]), np.array([1.0])))
    title = f"Open-loop error on {task}"
    return svg.line_chart(lines, title, "steps ahead", "error / error of copying")


def _ahead_chart(summary: Summary, task: str, metric: str, label: str) -> str | None:
    """`metric@k` of dreams against k, mean over runs."""
    lines = []
    for score in (score for score in summary.scores if score.task == task):
        prefix = f"{metric}@"
        values = {
            int(name.removeprefix(prefix)): value
            for name, value in score.metrics.items()
            if name.startswith(prefix)
        }
        if values:
            ahead = np.array(sorted(values), float)
            name = f"{score.label} (n={len(score.finals)})"
            height = np.array([values[k] for k in sorted(values)])
            lines.append(svg.Line(name, summary.color(score.label), ahead, height))
    if not lines:
        return None
    return svg.line_chart(lines, f"Dreams of {task}: {label}", "steps ahead", label)


def _profile_chart(summary: Summary) -> str | None:
    scores = {label: list(summary.normalized(label).values()) for label in summary.labels}
    scores = {label: tasks for label, tasks in scores.items() if tasks}
    if not scores:
        return None
    highest = max(float(task.max()) for tasks in scores.values() for task in tasks)
    taus = np.linspace(0, max(1.0, highest) * 1.02, 120)
    lines = []
    for label, tasks in scores.items():
        band = statistics.performance_profile(tasks, taus)
        runs = sum(len(task) for task in tasks)
        lines.append(svg.Line(f"{label} (n={runs})", summary.color(label), taus, *band))
    return svg.line_chart(lines, "Performance profile", "normalised score", "share of runs above")


def slug(task: str) -> str:
    """A task's name as the beginning of a file name."""
    return "".join(letter if letter.isalnum() else "-" for letter in task).lower()
