"""Bricks of the Dreamer networks: linear layers, norms, MLPs and their initialisation.

A `Style` is how a paper builds a layer. `RMS_SILU` is DreamerV3's (Hafner et al., Nature 2025):
weights from a normal distribution truncated at two standard deviations with variance 1 / fan_in,
biases zero, RMSNorm and SiLU. `RELU` and `ELU` are those of PlaNet and of Dreamer V1 and V2: Keras'
defaults, Glorot-uniform weights, biases zero, no norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A standard normal truncated to [-2, 2] has standard deviation 0.8796; this undoes the shrinking.
TRUNCATION_GAIN = 1.1368

NORM_EPS = 1e-4


def init_weight(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fills `weight` in place: truncated normal of standard deviation scale / sqrt(fan_in)."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0)
        weight.mul_(scale * TRUNCATION_GAIN / math.sqrt(fan_in))


class Linear(nn.Linear):
    """`nn.Linear` with the initialisation above; `out_scale` multiplies the initial weights."""

    def __init__(self, in_features: int, out_features: int, out_scale: float = 1.0) -> None:
        self.out_scale = out_scale
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draws new weights."""
        init_weight(self.weight, self.in_features, self.out_scale)
        nn.init.zeros_(self.bias)


class GlorotLinear(nn.Linear):
    """`nn.Linear` with Glorot-uniform weights and zero biases, as Keras starts."""

    def reset_parameters(self) -> None:
        """Draws new weights."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class Conv2d(nn.Conv2d):
    """A stride-1 convolution that keeps the size, with the initialisation above."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding="same")

    def reset_parameters(self) -> None:
        """Draws new weights."""
        assert self.bias is not None
        init_weight(self.weight, self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """A linear map with a block-diagonal weight: block i of the output sees block i of the input.

    Inputs (N, in_features), outputs (N, out_features). The initial variance uses the full input
    width as fan_in, as the official code does.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        if in_features % blocks or out_features % blocks:
            raise ValueError(f"{in_features} -> {out_features} is not divisible by {blocks} blocks")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.weight = nn.Parameter(
            torch.empty(blocks, in_features // blocks, out_features // blocks)
        )
        self.bias = nn.Parameter(torch.zeros(out_features))
        init_weight(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_features) to (N, out_features)."""
        split = x.view(x.shape[0], self.blocks, -1).transpose(0, 1)
        return torch.bmm(split, self.weight).transpose(0, 1).reshape(x.shape[0], -1) + self.bias


class _NormSiLU(torch.autograd.Function):
    """`norm_silu` with a backward of its own, twice as fast as the composed one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(NORM_EPS).rsqrt_()
        normed = x * scale
        scaled = normed * weight
        ctx.save_for_backward(normed, scaled, scale, weight)
        return F.silu(scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        normed, scaled, scale, weight = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grads[0], scaled)
        weight_grad = (grad * normed).flatten(0, -1 - weight.dim()).sum(0)
        grad = grad.mul_(weight)
        along = torch.linalg.vecdot(grad, normed).div_(normed.shape[-1]).unsqueeze(-1)
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale), weight_grad


def norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU(x / sqrt(mean(x^2) + 1e-4) * weight) over the last axis, computed in float32.

    Args:
        x: (..., features).
        weight: (features,), or (K, features) for x (..., K, features).
    """
    wide = x.float()
    if torch.is_grad_enabled() and (wide.requires_grad or weight.requires_grad):
        out: Tensor = _NormSiLU.apply(wide, weight)
    else:
        out = F.silu(F.rms_norm(wide, wide.shape[-1:], None, NORM_EPS) * weight)
    return out.to(x.dtype)


class RMSNormSiLU(nn.Module):
    """`norm_silu` with a learned scale."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., features) to the same shape and dtype."""
        return norm_silu(x, self.weight)


class ImageNormSiLU(RMSNormSiLU):
    """The same over the channels of images (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def randomize_biases(module: nn.Module) -> None:
    """Draws every bias of the `Linear` maps inside uniformly within +- 1 / sqrt(fan_in).

    Outputs that start small or at zero keep their biases at zero. Why: RMSNorm removes the length
    of its input, so that without biases a first layer sees only the direction of an observation and
    not its size until biases have been learnt, at about one learning rate an update.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.out_scale == 1.0:
            nn.init.uniform_(layer.bias, -(layer.in_features**-0.5), layer.in_features**-0.5)


class Style(NamedTuple):
    """How a paper builds its layers.

    Attributes:
        linear: makes the linear map from its two widths.
        activation: makes what follows it, norm included, from its width.
        first: makes the first linear map of an MLP, where it is another one.
    """

    linear: Callable[..., nn.Linear]
    activation: Callable[[int], nn.Module]
    first: Callable[..., nn.Linear] | None = None


RMS_SILU = Style(Linear, RMSNormSiLU)
ELU = Style(GlorotLinear, lambda features: nn.ELU())
RELU = Style(GlorotLinear, lambda features: nn.ReLU())


class Dense(nn.Module):
    """A linear map, then norm and activation of the style."""

    def __init__(self, in_features: int, out_features: int, style: Style = RMS_SILU) -> None:
        super().__init__()
        self.linear = style.linear(in_features, out_features)
        self.activation = style.activation(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        out: Tensor = self.activation(self.linear(x))
        return out


class MLP(nn.Sequential):
    """`layers` times Dense of width `units`."""

    def __init__(self, in_features: int, layers: int, units: int, style: Style = RMS_SILU) -> None:
        sizes = [in_features] + [units] * layers
        first = style._replace(linear=style.first or style.linear)
        super().__init__(
            *(Dense(a, b, style if i else first) for i, (a, b) in enumerate(pairwise(sizes)))
        )
