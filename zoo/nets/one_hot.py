"""Linear maps of one-hot vectors by looking up instead of multiplying."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.nets.layers import GlorotLinear

FEW_ROWS = 128  # are multiplied faster than a weight is transposed for looking up


class _OneHotLinear(torch.autograd.Function):
    """`one_hot_linear` of (N, dense + S * C); straight-through gradients need the whole product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dense: int, classes: int
    ) -> Tensor:
        # Row 0 of the table is for vectors of zeros; `rank` is 1 for the first class.
        rank, table = _ranks(x[:, dense:], classes), weight[:, dense:].t()
        first = torch.arange(0, len(table), classes)
        index = torch.where(rank > 0, rank + first, 0)
        out = F.embedding_bag(index, F.pad(table, (0, 0, 1, 0)), mode="sum")
        ctx.save_for_backward(x[:, :dense], index, weight)
        if dense:
            out.addmm_(x[:, :dense], weight[:, :dense].t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (plain, index, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight_grad = None
        if needs_weight:
            dense = plain.shape[1]
            table = grad.new_zeros(weight.shape[1] - dense + 1, grad.shape[1])
            for row in index.unbind(1):
                table.index_add_(0, row, grad)
            weight_grad = torch.cat([grad.t() @ plain, table[1:].t()], 1)
        x_grad = grad @ weight if needs_x else None
        return x_grad, weight_grad, grad.sum(0) if needs_bias else None, None, None


def _ranks(z: Tensor, classes: int) -> Tensor:
    """1 + the class of each one-hot vector in z (N, S * C), 0 for zeros: (N, S) int64."""
    numbers = torch.arange(1.0, classes + 1).unsqueeze(1)
    return (z @ torch.kron(torch.eye(z.shape[1] // classes), numbers)).long()


def one_hot_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dense: int, classes: int
) -> Tensor:
    """`F.linear` of inputs that end in one-hot vectors, several times faster on CPU.

    Args:
        x: (..., dense + S * C): plain numbers, then S vectors of C classes which are one-hot, or
            zeros, up to straight-through gradients.
        weight: (out, dense + S * C).
        bias: (out,) or None.
        dense: how many plain numbers there are.
        classes: C.

    Returns:
        (..., out).
    """
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    rows = x.flatten(0, -2)
    if x.device.type != "cpu" or not plain or len(rows) < FEW_ROWS:
        return F.linear(x, weight, bias)
    out: Tensor = _OneHotLinear.apply(rows, weight, bias, dense, classes)
    return out.unflatten(0, x.shape[:-1])


class OneHotLinear(GlorotLinear):
    """`GlorotLinear` of plain numbers followed by one-hot vectors (..., dense + S * C)."""

    def __init__(self, in_features: int, out_features: int, dense: int, classes: int) -> None:
        super().__init__(in_features, out_features)
        self.dense, self.classes = dense, classes

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return one_hot_linear(x, self.weight, self.bias, self.dense, self.classes)
