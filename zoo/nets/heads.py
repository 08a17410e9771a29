"""MLP heads that return output objects."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from datamodules.spec import ActionSpec
from zoo.nets.distributions import (
    Binary,
    BoundedNormal,
    Categorical,
    Policy,
    TwoHot,
    UnitNormal,
    symexp_bins,
)
from zoo.nets.frozen import ScalarApart
from zoo.nets.layers import MLP, RMS_SILU, Linear, Style


class ScalarHead(nn.Module):
    """A scalar as the mean of a normal with unit variance (PlaNet, Dreamer V1 and V2)."""

    def __init__(self, features: int, layers: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__()
        self.mlp = MLP(features, layers, units, style)
        self.out = style.linear(units, 1)

    def forward(self, x: Tensor) -> UnitNormal:
        """Maps (..., features) to a distribution over (...)."""
        return UnitNormal(self.out(self.mlp(x)).squeeze(-1), 0)

    def apart(self, x: Tensor) -> tuple[UnitNormal, UnitNormal]:
        """The same predictions twice: for x and for the weights, in one pass.

        Gradients of the first go to x only, those of the second to the weights only: what
        `forward` would give within `frozen`, and of x detached.
        """
        layers = [dense.linear for dense in self.mlp]
        weights = [p for layer in (*layers, self.out) for p in (layer.weight, layer.bias)]
        activations = [dense.activation for dense in self.mlp]
        for_x, for_weights = ScalarApart.apply(x, activations, *weights)
        return UnitNormal(for_x, 0), UnitNormal(for_weights, 0)


class TwoHotHead(nn.Module):
    """Scalars as a categorical over symexp-spaced bins; starts as exactly zero (DreamerV3)."""

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

    def __init__(self, features: int, layers: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__()
        self.mlp = MLP(features, layers, units, style)
        self.out = style.linear(units, 1)

    def forward(self, x: Tensor) -> Binary:
        """Maps (..., features) to probabilities (...)."""
        return Binary(self.out(self.mlp(x)).squeeze(-1))


class ActionHead(nn.Module):
    """A policy over encoded actions: one categorical or several, or a distribution over a box.

    Args:
        features, layers, units: width of the input, layers and width of the MLP.
        action: the action space.
        style: of the layers.
        box: makes the policy over a box from two raw outputs (..., A) for mean and deviation.
        out_scale: factor of the initial weights of the outputs, for styles that take one.
    """

    def __init__(
        self,
        features: int,
        layers: int,
        units: int,
        action: ActionSpec,
        style: Style = RMS_SILU,
        box: Callable[[Tensor, Tensor], Policy] = BoundedNormal,
        out_scale: float | None = 0.01,
    ) -> None:
        super().__init__()
        self.action, self.box = action, box
        self.mlp = MLP(features, layers, units, style)
        scale = {} if out_scale is None else {"out_scale": out_scale}
        self.out = style.linear(units, action.encoded_size, **scale)
        if action.kind == "box":
            self.std = style.linear(units, action.encoded_size, **scale)

    def forward(self, x: Tensor) -> Policy:
        """Maps (..., features) to a distribution over encoded actions (..., A)."""
        x = self.mlp(x)
        if self.action.kind == "box":
            return self.box(self.out(x), self.std(x))
        return Categorical(self.out(x), self.action.nvec)
