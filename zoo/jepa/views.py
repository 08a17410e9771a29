"""What an encoder sees of images and clips: scaled to [-1, 1], cropped at random when training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nets.vit import Grid


def stack_images(obs: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
    """The images (B, T, H, W, C) of all keys in [-1, 1], with their channels side by side."""
    images = [obs[key] for key in keys]
    return torch.cat(
        [x.float() / 127.5 - 1 if x.dtype == torch.uint8 else 2 * x.float() - 1 for x in images], -1
    )


def resized(clips: Tensor, size: Grid) -> Tensor:
    """Clips (N, T, H, W, C) with sides of `size` pixels, antialiased."""
    if clips.shape[2:4] == size:
        return clips
    frames = clips.flatten(0, 1).movedim(-1, 1)
    frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    return frames.movedim(1, -1).unflatten(0, clips.shape[:2])


def random_crops(
    rng: np.random.Generator,
    clips: Tensor,
    size: Grid,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    flip: bool = False,
) -> Tensor:
    """A rectangle of each clip (N, T, H, W, C), the same in all its frames, resized to `size`.

    Args:
        rng: of the draw.
        clips: what to crop.
        size: height and width of the result.
        scale: smallest and largest share of the area; drawn uniformly.
        aspect: smallest and largest ratio of width to height; its logarithm is drawn uniformly.
            Sides that would be too long are cut.
        flip: mirror every second clip on average, left to right.
    """
    height, width = clips.shape[2:4]
    views = []
    for clip in clips:
        area = rng.uniform(*scale) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        tall = min(max(round(math.sqrt(area / ratio)), 1), height)
        wide = min(max(round(math.sqrt(area * ratio)), 1), width)
        top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
        view = resized(clip[None, :, top : top + tall, left : left + wide], size)
        views.append(view.flip(3) if flip and rng.random() < 0.5 else view)
    return torch.cat(views)
