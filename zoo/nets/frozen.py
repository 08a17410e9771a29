"""Gradients through networks, but not into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, the modules' parameters are constants: gradients pass to the inputs only.

    This is how one summed loss trains an actor through a world model without training the model.
    None stands for a part that a model does not have.
    """
    parts = nn.ModuleList(module for module in modules if module is not None)
    learning = [p for p in parts.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class ScalarApart(torch.autograd.Function):
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
