"""Makes images smaller."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def area_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Averages a uint8 image (H, W, C) over the exact area of each of size x size pixels.

    Pixels on a border count by the share that lies inside, as in OpenCV's INTER_AREA.
    """
    height, width, channels = image.shape
    if height == width == size:
        return image
    rows = _area_weights(height, size) @ image.reshape(height, -1).astype(np.float32)
    columns = _area_weights(width, size) @ rows.reshape(size, width, channels)
    return np.rint(columns).astype(np.uint8)


@lru_cache(maxsize=32)
def _area_weights(length: int, size: int) -> np.ndarray:
    """(size, length) float32: the share of each input pixel in each output pixel; rows sum to 1."""
    edges = np.arange(size + 1) * length / size
    pixel = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return (overlap.clip(min=0) * size / length).astype(np.float32)
