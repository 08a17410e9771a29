"""The target encoder, a slow copy of the encoder: how it moves, and signs of collapse."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.vit import Grid, coordinates, take


def momentum(update: int, total: int, ends: tuple[float, float]) -> float:
    """Share of itself that the target keeps after an update: linear from the first to the last.

    Args:
        update: number of the update, from 0; those after `total` have the last value.
        total: updates of the schedule.
        ends: value at update 0 and at update `total`.
    """
    return ends[0] + (ends[1] - ends[0]) * min(1.0, update / total)


def cosine(update: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at update 0 to `end` at `total` and after."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, update / total)))


def normalized(features: Tensor) -> Tensor:
    """LayerNorm over features (..., D), without learned scale and offset."""
    return F.layer_norm(features, features.shape[-1:])


def feature_std(features: Tensor) -> Tensor:
    """How much features (N, P, D) differ between clips; 0 where they have collapsed.

    The standard deviation over the N clips of each feature at each place, and the mean of those:
    features that only tell the place count as collapsed.
    """
    return features.float().std(0, correction=0).mean()


def copied(target: Tensor, seen: Tensor, wanted: Tensor, grid: Grid) -> Tensor:
    """What a predictor would say that copies: at each place the target of the nearest seen patch.

    Args:
        target: (N, P, D) features of all patches.
        seen: (N, C) places of the visible patches.
        wanted: (N, M, K) places to predict.
        grid: rows and columns of patches.

    Returns:
        (N, M, K, D).
    """
    times = target.shape[1] // (grid[0] * grid[1])
    where = coordinates(grid, times).to(target.device, torch.float32)
    distance = torch.cdist(where[wanted.flatten(1)], where[seen])
    nearest = seen.gather(1, distance.argmin(-1))
    return take(target, nearest.view_as(wanted))


@torch.no_grad()
def drift(slow: nn.Module, fast: nn.Module) -> Tensor:
    """|slow - fast| / |fast| of all weights of two modules of the same structure."""
    theirs: list[Tensor] = list(slow.parameters())
    ours: list[Tensor] = list(fast.parameters())
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(theirs, ours)))
    return apart.norm() / torch.stack(torch._foreach_norm(ours)).norm()
