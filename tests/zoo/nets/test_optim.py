"""LaProp and adaptive gradient clipping against a reference in plain numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from zoo.nets.optim import LaProp, adaptive_clip_, schedule

STARTS = [[3.0, -4.0], [0.5], [0.0, 0.0, 0.0]]


def gradients(step: int) -> list[list[float]]:
    """Some are larger than the clip allows, some are smaller, one is zero."""
    return [[0.1 * step, -0.2], [5.0 - step], [0.0, 1e-4 * step, 0.0]]


def reference(steps: int, lr: float, warmup: int, agc: float, eps: float) -> list[list[float]]:
    b1, b2 = 0.9, 0.999
    weights = [list(start) for start in STARTS]
    momentum = [[0.0] * len(w) for w in weights]
    square = [[0.0] * len(w) for w in weights]
    for n in range(1, steps + 1):
        rate = lr * min(1.0, (n - 1) / warmup) if warmup else lr
        for w, m, v, g in zip(weights, momentum, square, gradients(n), strict=True):
            norm = math.sqrt(sum(x * x for x in g))
            limit = agc * max(1e-3, math.sqrt(sum(x * x for x in w)))
            clip = 1 / max(1.0, norm / limit) if agc else 1.0
            for i, raw in enumerate(g):
                x = raw * clip
                v[i] = b2 * v[i] + (1 - b2) * x * x
                scaled = x / (math.sqrt(v[i] / (1 - b2**n)) + eps)
                m[i] = b1 * m[i] + (1 - b1) * scaled
            for i in range(len(w)):
                w[i] -= rate * m[i] / (1 - b1**n)
    return weights


def optimised(steps: int, **options: float) -> list[Tensor]:
    params = [nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in STARTS]
    optimizer = LaProp(params, **options)  # type: ignore[arg-type]
    for n in range(1, steps + 1):
        for p, g in zip(params, gradients(n), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize(("warmup", "agc"), [(0, 0.0), (0, 0.3), (4, 0.3)])
def test_equals_the_scalar_reference(steps: int, warmup: int, agc: float) -> None:
    options = {"lr": 0.05, "warmup": warmup, "agc": agc, "eps": 1e-20}
    expected = reference(steps, **options)  # type: ignore[arg-type]
    for found, values in zip(optimised(steps, **options), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64))


def test_the_first_step_of_a_warm_up_moves_nothing() -> None:
    for found, start in zip(optimised(1, lr=0.1, warmup=10), STARTS, strict=True):
        assert found.tolist() == start
    assert optimised(2, lr=0.1, warmup=10)[0].tolist() != STARTS[0]


def test_the_first_step_has_the_size_of_the_learning_rate() -> None:
    moved = optimised(1, lr=0.01, warmup=0, agc=0.0)[0] - torch.tensor(STARTS[0]).double()
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.01], dtype=torch.float64))


def test_clipping_by_hand() -> None:
    params = [torch.tensor([3.0, 4.0]), torch.zeros(2)]
    grads = [torch.tensor([30.0, 40.0]), torch.tensor([0.0, 1.0])]
    adaptive_clip_(grads, params, 0.3)
    torch.testing.assert_close(grads[0], torch.tensor([0.9, 1.2]))  # norm 0.3 * 5
    torch.testing.assert_close(grads[1], torch.tensor([0.0, 3e-4]))  # norm 0.3 * 1e-3
    small = [torch.tensor([0.1, 0.0])]
    adaptive_clip_(small, params[:1], 0.3)
    assert small[0].tolist() == pytest.approx([0.1, 0.0])


def test_parameters_without_gradient_stay() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LaProp([used, unused], lr=0.1, warmup=0)
    used.grad = torch.ones(2)
    optimizer.step()
    assert unused.tolist() == [1.0, 1.0]
    assert used.tolist() != [1.0, 1.0]


def test_its_state_survives_a_round_trip() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 2)
    second = copy.deepcopy(first)
    optimizer = LaProp(first.parameters(), lr=0.1, warmup=3)
    for _ in range(2):
        first(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    resumed = LaProp(second.parameters(), lr=0.1, warmup=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((first, optimizer), (second, resumed)):
        net(torch.ones(1, 3)).sum().backward()
        opt.step()
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (1.0, 0.9)}])
def test_refuses_impossible_arguments(options: dict) -> None:
    with pytest.raises(ValueError, match="LaProp needs"):
        LaProp([nn.Parameter(torch.ones(1))], **options)


def test_annealing_falls_to_a_tenth() -> None:
    factors = [schedule(step, warmup=4, anneal=14) for step in (0, 2, 4, 9, 14, 100)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert [schedule(step, 0, 0) for step in (0, 1000)] == [1.0, 1.0]
    # At the fifth step the factor is 1 - 0.9 * 4 / 5 = 0.28.
    moved = [optimised(n, lr=0.01, warmup=0, anneal=5) for n in (4, 5)]
    constant = [optimised(n, lr=0.01, warmup=0) for n in (4, 5)]
    zero = 0  # the first parameter, of which clipping changes too little to matter
    annealed_step = moved[1][zero] - moved[0][zero]
    constant_step = constant[1][zero] - constant[0][zero]
    torch.testing.assert_close(annealed_step, 0.28 * constant_step, rtol=0.02, atol=0)
