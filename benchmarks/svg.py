"""Small charts as plain SVG text: line charts with bands, and intervals side by side.

Colours are CSS variables (`--s0`, `--s1`, ... for the series), so a page may set them for light and
dark; `standalone` adds a style sheet to make a chart a file of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import numpy.typing as npt

# Distinguishable with every common colour blindness, on light and on dark ground.
LIGHT = ("#2563c9", "#d9570b", "#0f8a62", "#a3309a", "#9a7400", "#0e87a8", "#c22f48", "#5b5bd6")
DARK = ("#6ea8ff", "#ff9a57", "#46c79b", "#e07fd8", "#dcb43c", "#58c4e0", "#ff7d92", "#a3a3ff")
NEUTRAL = -1

_WIDTH, _HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 44, 48


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: in the legend.
        color: number of the series; `NEUTRAL` for a reference.
        x: shape `(points,)`; a single value of `y` with empty `x` is a horizontal line.
        y: shape `(points,)`.
        low: lower edge of the band, `(points,)`, or None.
        high: upper edge of the band, `(points,)`, or None.
        runs: thin lines behind it, `(x, y)` each.
    """

    label: str
    color: int
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64] | None = None
    high: npt.NDArray[np.float64] | None = None
    runs: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = field(
        default_factory=tuple
    )


@dataclass(frozen=True)
class Dot:
    """A value with its interval, one row of an interval chart."""

    label: str
    color: int
    value: float
    low: float
    high: float
    points: Sequence[float] = ()


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """Draw curves over a common pair of axes that start at 0 where the data allow."""
    xs = np.concatenate(
        [np.append(line.x, [x for run in line.runs for x in run[0]]) for line in lines]
    )
    ys = np.concatenate([_extent(line) for line in lines])
    x_axis = _Axis.over(min(0.0, _least(xs)), _most(xs), _LEFT, _WIDTH - _RIGHT, snap=False)
    y_axis = _Axis.over(min(0.0, _least(ys)), max(0.0, _most(ys)), _HEIGHT - _BOTTOM, _TOP)
    body = [_frame(x_axis, y_axis, x_label, y_label)]
    for line in lines:
        body += [
            f'<path class="run" {_stroke(line.color)} d="{_path(x_axis(x), y_axis(y))}"/>'
            for x, y in line.runs
            if len(x) > 1
        ]
    for line in lines:
        if line.low is not None and line.high is not None and len(line.x) > 1:
            edge = np.concatenate([line.x, line.x[::-1]])
            band = np.concatenate([line.high, line.low[::-1]])
            body.append(
                f'<path class="band" {_fill(line.color)} d="{_path(x_axis(edge), y_axis(band))}Z"/>'
            )
    for line in lines:
        flat = len(line.x) == 0
        x = np.array([x_axis.low, x_axis.high]) if flat else line.x
        y = np.repeat(line.y, 2) if flat else line.y
        style = "line flat" if flat else "line"
        body.append(
            f'<path class="{style}" {_stroke(line.color)} d="{_path(x_axis(x), y_axis(y))}"/>'
        )
    body.append(_legend([(line.label, line.color, len(line.x) == 0) for line in lines]))
    return _svg(title, "\n".join(body), _HEIGHT)


