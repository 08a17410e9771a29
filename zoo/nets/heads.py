"""MLP heads that return output objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
from zoo.nets.frozen import frozen
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
        """The same predictions twice: for x and for the weights, at the price of one.

        Gradients of the first go to x only, those of the second to the weights only: what
        `forward` gives within `frozen`, and of x detached.
        """
        dense: list[Any] = list(self.mlp)
        activations = [layer.activation for layer in dense]
        learnt = any(list(activation.parameters()) for activation in activations)
        if learnt or torch.is_autocast_enabled(x.device.type):
            with frozen(self):
                for_x = self(x)
            return for_x, self(x.detach())
        linears = [*(layer.linear for layer in dense), self.out]
        weights = [p for linear in linears for p in (linear.weight, linear.bias)]
        first, second = _ScalarApart.apply(x, activations, *weights)
        return UnitNormal(first, 0), UnitNormal(second, 0)


class _ScalarApart(torch.autograd.Function):
    """A scalar output of an MLP twice: once for its input's gradient, once for its weights'.

    For a scalar y of each row, the gradients with which two losses reach a layer differ only by a
    factor of the row: both are multiples of dy / d(layer), which is propagated back once.

    Args of `apply`:
        x: (..., features).
        activations: of the hidden layers, without parameters.
        weights: weight and bias of each layer, the scalar one last.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activations: list[nn.Module], *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, sums = [x.flatten(0, -2)], []
        pairs = list(zip(weights[::2], weights[1::2], strict=True))
        for (weight, bias), activation in zip(pairs[:-1], activations, strict=True):
            sums.append(F.linear(inputs[-1].detach(), weight, bias).requires_grad_())
            with torch.enable_grad():
                inputs.append(activation(sums[-1]))
        out = F.linear(inputs[-1], *pairs[-1])
        ctx.inputs, ctx.sums, ctx.weights = inputs, sums, weights[::2]
        return out.view(x.shape[:-1]), out.clone().view(x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for_x, for_weights = (grad.flatten().unsqueeze(1) for grad in grads)
        slope, found = torch.ones_like(for_x), []
        for layer in reversed(range(len(ctx.weights))):
            grad = slope * for_weights
            found += [grad.sum(0), grad.t() @ ctx.inputs[layer]]
            slope = slope @ ctx.weights[layer]
            if layer:
                (slope,) = torch.autograd.grad(ctx.inputs[layer], ctx.sums[layer - 1], slope)
        x_grad = (slope * for_x).view(*grads[0].shape, -1)
        return x_grad, None, *reversed(found)


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
