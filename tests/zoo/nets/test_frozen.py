"""Gradients pass through frozen networks, but not into them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.nets.frozen import frozen


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_the_input_gets_its_gradient_and_the_weights_get_none(net: nn.Sequential) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    with frozen(net):
        loss = net(x).sum()
    loss.backward()  # outside, as a trainer does
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in net.parameters())


def test_what_was_computed_before_still_trains(net: nn.Sequential) -> None:
    x = torch.randn(2, 3)
    before = net(x).sum()
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    with frozen(net):
        inside = net(x.requires_grad_()).sum()
    (before + inside).backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad)


def test_flags_are_as_before_afterwards(net: nn.Sequential) -> None:
    net[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    assert flags == [True, False, True, True]
    with frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags


def test_flags_are_restored_after_an_error(net: nn.Sequential) -> None:
    with pytest.raises(RuntimeError, match="within"), frozen(net):
        raise RuntimeError("within")
    assert all(p.requires_grad for p in net.parameters())


def test_missing_parts_and_several_parts(net: nn.Sequential) -> None:
    other = nn.Linear(1, 1)
    with frozen(None, net, other, None):
        assert not any(p.requires_grad for p in [*net.parameters(), *other.parameters()])
    assert all(p.requires_grad for p in [*net.parameters(), *other.parameters()])
    with frozen(None):
        pass


def test_can_be_nested(net: nn.Sequential) -> None:
    with frozen(net):
        with frozen(net[0]):
            pass
        assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
