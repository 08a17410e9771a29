"""Batches that are spread over the processes of a training, seen as one.

Under DDP each rank computes its loss and gradients are averaged over ranks. A loss of statistics of
the batch, as its variance, is not the mean of the ranks' own: here each rank gets the whole batch.
Without process group, all of this is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def gather_ranks(x: Tensor) -> Tensor:
    """The rows (N, ...) of all ranks, in their order, (ranks * N, ...); gradients pass.

    Every rank calls it, with the same shape. A loss of the result, computed on each rank, has the
    gradient of one process with the joined batch once DDP has averaged over the ranks.
    """
    if _ranks() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of the ranks' x, without gradient; every rank calls it."""
    if _ranks() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / _ranks()


@torch.no_grad()
def from_first_rank(x: Tensor) -> Tensor:
    """The x of rank 0, without gradient; every rank calls it, with the same shape."""
    if _ranks() == 1:
        return x.detach()
    x = x.detach().clone()
    dist.broadcast(x, 0)
    return x


def own_rows(joined: Tensor) -> Tensor:
    """Of the rows of all ranks, as `gather_ranks` gives them, those of this one."""
    return joined if _ranks() == 1 else joined.chunk(_ranks())[dist.get_rank()]


def zero_of(parts: Iterable[nn.Module]) -> Tensor:
    """Zero, which gives all parameters of these parts gradients of zero.

    Plain DDP waits for every parameter in every update, also of parts that do not learn now.
    """
    firsts = [parameter.flatten()[0] for part in parts for parameter in part.parameters()]
    return torch.stack(firsts).sum() * 0.0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(_ranks())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()  # the losses of all ranks depend on these rows
        dist.all_reduce(total)
        return total.chunk(_ranks())[dist.get_rank()]


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
