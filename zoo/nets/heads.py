"""MLP heads that return output objects."""

from __future__ import annotations

from torch import Tensor, nn

from datamodules.spec import ActionSpec
from zoo.nets.distributions import Binary, BoundedNormal, Categorical, TwoHot, symexp_bins
from zoo.nets.layers import MLP, Linear


class TwoHotHead(nn.Module):
    """Scalars as a categorical over symexp-spaced bins; starts as exactly zero."""

    bins: Tensor

    def __init__(self, features: int, layers: int, units: int, bins: int = 255) -> None:
        super().__init__()
        self.mlp = MLP(features, layers, units)
        self.out = Linear(units, bins, out_scale=0.0)
        self.register_buffer("bins", symexp_bins(bins), persistent=False)

    def forward(self, x: Tensor) -> TwoHot:
        """Maps (..., features) to a distribution over (...)."""
        return TwoHot(self.out(self.mlp(x)), self.bins)


class BinaryHead(nn.Module):
    """A probability."""

    def __init__(self, features: int, layers: int, units: int) -> None:
        super().__init__()
        self.mlp = MLP(features, layers, units)
        self.out = Linear(units, 1)

    def forward(self, x: Tensor) -> Binary:
        """Maps (..., features) to probabilities (...)."""
        return Binary(self.out(self.mlp(x)).squeeze(-1))


class ActionHead(nn.Module):
    """A policy over encoded actions: categorical, several categoricals, or bounded normal."""

    def __init__(self, features: int, layers: int, units: int, action: ActionSpec) -> None:
        super().__init__()
        self.action = action
        self.mlp = MLP(features, layers, units)
        self.out = Linear(units, action.encoded_size, out_scale=0.01)
        if action.kind == "box":
            self.std = Linear(units, action.encoded_size, out_scale=0.01)

    def forward(self, x: Tensor) -> Categorical | BoundedNormal:
        """Maps (..., features) to a distribution over encoded actions (..., A)."""
        x = self.mlp(x)
        if self.action.kind == "box":
            return BoundedNormal(self.out(x), self.std(x))
        return Categorical(self.out(x), self.action.nvec)
