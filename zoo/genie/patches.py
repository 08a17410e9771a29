"""Frames to patches and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.nets.vit import Grid, patchify


class Patches:
    """Cuts frames (B, T, H, W, C) into patches (B, T, P, patch * patch * C).

    Sides that are no multiples of `patch` are filled up below and at the right with their last
    pixels, which `join` cuts off again.

    Attributes:
        grid: rows and columns of patches.
        values: numbers in a patch.

    Args:
        image: H, W and C.
        patch: side in pixels.
    """

    def __init__(self, image: tuple[int, int, int], patch: int) -> None:
        self.image, self.patch = image, patch
        self.grid: Grid = (-(-image[0] // patch), -(-image[1] // patch))
        self.values = patch * patch * image[2]

    @property
    def count(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    def cut(self, frames: Tensor) -> Tensor:
        """Patches of frames."""
        height, width, _ = self.image
        below, right = self.grid[0] * self.patch - height, self.grid[1] * self.patch - width
        if below or right:
            images = frames.flatten(0, 1).movedim(-1, 1)
            images = F.pad(images, (0, right, 0, below), mode="replicate")
            frames = images.movedim(1, -1).unflatten(0, frames.shape[:2])
        return patchify(frames, self.patch).unflatten(1, (frames.shape[1], -1))

    def join(self, patches: Tensor) -> Tensor:
        """The inverse of `cut`."""
        lead, (rows, columns), side = patches.shape[:2], self.grid, self.patch
        parts = patches.reshape(*lead, rows, columns, side, side, -1).transpose(3, 4)
        frames = parts.reshape(*lead, rows * side, columns * side, -1)
        return frames[:, :, : self.image[0], : self.image[1]]
