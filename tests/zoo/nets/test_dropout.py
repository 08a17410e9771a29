"""Dropout: shares, scale, gradients, and the attention that uses it."""

import pytest
import torch
import torch.nn.functional as F

from zoo.nets.dropout import dropout
from zoo.nets.transformer import attention


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1_000_003,), (7, 59, 1000)])
def test_elements_are_dropped_by_chance_and_the_mean_is_kept(
    chance: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(shape), chance)
    assert y.shape == shape
    assert (y == 0).double().mean().item() == pytest.approx(chance, abs=4e-3)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - chance)], rel=1e-4)
    # Neighbours, which share a draw, are independent.
    kept = (y != 0).double().flatten()
    for lag in (1, 2, 3, 4):
        both = (kept[lag:] * kept[:-lag]).mean().item()
        assert both == pytest.approx((1 - chance) ** 2, abs=4e-3)


def test_gradients_pass_where_elements_do() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y, x * x.grad)
    assert (x.grad == 0).any()


def test_nothing_is_dropped_outside_of_training_and_everything_at_one() -> None:
    x = torch.randn(10)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert (dropout(x, 1.0) == 0).all()


def test_draws_repeat_with_the_seed() -> None:
    x = torch.ones(100)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(dropout(x, 0.5))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], dropout(x, 0.5))


def test_attention_with_dropout_is_that_without_on_average() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    mask = torch.zeros(5, 5).masked_fill_(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(attention(query, key, value, mask, 1e-9), expected)
    queries = query.expand(20_000, -1, -1, -1)
    many = attention(queries, key, value, mask, 0.2).mean(0, keepdim=True)
    torch.testing.assert_close(many, expected, atol=0.03, rtol=0)
