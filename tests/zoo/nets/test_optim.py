"""LaProp and adaptive gradient clipping against a reference in plain numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from zoo.nets.optim import ClippedAdam, LaProp, adaptive_clip_, schedule

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


def flat(groups: list[list[nn.Parameter]]) -> list[nn.Parameter]:
    return [p for group in groups for p in group]


class TestClippedAdam:
    """Against one `torch.optim.Adam` per group, each after `clip_grad_norm_`."""

    RATES, EPSILONS, CLIP = (0.1, 0.02), (1e-5, 1e-3), 2.0

    def groups(self) -> list[list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(0)
        sizes = ([(3, 2), (4,)], [(5,), (1,)])
        return [
            [nn.Parameter(torch.randn(size, generator=generator)) for size in group]
            for group in sizes
        ]

    def set_gradients(self, groups: list[list[nn.Parameter]], step: int) -> None:
        """The first group's norm is far above the clip, the second's below."""
        generator = torch.Generator().manual_seed(step)
        for group, size in zip(groups, (30.0, 0.1), strict=True):
            for p in group:
                p.grad = size * torch.randn(p.shape, generator=generator)

    def clipped(self, groups: list[list[nn.Parameter]], decay: float = 0.0) -> ClippedAdam:
        parts = zip(groups, self.RATES, self.EPSILONS, strict=True)
        settings = [{"params": group, "lr": lr, "eps": eps} for group, lr, eps in parts]
        return ClippedAdam(settings, self.CLIP, weight_decay=decay)

    @pytest.mark.parametrize("decay", [0.0, 0.03])
    def test_equals_separate_adams(self, decay: float) -> None:
        ours, theirs = self.groups(), self.groups()
        optimizer = self.clipped(ours, decay)
        parts = zip(theirs, self.RATES, self.EPSILONS, strict=True)
        separate = [torch.optim.Adam(group, lr=lr, eps=eps) for group, lr, eps in parts]
        for step in range(5):
            self.set_gradients(ours, step)
            self.set_gradients(theirs, step)
            optimizer.step()
            for group, adam in zip(theirs, separate, strict=True):
                torch.nn.utils.clip_grad_norm_(group, self.CLIP)
                with torch.no_grad():
                    for p in group:
                        p.mul_(1 - decay)  # whatever the learning rate
                adam.step()
            for found, expected in zip(flat(ours), flat(theirs), strict=True):
                torch.testing.assert_close(found, expected)

    def test_each_group_is_clipped_by_its_own_norm(self) -> None:
        groups = self.groups()
        optimizer = self.clipped(groups)
        self.set_gradients(groups, 0)
        before = [[p.grad.clone() for p in group] for group in groups]  # type: ignore[union-attr]
        optimizer.step()
        norms = [torch.cat([g.flatten() for g in grads]).norm() for grads in before]
        assert norms[1] < self.CLIP < norms[0]
        scales = (self.CLIP / norms[0], torch.ones(()))
        for group, grads, scale in zip(groups, before, scales, strict=True):
            for p, g in zip(group, grads, strict=True):
                assert p.grad is not None
                torch.testing.assert_close(p.grad, scale * g)

    def test_weight_decay_takes_its_share(self) -> None:
        groups = self.groups()
        optimizer = self.clipped(groups, decay=0.1)
        starts = [p.detach().clone() for p in flat(groups)]
        for _ in range(3):
            for p in flat(groups):
                p.grad = torch.zeros_like(p)
            optimizer.step()
        for p, start in zip(flat(groups), starts, strict=True):
            torch.testing.assert_close(p.detach(), 0.9**3 * start)

    def test_epsilon_is_shared_where_a_group_has_none(self) -> None:
        p = nn.Parameter(torch.ones(1))
        optimizer = ClippedAdam([{"params": [p], "lr": 0.5}], 1.0, eps=1.0)
        p.grad = torch.ones(1)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.5 * 1 / (1 + 1.0)]))

    def test_returns_the_loss_of_the_closure(self) -> None:
        p = nn.Parameter(torch.tensor([3.0]))
        optimizer = ClippedAdam([{"params": [p], "lr": 0.1}], 1.0)

        def closure() -> Tensor:
            loss = p.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 9.0
        assert p.item() == pytest.approx(2.9)

    def test_its_state_survives_a_round_trip(self) -> None:
        first, second = self.groups(), self.groups()
        optimizer, resumed = self.clipped(first, 0.01), self.clipped(second, 0.01)
        for step in range(2):
            self.set_gradients(first, step)
            optimizer.step()
        with torch.no_grad():
            for p, q in zip(flat(first), flat(second), strict=True):
                q.copy_(p)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for groups, opt in ((first, optimizer), (second, resumed)):
            self.set_gradients(groups, 2)
            opt.step()
        assert all(torch.equal(p, q) for p, q in zip(flat(first), flat(second), strict=True))
