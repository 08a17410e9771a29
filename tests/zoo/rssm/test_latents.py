"""Kinds of stochastic states: distributions of raw outputs, noise, and how they are stored."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.nets.distributions import DiagonalNormal, OneHot
from zoo.rssm.latents import Categoricals, Gaussians

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("mixture", [0.0, 0.2])
def test_categoricals_are_a_softmax_mixed_with_the_uniform(mixture: float) -> None:
    kind = Categoricals(3, 5, mixture)
    assert (kind.shape, kind.outputs) == ((3, 5), 15)
    raw = torch.randn(2, 4, 15)
    latent = kind(raw)
    assert isinstance(latent, OneHot)
    expected = (1 - mixture) * raw.view(2, 4, 3, 5).softmax(-1) + mixture / 5
    torch.testing.assert_close(latent.probs, expected)


def test_kl_of_sharp_categoricals_is_finite() -> None:
    kind = Categoricals(1, 2)  # Dreamer V2 mixes in no uniform distribution
    sharp = torch.tensor([[0.0, -150.0]], requires_grad=True)
    flat = kind(torch.zeros(1, 2))
    latent = kind(sharp)
    assert latent.probs[0, 0, 1] == 0
    expected = (math.log(2), 75 - math.log(2), 0.0)
    values = (latent.kl(flat), flat.kl(latent), latent.entropy())
    for value, number in zip(values, expected, strict=True):
        assert value.item() == pytest.approx(number, rel=1e-5)
        (grad,) = torch.autograd.grad(value.sum(), sharp, retain_graph=True)
        assert grad.isfinite().all()
    sequence = OneHot.stack([latent.detach(), latent.detach()])
    assert sequence.kl(OneHot.stack([flat, flat])).isfinite().all()


def test_gaussians_by_the_formula_of_each_paper() -> None:
    raw = torch.tensor([0.5, -1.0, 0.0, -3.0])
    kind = Gaussians(2)
    assert (kind.shape, kind.outputs) == ((2, 1), 4)
    latent = kind(raw)
    assert isinstance(latent, DiagonalNormal)
    assert latent.mean.tolist() == [[0.5], [-1.0]]
    softplus = torch.tensor([[0.0], [-3.0]]).exp().log1p() + 0.1
    torch.testing.assert_close(latent.std, softplus)
    torch.testing.assert_close(softplus[0].item(), 0.7931472)  # ln 2 + 0.1
    sigmoid = 2 / (1 + torch.tensor([[0.0], [1.5]]).exp()) + 0.1
    torch.testing.assert_close(Gaussians(2, "sigmoid2")(raw).std, sigmoid)
    assert sigmoid[0].item() == pytest.approx(1.1)
    smallest = Gaussians(1, min_std=0.3)(torch.tensor([0.0, -100.0])).std
    assert smallest.item() == pytest.approx(0.3)


def test_gaussians_keep_leading_axes() -> None:
    latent = Gaussians(3)(torch.randn(2, 4, 6))
    assert latent.mean.shape == latent.std.shape == latent.sample().shape == (2, 4, 3, 1)


def test_noise_is_what_samples_need() -> None:
    uniform = Categoricals(50, 5).noise(20, 30, device=CPU)
    assert uniform.shape == (20, 30, 50, 1)
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    normal = Gaussians(50).noise(20, 30, device=CPU)
    assert normal.shape == (20, 30, 50, 1)
    assert normal.mean().item() == pytest.approx(0.0, abs=0.03)
    assert normal.std().item() == pytest.approx(1.0, abs=0.03)


def test_categoricals_are_stored_as_bytes() -> None:
    kind = Categoricals(3, 256)
    index = torch.tensor([[[0, 7, 255], [255, 1, 128]]])
    stoch = torch.nn.functional.one_hot(index, 256).float()
    packed = kind.pack(stoch)
    assert (packed.shape[2:], str(packed.dtype)) == ((3,), "torch.uint8")
    assert kind.field == ((3,), "uint8")
    assert packed.tolist() == index.tolist()
    assert torch.equal(kind.unpack(packed), stoch)


def test_straight_through_samples_are_stored_exactly() -> None:
    kind = Categoricals(4, 6)
    stoch = kind(torch.randn(5, 24, requires_grad=True)).sample()
    assert torch.equal(kind.unpack(kind.pack(stoch)), stoch.round())


def test_gaussians_are_stored_as_floats() -> None:
    kind = Gaussians(3)
    stoch = torch.randn(2, 4, 3, 1, dtype=torch.bfloat16)
    packed = kind.pack(stoch)
    assert (packed.shape, str(packed.dtype)) == ((2, 4, 3), "torch.float32")
    assert kind.field == ((3,), "float32")
    assert torch.equal(kind.unpack(packed), stoch.float())