def interval_chart(dots: Sequence[Dot], title: str, x_label: str) -> str:
    """Draw one row per value: every run as a small dot, the interval as a bar, the value on it."""
    row, top, left = 34, 12, 150
    height = top + row * len(dots) + _BOTTOM
    ends = [x for dot in dots for x in (dot.low, dot.high, *dot.points)]
    axis = _Axis.over(min(0.0, *ends), max(0.0, *ends), left, _WIDTH - _RIGHT - 14)
    bottom = top + row * len(dots)
    body = [
        f'<line class="grid" x1="{axis(t):.1f}" x2="{axis(t):.1f}" y1="{top}" y2="{bottom}"/>'
        f'<text class="tick" x="{axis(t):.1f}" y="{bottom + 17}" text-anchor="middle">'
        f"{short(t)}</text>"
        for t in axis.ticks
    ]
    for number, dot in enumerate(dots):
        y = top + row * (number + 0.5)
        body.append(
            f'<text class="name" x="{left - 14}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(dot.label)}</text>"
            f'<line class="bar" {_stroke(dot.color)} x1="{axis(dot.low):.1f}" '
            f'x2="{axis(dot.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        body += [
            f'<circle class="point" {_fill(dot.color)} cx="{axis(x):.1f}" cy="{y:.1f}" r="3"/>'
            for x in dot.points
        ]
        body.append(
            f'<circle class="value" {_fill(dot.color)} cx="{axis(dot.value):.1f}" '
            f'cy="{y:.1f}" r="6"><title>{dot.value:.4g}</title></circle>'
        )
    body.append(
        f'<text class="label" x="{(left + _WIDTH - _RIGHT) / 2:.0f}" y="{height - 10}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg(title, "\n".join(body), height)


def standalone(chart: str) -> str:
    """A chart with its own colours and fonts, to be written as an .svg file."""
    style = f"<style>\n{palette('svg')}\n{STYLE}\nsvg {{ background: var(--ground); }}</style>"
    chart = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return chart.replace("<title>", style + "<title>", 1) + "\n"


def palette(selector: str) -> str:
    """CSS that sets the colour variables for light and dark."""

    def block(colors: Sequence[str], ground: str, ink: str, soft: str, grid: str) -> str:
        series = " ".join(f"--s{number}: {color};" for number, color in enumerate(colors))
        return f"{series} --ground: {ground}; --ink: {ink}; --soft: {soft}; --grid: {grid};"

    light = block(LIGHT, "#ffffff", "#1b1f24", "#5f6873", "#e4e7eb")
    dark = block(DARK, "#14171b", "#e8eaed", "#9aa4af", "#2b3138")
    return (
        f"{selector} {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ {selector} {{ {dark} }} }}"
    )


STYLE = """\
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--soft); }
svg .name, svg .key { fill: var(--ink); }
svg .name { font-size: 13px; }
svg .tick { font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
svg .flat { stroke-dasharray: 2 5; }
svg .run { fill: none; stroke-width: 1; opacity: 0.35; stroke-linejoin: round; }
svg .band { opacity: 0.16; }
svg .bar { stroke-width: 6; opacity: 0.3; stroke-linecap: round; }
svg .point { opacity: 0.45; }
svg .value { stroke: var(--ground); stroke-width: 2; }"""


def short(value: float) -> str:
    """A number for an axis: 0, 0.25, 500, 10k, 1.5M."""
    for size, unit in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Axis:
    """A linear scale from data to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, snap: bool = True) -> "_Axis":
        """Cover the data; with `snap` both ends are ticks."""
        if not high > low:
            low, high = low - 0.5, low + 0.5
        step = _round_step((high - low) / 5)
        if snap:
            low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return cls(low, high, start, end, tuple((first + i) * step for i in range(count)))

    def __call__(self, value: npt.ArrayLike) -> npt.NDArray[np.float64]:
        share = (np.asarray(value, dtype=np.float64) - self.low) / (self.high - self.low)
        return np.asarray(self.start + share * (self.end - self.start))


def _round_step(rough: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten, from above."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y_axis(t):.1f}" y2="{y_axis(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y_axis(t) + 4:.1f}" text-anchor="end">'
        f"{short(t)}</text>"
        for t in y_axis.ticks
    ]
    parts += [
        f'<text class="tick" x="{x_axis(t):.1f}" y="{bottom + 18}" text-anchor="middle">'
        f"{short(t)}</text>"
        for t in x_axis.ticks
    ]
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 10}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(14 {(_TOP + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "\n".join(parts)


def _legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    parts, x = [], float(_LEFT)
    for label, color, flat in entries:
        style = "line flat" if flat else "line"
        parts.append(
            f'<path class="{style}" {_stroke(color)} d="M{x:.0f} 18h20"/>'
            f'<text class="key" x="{x + 27:.0f}" y="22">{escape(label)}</text>'
        )
        x += 27 + 7.0 * len(label) + 18
    return "\n".join(parts)


def _svg(title: str, body: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" '
        f'role="img"><title>{escape(title)}</title>\n{body}\n</svg>'
    )


def _path(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _stroke(color: int) -> str:
    return f'style="stroke:{_color(color)}"'


def _fill(color: int) -> str:
    return f'style="fill:{_color(color)}"'


def _color(color: int) -> str:
    return "var(--soft)" if color == NEUTRAL else f"var(--s{color % len(LIGHT)})"


def _extent(line: Line) -> npt.NDArray[np.float64]:
    edges = [edge for edge in (line.low, line.high) if edge is not None]
    return np.concatenate([line.y, *edges, *(run[1] for run in line.runs)])


def _least(values: npt.NDArray[np.float64]) -> float:
    return float(values.min()) if values.size else 0.0


def _most(values: npt.NDArray[np.float64]) -> float:
    return float(values.max()) if values.size else 1.0
