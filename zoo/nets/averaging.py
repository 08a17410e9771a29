"""Slow copies of networks."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """Moves every parameter of `slow` towards `fast`: slow += rate * (fast - slow).

    Args:
        slow, fast: modules of the same structure.
        rate: 0 to 1.
    """
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)
