"""Heads: what they start as, and which distributions they give."""

from __future__ import annotations

import pytest
import torch

from datamodules.spec import ActionSpec
from zoo.nets.distributions import (
    BoundedNormal,
    Categorical,
    TanhNormal,
    TruncatedNormal,
    UnitNormal,
)
from zoo.nets.heads import ActionHead, BinaryHead, ScalarHead, TwoHotHead
from zoo.nets.layers import ELU, RMS_SILU, GlorotLinear, Style

X = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0))


def test_two_hot_head_starts_at_exactly_zero() -> None:
    pred = TwoHotHead(12, 1, 8)(X).pred()
    assert pred.shape == (5, 7)
    assert (pred == 0).all()


def test_binary_head_gives_probabilities() -> None:
    pred = BinaryHead(12, 1, 8)(X).pred()
    assert pred.shape == (5, 7)
    assert ((pred > 0) & (pred < 1)).all()


@pytest.mark.parametrize(
    ("action", "kind", "size", "entropy"),
    [
        (ActionSpec("discrete", nvec=(4,)), Categorical, 4, torch.tensor(4.0).log()),
        (ActionSpec("multi_discrete", nvec=(2, 3)), Categorical, 5, torch.tensor(6.0).log()),
        (ActionSpec("box", low=(-1.0,) * 3, high=(1.0,) * 3), BoundedNormal, 3, None),
    ],
    ids=["discrete", "multi_discrete", "box"],
)
def test_policies_start_almost_uniform(
    action: ActionSpec, kind: type, size: int, entropy: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    policy = ActionHead(12, 3, 8, action)(X)
    assert isinstance(policy, kind)
    assert policy.sample().shape == (5, 7, size)
    if entropy is not None:
        expected = entropy.expand(5, 7)
        torch.testing.assert_close(policy.entropy(), expected, atol=1e-3, rtol=0)
    else:
        assert policy.pred().abs().max() < 0.05


def test_scalar_head_is_the_mean_of_a_unit_normal() -> None:
    torch.manual_seed(0)
    head = ScalarHead(12, 2, 8, ELU)
    output = head(X)
    assert isinstance(output, UnitNormal)
    assert output.pred().shape == (5, 7)
    x = X
    for dense in head.mlp:
        x = torch.nn.functional.elu(dense.linear(x))
    torch.testing.assert_close(output.pred(), (x @ head.out.weight.T + head.out.bias)[..., 0])


@pytest.mark.parametrize("box", [TanhNormal, TruncatedNormal])
def test_policies_of_the_older_papers(box: type) -> None:
    torch.manual_seed(0)
    action = ActionSpec("box", low=(-1.0,) * 3, high=(1.0,) * 3)
    head = ActionHead(12, 2, 8, action, ELU, box, out_scale=None)
    assert isinstance(head.out, GlorotLinear)
    assert isinstance(head.std, GlorotLinear)
    policy = head(X)
    assert isinstance(policy, box)
    expected = box(head.out(head.mlp(X)), head.std(head.mlp(X)))
    torch.testing.assert_close(policy.mean, expected.mean)
    torch.testing.assert_close(policy.std, expected.std)
    assert policy.sample().shape == (5, 7, 3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("style", [ELU, RMS_SILU])
def test_scalars_apart_train_input_and_weights_apart(style: Style, autocast: bool) -> None:
    torch.manual_seed(0)
    head = ScalarHead(5, 2, 8, style)
    x = torch.randn(4, 3, 5, requires_grad=True)
    to_x, to_weights = torch.randn(4, 3), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for_x, for_weights = (part.pred() for part in head.apart(x))
        expected = head(x).pred()
    torch.testing.assert_close(for_x, expected)
    torch.testing.assert_close(for_weights, expected)
    ((for_x * to_x).sum() + (for_weights * to_weights).sum()).backward()
    (of_x,) = torch.autograd.grad((expected * to_x).sum(), x, retain_graph=True)
    of_weights = torch.autograd.grad((expected * to_weights).sum(), list(head.parameters()))
    torch.testing.assert_close(x.grad, of_x)
    for parameter, grad in zip(head.parameters(), of_weights, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
