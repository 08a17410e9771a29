"""Multi-block masks: which patches the encoder sees, and which the predictor has to predict.

A block is a rectangle of patches. Its size is drawn once for a batch, from a generator that all
ranks share, so that their steps take equally long; its place is drawn for each image, from one that
is the rank's own. Places are numbers of patches as in `zoo/nets/vit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from zoo.nets.vit import Grid

MOST_DRAWS = 1000


class Masks(NamedTuple):
    """Places of patches, ascending; no target is in its image's context.

    Attributes:
        context: (N, C) int64, seen by the encoder.
        targets: (N, M, K) int64, M sets that are predicted each by itself.
    """

    context: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Masks:
        """The same on a device."""
        return Masks(self.context.to(device), self.targets.to(device))


class Dice(NamedTuple):
    """The two generators of a draw.

    Attributes:
        shared: of what all ranks have in common.
        own: of what they do not.
    """

    shared: np.random.Generator
    own: np.random.Generator

    @classmethod
    def of(cls, seed: int, draw: int, rank: int = 0) -> Dice:
        """Those of the draw with this number; the same arguments give the same numbers."""
        shared, own = (np.random.SeedSequence(seed, spawn_key=(draw, i)) for i in (0, 1 + rank))
        return cls(np.random.default_rng(shared), np.random.default_rng(own))


def block_size(
    rng: np.random.Generator, grid: Grid, scale: tuple[float, float], aspect: tuple[float, float]
) -> Grid:
    """Rows and columns of a block.

    Args:
        rng: of the draw.
        grid: rows and columns of patches.
        scale: smallest and largest share of the patches; drawn uniformly.
        aspect: smallest and largest ratio of rows to columns; drawn uniformly.
    """
    area = rng.uniform(*scale) * grid[0] * grid[1]
    ratio = rng.uniform(*aspect)
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    rows, columns = (min(max(side, 1), most) for side, most in zip(sides, grid, strict=True))
    return rows, columns


def place_blocks(
    rng: np.random.Generator, grid: Grid, size: Grid, images: int, blocks: int
) -> np.ndarray:
    """Blocks of one size in places drawn uniformly: (N, M, P) bool.

    The last row and the last column are as likely as the first (I-JEPA's code never takes them).
    """
    inside = []
    for side, most in zip(size, grid, strict=True):
        first = rng.integers(most - side + 1, size=(images, blocks, 1))
        inside.append((np.arange(most) >= first) & (np.arange(most) < first + side))
    return (inside[0][..., :, None] & inside[1][..., None, :]).reshape(images, blocks, -1)


def image_masks(
    dice: Dice,
    grid: Grid,
    images: int,
    targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: int = 10,
) -> Masks:
    """Masks of I-JEPA (section 3): a large context block without the target blocks.

    Args:
        dice: the generators.
        grid: rows and columns of patches.
        images: N.
        targets: M, target blocks of an image, all of one size.
        target_scale, target_aspect: of a target block, see `block_size`.
        context_scale: of the context block, whose aspect is 1.
        min_keep: fewest patches of a context; on small grids half of what one target leaves, if
            that is less. Where fewer would be left, an image's blocks are drawn again.

    Raises:
        UserError: there is no such context.
    """
    target_size = block_size(dice.shared, grid, target_scale, target_aspect)
    context_size = block_size(dice.shared, grid, context_scale, (1.0, 1.0))
    spare = math.prod(context_size) - math.prod(target_size)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = place_blocks(dice.own, grid, target_size, count, targets)
        context = place_blocks(dice.own, grid, context_size, count, 1)[:, 0]
        return context & ~blocks.any(1), blocks

    context, blocks = _until_enough(draw, images, _feasible(min_keep, spare))
    # Nothing is drawn here: all blocks have as many patches.
    chosen = blocks.reshape(images * targets, -1).nonzero()[1].reshape(images, targets, -1)
    return Masks(stack(dice.own, context), torch.from_numpy(chosen))


def tube_masks(
    dice: Dice,
    grid: Grid,
    clips: int,
    times: int,
    blocks: int,
    scale: float,
    aspect: tuple[float, float] = (0.75, 1.5),
    min_keep: int = 1,
) -> Masks:
    """Masks of V-JEPA (section 3.2): blocks that span the clip, and all that is outside of them.

    Args:
        dice: the generators.
        grid: rows and columns of patches.
        clips: N.
        times: how many patches long the clips are.
        blocks: their number; they may overlap.
        scale: share of a frame that a block covers; a block of the whole frame loses a row.
        aspect: of a block, see `block_size`.
        min_keep: fewest patches of a frame that stay visible; as for `image_masks`.

    Returns:
        Masks with one target set.
    """
    rows, columns = block_size(dice.shared, grid, (scale, scale), aspect)
    cells = grid[0] * grid[1]
    if rows * columns == cells:
        rows, columns = (rows - 1, columns) if rows > 1 else (rows, columns - 1)
    size, spare = (rows, columns), cells - rows * columns

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        target = np.asarray(place_blocks(dice.own, grid, size, count, blocks).any(1))
        return ~target, target

    context, target = _until_enough(draw, clips, _feasible(min_keep, spare))
    frames = cells * torch.arange(times)[:, None]
    seen, hidden = (
        (frames + stack(dice.own, chosen)[:, None]).flatten(1) for chosen in (context, target)
    )
    return Masks(seen, hidden[:, None])


def stack(rng: np.random.Generator, chosen: np.ndarray) -> Tensor:
    """Places (N, L) of the chosen patches (N, P) bool, as many as the fewest of an image.

    Where an image has more, those that stay are drawn.
    """
    fewest = int(chosen.sum(1).min())
    order = np.where(chosen, rng.random(chosen.shape), 2.0).argsort(1)
    return torch.from_numpy(np.sort(order[:, :fewest], 1))


def _feasible(min_keep: int, spare: int) -> int:
    return max(1, min(min_keep, spare // 2))


def _until_enough(
    draw: Callable[[int], tuple[np.ndarray, np.ndarray]], images: int, fewest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws contexts (N, P) and what belongs to them, again where a context is too small."""
    context, others = draw(images)
    for _ in range(MOST_DRAWS):
        small = np.flatnonzero(context.sum(1) < fewest)
        if not len(small):
            return context, others
        context[small], others[small] = draw(len(small))
    raise UserError(
        f"the masks hardly ever leave {fewest} patches of an image visible: choose fewer or "
        "smaller blocks, smaller patches, or a smaller min_keep"
    )
