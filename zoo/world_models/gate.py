"""The gate before evolution: do policies that do not look earn in dreams what they really earn?

A controller is only as good as the dream it evolved in. What "always the same action" and "random
actions" earn there and in reality says whether to trust it, before any time is spent on it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from datamodules.spec import Spec

# A dream of a fixed policy may promise up to so many times what it really earns, or as little.
GATE = 2.0


def fixed_policies(spec: Spec) -> dict[str, Tensor]:
    """Policies that do not look: for each its actions (n, ...), one of which is drawn every step.

    Discrete: each action alone, and all ("random"). Otherwise 256 uniformly random actions.
    """
    action = spec.action
    generator = torch.Generator().manual_seed(0)
    if action.kind == "discrete":
        choices = torch.arange(action.n)
        return {f"always_{i}": choices[i : i + 1] for i in range(action.n)} | {"random": choices}
    if action.kind == "box":
        low, high = torch.tensor(action.low), torch.tensor(action.high)
        share = torch.rand(256, len(action.low), generator=generator)
        return {"random": low + share * (high - low)}
    parts = [torch.randint(n, (256,), generator=generator) for n in action.nvec]
    return {"random": torch.stack(parts, -1)}


def agreement(promised: float, earned: float) -> float:
    """How many times larger one of two scores is than the other; inf if they differ in sign."""
    if promised == earned:
        return 1.0
    if promised * earned <= 0:
        return math.inf
    ratio = promised / earned
    return max(ratio, 1 / ratio)


def judge(names: Iterable[str], promised: Tensor, earned: Tensor) -> dict[str, float]:
    """The `agreement` of each policy's scores in dreams and in reality; warns where it is bad.

    Args:
        names: of the policies.
        promised, earned: their mean scores (n,) in dreams and in the environment.
    """
    ratios = {}
    for name, dreamed, real in zip(names, promised.tolist(), earned.tolist(), strict=True):
        ratios[name] = agreement(dreamed, real)
        if ratios[name] > GATE:
            warnings.warn(
                f"the dream is not to be trusted: the policy '{name}' earns {dreamed:.1f} "
                f"there and {real:.1f} in the environment; what evolves in it may fail. "
                "Train M for longer or on other data, or raise the temperature",
                stacklevel=2,
            )
    return ratios
