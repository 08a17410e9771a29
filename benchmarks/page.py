"""The report as one HTML file: no scripts, no network, pictures inlined."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from benchmarks import svg
from benchmarks.figures import slug
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

_CAPTIONS = {
    "env-steps": "Return against experience.",
    "updates": "Return against updates: all learn from recorded data.",
    "wall-s": "Return against time.",
    "open-loop": "Error of dreams with recorded actions over that of copying the last "
    "observation; below 1 the dream is better.",
    "ball-error": "Distance of the dreamed ball from the true one; 0 steps ahead is the last frame "
    "that the model saw. A frame without a ball counts as the side of the image.",
    "psnr": "Likeness to the true frames; higher is better.",
    "ssim": "Structural similarity to the true frames; higher is better.",
    "scores": "Final scores: every run, their IQM and its 95% interval.",
}


def render_page(summary: Summary, figures: Mapping[str, str]) -> str:
    """Fill the template.

    Args:
        summary: the results.
        figures: charts by name, as `benchmarks.figures.draw_figures` returns them.
    """
    sections = [_failures(summary)]
    sections += [_task(summary, task, figures) for task in summary.tasks]
    sections += [
        _overall(summary, figures),
        _published(summary),
        _dreams(summary),
        _measured(summary),
        _notes(summary),
        _origin(summary),
    ]
    template = (resources.files("benchmarks") / "report.html").read_text()
    return Template(template).substitute(
        title=escape(summary.title),
        about=escape(summary.suite.about if summary.suite else ""),
        facts=_facts(summary),
        style=f"{svg.palette(':root')}\n{svg.STYLE}",
        body="\n".join(section for section in sections if section),
    )


def last_gifs(summary: Summary, score: Score) -> list[Path]:
    """The last recording of each kind, from the first run of a model that has any.

    Recordings are `videos/<kind>-<step>.gif`.
    """
    for seed in score.seeds:
        videos = summary.out / "runs" / score.model / score.preset / f"seed={seed}" / "videos"
        last: dict[str, tuple[int, Path]] = {}
        for path in sorted(videos.glob("*.gif")):
            match = re.fullmatch(r"(.*?)-?(\d+)", path.stem)
            kind, step = (match[1], int(match[2])) if match else (path.stem, 0)
            last[kind] = max(last.get(kind, (-1, path)), (step, path))
        if last:
            return [path for _, path in last.values()]
    return []


def _facts(summary: Summary) -> str:
    runs = sum(len(score.finals) for score in summary.scores)
    facts = [
        counted(len(summary.labels), "model"),
        counted(len(summary.tasks), "task"),
        counted(runs, "run"),
        counted(sum(score.episodes for score in summary.scores), "final episode"),
    ]
    if summary.missing:
        facts.append(counted(len(summary.missing), "cell") + " without a result")
    pairs = (fact.partition(" ") for fact in facts)
    return "".join(f"<span><b>{count}</b> {noun}</span>" for count, _, noun in pairs)


def _failures(summary: Summary) -> str:
    failed = failures(summary)
    if not failed:
        return ""
    items = "".join(f"<h3>{escape(name)}</h3><pre>{escape(words)}</pre>" for name, words in failed)
    count = counted(len(failed), "cell")
    return f'<section class="alert"><p><b>Without a result: {count}</b></p>{items}</section>'


def _task(summary: Summary, task: str, figures: Mapping[str, str]) -> str:
    rows = [_row(summary, row) for row in score_rows(summary, task)]
    prefix = f"{slug(task)}-"
    scores, *curves = [
        _figure(chart, _CAPTIONS[name.removeprefix(prefix)])
        for name, chart in figures.items()
        if name.startswith(prefix)
    ]
    return (
        f"<section><h2>{escape(task)}</h2>"
        f'<div class="split">{_table(score_header(summary), rows)}{scores}</div>'
        f'<div class="charts">{"".join(curves)}</div></section>'
    )


def _overall(summary: Summary, figures: Mapping[str, str]) -> str:
    charts = _improvement(summary)
    if "performance-profile" in figures:
        caption = "Share of runs above a normalised score, with 95% band; higher is better."
        charts = _figure(figures["performance-profile"], caption) + charts
    if not charts:
        return ""
    rows = [_row(summary, row) for row in aggregate_rows(summary)]
    title = "Over all tasks, normalised" if rows else "Side by side"
    table = _table(AGGREGATE_HEADER, rows) if rows else ""
    return f'<section><h2>{title}</h2>{table}<div class="charts">{charts}</div></section>'


def _published(summary: Summary) -> str:
    if not summary.published:
        return ""
    header, means = task_means(summary)
    tables = [
        _table(names, [[escape(text) for text in row] for row in rows])
        for names, rows in ((AGGREGATE_HEADER, published_rows(summary)), (header, means))
    ]
    items = "".join(f'<p class="note">{escape(note)}</p>' for note in published_notes(summary))
    return (
        f"<section><h2>Published, normalised</h2>{tables[0]}{items}"
        f"<h3>Mean scores</h3>{tables[1]}</section>"
    )


def _improvement(summary: Summary) -> str:
    if len(summary.labels) < 2:
        return ""
    rows = []
    for x, texts in zip(summary.labels, improvement_rows(summary), strict=True):
        cells = [f"<td>{_swatch(summary, x)}{escape(x)}</td>"]
        for y, text in zip(summary.labels, texts[1:], strict=True):
            interval = None if x == y else summary.improvement(x, y)
            # Tint: how far from a coin toss.
            share = 0 if interval is None else round(abs(interval.value - 0.5) * 50)
            ink = "var(--s0)" if interval and interval.value >= 0.5 else "var(--s1)"
            tint = f"background:color-mix(in srgb, {ink} {share}%, transparent)"
            value, _, rest = text.partition(" ")
            cells.append(f'<td style="{tint}">{value}<small>{rest}</small></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = "".join(f"<th>{escape(name)}</th>" for name in ("", *summary.labels))
    return (
        f'<figure><div class="scroll"><table class="matrix"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><figcaption>Probability of improvement: how "
        "likely a run of the row scores above a run of the column; one half is a coin toss."
        "</figcaption></figure>"
    )


def _dreams(summary: Summary) -> str:
    figures = []
    for score in summary.scores:
        for path in last_gifs(summary, score):
            data = base64.b64encode(path.read_bytes()).decode()
            name = escape(f"{score.label} on {score.task}")
            figures.append(
                f'<figure><img alt="{name}" src="data:image/gif;base64,{data}">'
                f"<figcaption>{name}: {escape(path.stem)}</figcaption></figure>"
            )
    if not figures:
        return ""
    return (
        "<section><h2>Dreams</h2><p>What the model predicts, beside what happened.</p>"
        f'<div class="dreams">{"".join(figures)}</div></section>'
    )


def _measured(summary: Summary) -> str:
    tables = []
    for task in summary.tasks:
        header, rows = measured(summary, task)
        if rows:
            tables.append(_table(header, [[escape(text) for text in row] for row in rows]))
    if not tables:
        return ""
    return (
        "<section><h2>Beside the score</h2><p>Means over runs of the last value measured.</p>"
        f'<div class="charts">{"".join(tables)}</div></section>'
    )


def _notes(summary: Summary) -> str:
    items = "".join(f'<p class="note">{escape(note)}</p>' for note in notes(summary))
    return f"<section><h2>How to read this</h2>{items}</section>"


def _origin(summary: Summary) -> str:
    lines = [
        f'<p class="note"><b>{name}</b> {escape(value)}</p>'
        for column, name in (("git_sha", "Commit"), ("versions", "Versions"), ("hardware", "On"))
        for value in summary.distinct(column)
    ]
    shell = escape("\n".join(commands(summary)))
    return (
        f"<section><h2>Make it again</h2>{f'<pre>{shell}</pre>' if shell else ''}"
        f"{''.join(lines)}</section>"
    )


def _row(summary: Summary, texts: Sequence[str]) -> list[str]:
    """Escaped cells with the model's colour in front and the headline number in bold."""
    label, *cells = (escape(text) for text in texts)
    first = next(number for number, text in enumerate(cells) if "[" in text or "(" in text)
    value, space, interval = cells[first].partition(" ")
    cells[first] = f"<b>{value}</b>{space}{interval}"
    return [_swatch(summary, texts[0]) + label, *cells]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are already HTML."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def _swatch(summary: Summary, label: str) -> str:
    number_ = summary.color(label)
    color = "var(--soft)" if number_ == svg.NEUTRAL else f"var(--s{number_ % len(svg.LIGHT)})"
    return f'<span class="swatch" style="background:{color}"></span>'
