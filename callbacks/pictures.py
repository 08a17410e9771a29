"""Pictures of dreams: frames beside reality (vectors as curves), and charts of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from zoo.play.curves import COLOURS, CURVES

FILTERED = (70, 160, 90)  # border while the model still sees reality
DREAMED = (210, 70, 60)  # border once it dreams
ENDED = 40  # grey level where the episode is over
BORDER = 2
PLOT_SIZE = (96, 192)
MIN_HEIGHT = 96
SPREAD = 3.0  # curves are drawn within so many standard deviations of the real ones
PANEL_SIZE = (240, 340)
INK, GRID = (60, 60, 60), (225, 225, 225)


@dataclass(frozen=True)
class Panel:
    """A chart of curves over the horizon.

    Attributes:
        title: written above it.
        lines: {label: (H,) values at 1, ..., H}.
        top: larger values are drawn at the upper edge, so that one that explodes does not hide the
            rest.
    """

    title: str
    lines: Mapping[str, np.ndarray]
    top: float


def dream_frames(
    truth: np.ndarray, dream: np.ndarray, length: np.ndarray, context: int
) -> np.ndarray:
    """Draws truth above dream above their difference, one column per sequence.

    The border of the dream changes its colour where the model stops seeing reality.

    Args:
        truth: what happened: images (B, T, H, W, C) in [0, 1] or vectors (B, T, ...).
        dream: the same for the model's reconstruction and prediction.
        length: (B,) valid steps of each sequence.
        context: steps the model saw.

    Returns:
        uint8 (T, height, width, 3).
    """
    if truth.ndim == 5:
        difference = (dream - truth + 1) / 2
        rows = [_images(x, length) for x in (truth, dream, difference)]
    else:
        rows = _plots(truth.astype(np.float64), dream.astype(np.float64), length, context)
    framed = [
        _bordered(row, context if is_dream else None)
        for row, is_dream in zip(rows, (False, True, False), strict=True)
    ]
    grid = np.concatenate(framed, 2)  # (B, T, 3 * h, w, 3)
    return np.ascontiguousarray(np.concatenate(list(grid), 2))


def grid_frames(images: np.ndarray) -> np.ndarray:
    """Draws a grid of animations of images (rows, columns, T, H, W, C) in [0, 1].

    Returns:
        uint8 (T, height, width, 3).
    """
    rows, columns, time = images.shape[:3]
    shown = _images(images.reshape(-1, *images.shape[2:]), np.full(rows * columns, time))
    framed = _bordered(shown, None)
    grid = framed.reshape(rows, columns, *framed.shape[1:]).transpose(2, 0, 3, 1, 4, 5)
    height, width = framed.shape[2:4]
    return np.ascontiguousarray(grid.reshape(time, rows * height, columns * width, 3))


def line_panels(panels: Sequence[Panel]) -> np.ndarray:
    """Draws charts side by side, uint8 (height, width, 3); their vertical axes begin at zero."""
    return np.concatenate([_line_panel(panel) for panel in panels], 1)


def _line_panel(panel: Panel) -> np.ndarray:
    height, width = PANEL_SIZE
    left, right, upper, lower = 48, width - 14, 40, height - 28
    values = [v for line in panel.lines.values() for v in line if np.isfinite(v)]
    top = min(max([0.0, *values]), panel.top) or 1.0
    steps = max((len(line) for line in panel.lines.values()), default=1)

    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text((left, 6), panel.title, fill=INK)
    draw.text((right - 90, height - 14), "steps ahead", fill=INK)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = lower + tick * (upper - lower)
        draw.line([(left, level), (right, level)], fill=GRID)
        draw.text((4, level - 6), f"{tick * top:.2g}", fill=INK)
    for k in sorted({1, (1 + steps) // 2, steps}):
        draw.text((left + k / steps * (right - left) - 4, lower + 3), str(k), fill=INK)
    legend = left
    for i, (label, line) in enumerate(panel.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        share = np.nan_to_num(line / top, nan=1.0, posinf=1.0).clip(0, 1)
        x = left + np.arange(1, len(line) + 1) / steps * (right - left)
        y = lower + share * (upper - lower)
        draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=colour, width=2)
        draw.ellipse([x[-1] - 2, y[-1] - 2, x[-1] + 2, y[-1] + 2], fill=colour)
        draw.rectangle([legend, 26, legend + 10, 28], fill=colour)
        draw.text((legend + 14, 21), label, fill=INK)
        legend += 34 + int(draw.textlength(label))
    return np.asarray(image)


def _images(images: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Float images (B, T, H, W, C) as uint8 (B, T, h, w, 3), small ones enlarged."""
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8)
    pixels = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels[..., :3]
    pixels = pixels.copy()
    pixels[np.arange(pixels.shape[1]) >= length[:, None]] = ENDED
    scale = -(-MIN_HEIGHT // pixels.shape[2])
    return pixels.repeat(scale, 2).repeat(scale, 3)


def _plots(
    truth: np.ndarray, dream: np.ndarray, length: np.ndarray, context: int
) -> list[np.ndarray]:
    """Three rows of plots (B, T, h, w, 3): real curves, dreamed curves, their differences."""
    batch, time = truth.shape[:2]
    truth = truth.reshape(batch, time, -1)[..., :CURVES]
    dream = dream.reshape(batch, time, -1)[..., :CURVES]
    valid = truth[np.arange(time) < length[:, None]]
    mean, std = valid.mean(0), valid.std(0).clip(min=1e-3)
    truth, dream = (truth - mean) / std, (dream - mean) / std
    return [
        np.stack([_plot(curves, int(n), context) for curves, n in zip(values, length, strict=True)])
        for values in (truth, dream, dream - truth)
    ]


def _plot(curves: np.ndarray, length: int, context: int) -> np.ndarray:
    """Frames (T, h, w, 3) in which standardised curves (T, D) grow from left to right."""
    height, width = PLOT_SIZE
    time = len(curves)
    x = (np.arange(time) + 0.5) * width / time
    y = (0.5 - curves.clip(-SPREAD, SPREAD) / (2 * SPREAD)) * (height - 3) + 1
    image = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.line([(0, height / 2), (width, height / 2)], fill=(225, 225, 225))
    draw.line([(context * width / time, 0), (context * width / time, height)], fill=(200, 200, 200))
    frames = []
    for t in range(time):
        if t < length:
            for curve, colour in zip(y.T, COLOURS, strict=False):
                before = max(t - 1, 0)
                draw.line([(x[before], curve[before]), (x[t], curve[t])], fill=colour, width=2)
                draw.point((x[t], curve[t]), fill=colour)
        frames.append(np.asarray(image).copy())
    return np.stack(frames)


def _bordered(images: np.ndarray, context: int | None) -> np.ndarray:
    """Puts a border around (B, T, h, w, 3): coloured by phase, or dark without a context."""
    pad = ((0, 0), (0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0))
    framed = np.pad(images, pad)
    if context is not None:
        edge = np.ones(framed.shape[2:4], bool)
        edge[BORDER:-BORDER, BORDER:-BORDER] = False
        framed[:, :context, edge] = FILTERED
        framed[:, context:, edge] = DREAMED
    return framed
