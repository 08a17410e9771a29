"""Mean and deviation of what passes by in parts, on all ranks together."""

from __future__ import annotations

import torch
from torch import Tensor


def over_ranks(sums: Tensor, ranks: int, device: torch.device) -> Tensor:
    """Adds float64 sums up over all ranks; on the CPU."""
    if ranks > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    return sums.cpu()


class Moments:
    """Count, sum and sum of squares of rows (n, size), in float64."""

    def __init__(self, size: int) -> None:
        self.sums = torch.zeros(3, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Counts rows (n, size) in."""
        rows = rows.cpu().double()
        self.sums += torch.stack([torch.ones_like(rows), rows, rows.square()]).sum(1)

    def mean_and_std(self, ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation (size,) over all ranks, float32; the deviation of constants is 1."""
        count, total, squares = over_ranks(self.sums, ranks, device)
        mean = total / count.clamp(min=1)
        std = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(std > 1e-8, std, torch.ones_like(std)).float()


class Range:
    """Least and most of D variables, batch by batch."""

    def __init__(self, size: int) -> None:
        self._reach = torch.full((2, size), -torch.inf)  # of -x and x

    def add(self, x: Tensor) -> None:
        """Takes x (N, D) into account."""
        if len(x):
            self._reach = torch.maximum(self._reach, torch.stack([-x, x]).amax(1).float().cpu())

    def low_and_high(self, ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both (D,), over all ranks."""
        reach = self._reach.to(device)
        if ranks > 1:
            torch.distributed.all_reduce(reach, torch.distributed.ReduceOp.MAX)
        return -reach[0], reach[1]
