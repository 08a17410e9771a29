"""Lambda-returns and the return normaliser against plain loops and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.returns import ReturnNormalizer, lambda_returns


def plain(reward: Tensor, value: Tensor, discount: Tensor, last: Tensor, lam: float) -> Tensor:
    rows, steps = reward.shape
    returns = torch.zeros(rows, steps - 1)
    for n in range(rows):
        following = value[n, -1].item()
        for t in reversed(range(steps - 1)):
            share = 0.0 if last[n, t + 1] else lam
            mixed = (1 - share) * value[n, t + 1].item() + share * following
            following = reward[n, t + 1].item() + discount[n, t + 1].item() * mixed
            returns[n, t] = following
    return returns


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_equals_a_plain_loop(lam: float, truncated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 3, 7, generator=generator)
    discount = torch.rand(3, 7, generator=generator)
    discount[0, 3] = 0  # terminal
    last = torch.zeros(3, 7, dtype=torch.bool)
    if truncated:
        last[0, 3] = last[1, 2] = last[2, 6] = last[2, 0] = True
    found = lambda_returns(reward, value, discount, last if truncated else None, lam)
    torch.testing.assert_close(found, plain(reward, value, discount, last, lam))


def test_by_hand() -> None:
    # lambda 1/2, discount 1, rewards 1 2 3 4 on arriving, values 10 20 30 40.
    reward = torch.tensor([[99.0, 1.0, 2.0, 3.0, 4.0]])
    value = torch.tensor([[99.0, 10.0, 20.0, 30.0, 40.0]])
    # R3 = 4 + 40 = 44; R2 = 3 + (30 + 44) / 2 = 40; R1 = 2 + (20 + 40) / 2 = 32;
    # R0 = 1 + (10 + 32) / 2 = 22
    found = lambda_returns(reward, value, torch.ones(1, 5), None, 0.5)
    assert found.tolist() == [[22.0, 32.0, 40.0, 44.0]]


def test_a_terminal_step_ends_the_return_and_a_truncated_one_bootstraps() -> None:
    reward = torch.tensor([[0.0, 1.0, 2.0, 50.0]])
    value = torch.tensor([[0.0, 10.0, 20.0, 70.0]])
    last = torch.tensor([[False, False, True, False]])
    truncated = lambda_returns(reward, value, torch.ones(1, 4), last, 1.0)
    assert truncated[0, :2].tolist() == [1 + 2 + 20.0, 2 + 20.0]
    discount = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    ended = lambda_returns(reward, value, discount, last, 1.0)
    assert ended[0, :2].tolist() == [3.0, 2.0]


def test_lambda_zero_looks_one_step_ahead_and_one_to_the_end() -> None:
    reward = torch.ones(1, 4)
    value = torch.tensor([[0.0, 5.0, 6.0, 7.0]])
    discount = torch.full((1, 4), 0.5)
    assert lambda_returns(reward, value, discount, None, 0.0).tolist() == [[3.5, 4.0, 4.5]]
    # 1 + 0.5 * 7 = 4.5; 1 + 0.5 * 4.5 = 3.25; 1 + 0.5 * 3.25 = 2.625
    assert lambda_returns(reward, value, discount, None, 1.0).tolist() == [[2.625, 3.25, 4.5]]


class TestReturnNormalizer:
    returns = torch.arange(0.0, 101.0).view(101, 1)  # the 5th percentile is 5, the 95th is 95

    def test_averages_percentiles_from_zero_without_correction(self) -> None:
        normalizer = ReturnNormalizer(rate=0.1)
        normalizer.update(self.returns)
        assert normalizer.low.item() == pytest.approx(0.5)
        assert normalizer.high.item() == pytest.approx(9.5)
        normalizer.update(self.returns)
        assert normalizer.high.item() == pytest.approx(95 * (1 - 0.9**2))
        assert normalizer.scale.item() == pytest.approx(90 * (1 - 0.9**2))

    def test_percentiles_are_interpolated(self) -> None:
        normalizer = ReturnNormalizer(rate=1.0)
        normalizer.update(torch.tensor([0.0, 10.0]))
        assert normalizer.low.item() == pytest.approx(0.5)
        assert normalizer.high.item() == pytest.approx(9.5)

    def test_small_ranges_are_not_blown_up(self) -> None:
        normalizer = ReturnNormalizer()
        assert normalizer.scale.item() == 1.0
        normalizer.update(self.returns)  # 1% of 90
        assert normalizer.scale.item() == 1.0
        normalizer.update(self.returns)
        assert normalizer.scale.item() == pytest.approx(90 * (1 - 0.99**2))

    def test_its_state_is_saved(self) -> None:
        first, second = ReturnNormalizer(), ReturnNormalizer()
        first.update(self.returns)
        assert set(first.state_dict()) == {"low", "high"}
        second.load_state_dict(first.state_dict())
        assert second.high == first.high
