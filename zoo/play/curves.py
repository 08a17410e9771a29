"""Vectors as pictures: curves of their first numbers over the last steps."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

CURVES = 8
SIZE = (96, 192)  # height, width
PAPER, AXIS = (250, 250, 250), (225, 225, 225)
COLOURS = (
    (66, 133, 244),
    (244, 160, 0),
    (15, 157, 88),
    (219, 68, 55),
    (171, 71, 188),
    (0, 172, 193),
    (158, 157, 36),
    (120, 120, 120),
)


def draw_curves(values: np.ndarray, steps: int) -> np.ndarray:
    """Draws vectors (T, D) in [-1, 1], the newest at the right edge, as uint8 (96, 192, 3).

    Only the last `steps` steps and the first 8 numbers are drawn; larger numbers run along the
    border.
    """
    height, width = SIZE
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.line([(0, height / 2), (width, height / 2)], fill=AXIS)
    drawn = values[-steps:, :CURVES]
    x = width - 1 - (len(drawn) - 1 - np.arange(len(drawn))) * width / steps
    y = (0.5 - drawn.clip(-1, 1) / 2) * (height - 3) + 1
    for curve, colour in zip(y.T, COLOURS, strict=False):
        points = list(zip(x.tolist(), curve.tolist(), strict=True))
        draw.line([(x[0] - 1, curve[0]), *points], fill=colour, width=2)
    return np.asarray(image)
