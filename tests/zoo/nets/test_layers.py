"""Linear layers, norm and initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoo.nets.layers import (
    ELU,
    MLP,
    RELU,
    BlockLinear,
    Conv2d,
    Dense,
    GlorotLinear,
    ImageNormSiLU,
    Linear,
    Style,
    _NormSiLU,
    norm_silu,
    randomize_biases,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def composed(x: Tensor, weight: Tensor) -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * weight
    return y * torch.sigmoid(y)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"), [((5, 8), (8,)), ((2, 3, 8), (8,)), ((5, 3, 8), (3, 8))]
)
def test_norm_silu_equals_the_composed_formula(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    x = torch.randn(x_shape, requires_grad=True)
    weight = torch.randn(weight_shape, requires_grad=True)
    upstream = torch.randn(x_shape)
    found, expected = norm_silu(x, weight), composed(x, weight)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad((found * upstream).sum(), (x, weight))
    theirs = torch.autograd.grad((expected * upstream).sum(), (x, weight))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(norm_silu(x, weight), expected)


def test_norm_silu_backward_is_the_derivative_of_its_forward() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_NormSiLU.apply, (x, weight))


def test_norm_silu_of_zeros_is_zero_with_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    out = norm_silu(x, torch.ones(4))
    out.sum().backward()
    assert (out == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("gradient", [True, False])
def test_norm_silu_computes_in_float32_under_autocast(gradient: bool) -> None:
    x = torch.randn(64, 32, requires_grad=gradient)
    weight = torch.randn(32)
    expected = composed(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm_silu(x, weight), expected)
        assert norm_silu(x.bfloat16(), weight).dtype == torch.bfloat16


def test_image_norm_is_over_channels() -> None:
    x = torch.randn(2, 3, 4, 5)
    norm = ImageNormSiLU(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    expected = composed(x.permute(0, 2, 3, 1), norm.weight).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    ("weight", "fan_in"),
    [
        (Linear(400, 300).weight, 400),
        (Conv2d(16, 64, 5).weight, 16 * 25),
        (BlockLinear(400, 800, 8).weight, 400),
    ],
    ids=["linear", "conv", "block: the fan-in is the full width"],
)
def test_initial_weights_are_truncated_normal(weight: Tensor, fan_in: int) -> None:
    std = 1 / math.sqrt(fan_in)
    assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert abs(weight.mean().item()) < 0.05 * std
    limit = 2 * std / 0.8796  # the truncation, after scaling back to a standard deviation of one
    assert weight.abs().max().item() <= limit * 1.001
    assert weight.abs().max().item() > 0.95 * limit


def test_biases_start_at_zero_and_out_scale_scales() -> None:
    assert (Linear(4, 4).bias == 0).all()
    assert (Linear(4, 4, out_scale=0.0).weight == 0).all()
    assert Linear(400, 300, 0.01).weight.std().item() == pytest.approx(0.01 / 20, rel=0.03)


def test_block_linear_equals_a_dense_block_diagonal_map() -> None:
    layer = BlockLinear(12, 8, 4)
    with torch.no_grad():
        layer.bias.normal_()
    dense = torch.zeros(12, 8)
    for block in range(4):
        dense[3 * block : 3 * block + 3, 2 * block : 2 * block + 2] = layer.weight[block].detach()
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), x @ dense + layer.bias)


def test_block_linear_refuses_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 -> 8 is not divisible by 4"):
        BlockLinear(10, 8, 4)


def test_mlp_is_layers_of_linear_norm_silu() -> None:
    mlp = MLP(3, 2, 4)
    x = torch.randn(6, 3)
    expected = x
    for dense in mlp:
        expected = expected @ dense.linear.weight.T + dense.linear.bias
        expected = composed(expected, dense.activation.weight)
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    ("style", "function"),
    [(ELU, torch.nn.functional.elu), (RELU, torch.relu)],
    ids=["elu", "relu"],
)
def test_layers_of_the_older_papers_have_no_norm(style: Style, function: Callable) -> None:
    mlp = MLP(3, 2, 4, style)
    x = torch.randn(6, 3)
    expected = x
    for dense in mlp:
        expected = function(expected @ dense.linear.weight.T + dense.linear.bias)
    torch.testing.assert_close(mlp(x), expected)
    assert sum(p.numel() for p in mlp.parameters()) == 3 * 4 + 4 + 4 * 4 + 4


def test_layers_of_the_older_papers_start_as_in_keras() -> None:
    layer = Dense(400, 200, ELU).linear
    assert isinstance(layer, GlorotLinear)
    limit = math.sqrt(6 / 600)
    assert 0.99 * limit < layer.weight.abs().max() <= limit
    assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert (layer.bias == 0).all()


def test_random_biases_have_the_size_of_the_fan_in() -> None:
    net = nn.ModuleDict(
        {
            "hidden": MLP(100, 1, 5000),
            "zero": Linear(16, 3, out_scale=0.0),
            "small": Linear(16, 3, out_scale=0.01),
            "older": GlorotLinear(16, 3),
            "image": Conv2d(3, 4),
        }
    )
    weights = {key: p.clone() for key, p in net.named_parameters() if key.endswith("weight")}
    randomize_biases(net)
    bias = net["hidden"][0].linear.bias
    assert 0.099 < bias.abs().max() <= 0.1
    assert bias.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
    assert abs(bias.mean().item()) < 0.005
    for key in ("zero", "small", "older", "image"):
        assert (net[key].bias == 0).all(), key
    assert all(torch.equal(dict(net.named_parameters())[key], w) for key, w in weights.items())
