"""Looking up gives what multiplying gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nets.distributions import OneHot
from zoo.nets.one_hot import FEW_ROWS, OneHotLinear, one_hot_linear

STOCH, CLASSES, OUT = 3, 4, 6


def latents(rows: int) -> tuple[Tensor, Tensor]:
    """Probabilities, and samples of which the first are zeros, as before an episode."""
    torch.manual_seed(0)
    probs = torch.randn(rows, STOCH, CLASSES).softmax(-1).requires_grad_()
    keep = (torch.arange(rows) > 1).float().view(-1, 1, 1)
    return probs, (OneHot(probs).sample() * keep).flatten(1)


@pytest.mark.parametrize("rows", [FEW_ROWS - 1, FEW_ROWS])
@pytest.mark.parametrize("dense", [0, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients_equal_the_product(rows: int, dense: int, has_bias: bool) -> None:
    probs, z = latents(rows)
    plain = torch.randn(rows, dense, requires_grad=True)
    weight = torch.randn(OUT, dense + STOCH * CLASSES, requires_grad=True)
    bias = torch.randn(OUT, requires_grad=True) if has_bias else None
    x = torch.cat([plain, z], 1).unsqueeze(0)
    found, expected = one_hot_linear(x, weight, bias, dense, CLASSES), F.linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    wrt = [t for t in (probs, weight, bias, plain if dense else None) if t is not None]
    ours, theirs = (
        torch.autograd.grad((out * upstream).sum(), wrt, retain_graph=True)
        for out in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    layer = OneHotLinear(STOCH * CLASSES + 1, OUT, dense=1, classes=CLASSES)
    x = F.pad(latents(FEW_ROWS)[1].detach(), (1, 0))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is None
    x.requires_grad_()
    layer.requires_grad_(False)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


def test_autocast_multiplies_in_its_own_precision() -> None:
    layer = OneHotLinear(STOCH * CLASSES, OUT, dense=0, classes=CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(latents(FEW_ROWS)[1]).dtype == torch.bfloat16
