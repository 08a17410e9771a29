"""Statistics of the batches of two processes are those of the joined batch, gradients too."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from zoo.nets.ranks import gather_ranks, mean_over_ranks


def loss(x: Tensor) -> Tensor:
    return x.var(0).log().sum() + x[:, 0].square().mean()


def rank_main(rank: int, folder: str, x: Tensor, weight: Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    weight = weight.clone().requires_grad_()
    rows = x.chunk(2)[rank] @ weight
    gathered = gather_ranks(rows)
    value = loss(gathered)
    value.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)  # what DDP does
    found = {"gathered": gathered.detach(), "loss": value.detach(), "grad": weight.grad / 2}
    found["mean"] = mean_over_ranks(rows.sum())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_with_the_joined_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 5), torch.randn(5, 3)
    mp.spawn(rank_main, (str(tmp_path), x, weight), nprocs=2)
    joined = weight.clone().requires_grad_()
    expected = loss(x @ joined)
    expected.backward()
    assert joined.grad is not None
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["gathered"], x @ weight)
        torch.testing.assert_close(found["loss"], expected.detach())
        torch.testing.assert_close(found["grad"], joined.grad)
        torch.testing.assert_close(found["mean"], (x @ weight).sum() / 2)


def test_alone_nothing_changes() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_ranks(x) is x
    mean = mean_over_ranks(x)
    assert torch.equal(mean, x)
    assert not mean.requires_grad
