"""Each term against its formula, written out, and where it is 0."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from zoo.jepa_wm.regularizers import (
    InverseDynamics,
    covariance_loss,
    masked_mean,
    sigreg_loss,
    similarity_loss,
    variance_loss,
)


@pytest.fixture
def rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(7, 3) * torch.tensor([0.2, 1.0, 3.0]) + 5


def test_variance_is_the_hinge_of_each_features_standard_deviation(rows: Tensor) -> None:
    expected = 0.0
    for feature in range(3):
        x = rows[:, feature].tolist()
        mean = sum(x) / 7
        variance = sum((v - mean) ** 2 for v in x) / 6
        expected += max(0.0, 1 - math.sqrt(variance + 1e-4)) / 3
    assert variance_loss(rows).item() == pytest.approx(expected, rel=1e-4)


def test_variance_of_a_constant_is_almost_one_and_of_wide_features_zero(rows: Tensor) -> None:
    assert variance_loss(torch.ones(9, 4)).item() == pytest.approx(0.99)
    assert variance_loss(100 * rows).item() == 0


def test_covariance_is_the_mean_square_of_what_is_off_the_diagonal(rows: Tensor) -> None:
    x, expected = rows.double() - rows.double().mean(0), 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                expected += (float(x[:, i] @ x[:, j]) / 6) ** 2 / 6
    assert covariance_loss(rows).item() == pytest.approx(expected, rel=1e-3)


def test_covariance_of_orthogonal_features_is_zero() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert covariance_loss(x).item() == 0
    assert covariance_loss(x[:, :1].expand(4, 2)).item() == pytest.approx((4 / 3) ** 2)


def test_similarity_leaves_out_the_borders_of_episodes() -> None:
    latents = torch.tensor([[[0.0, 0.0], [1.0, 2.0], [9.0, 9.0], [9.0, 6.0]]])
    goes_on = torch.tensor([[True, False, True]])
    assert similarity_loss(latents, goes_on).item() == pytest.approx(((1 + 4) / 2 + 9 / 2) / 2)


def test_sigreg_is_the_epps_pulley_statistic_of_each_slice(rows: Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    directions = torch.randn(3, 5, generator=generator).double()
    t = [-3 + 6 * k / 9 for k in range(10)]
    expected = 0.0
    for s in range(5):
        unit = directions[:, s] / directions[:, s].norm()
        x = (rows.double() @ unit).tolist()
        error = []
        for knot in t:
            found = sum(complex(math.cos(knot * v), math.sin(knot * v)) for v in x) / 7
            normal = math.exp(-(knot**2) / 2)
            error.append(abs(found - normal) ** 2 * normal)
        expected += sum((a + b) / 2 * (6 / 9) for a, b in pairwise(error)) / 5
    assert sigreg_loss(rows, 4, slices=5).item() == pytest.approx(expected, rel=1e-3)


def test_sigreg_tells_a_standard_normal_from_a_collapse() -> None:
    torch.manual_seed(0)
    normal = torch.randn(2000, 8)
    clouds = (normal, 0.1 * normal, 3 * normal, normal + 2)
    values = [sigreg_loss(x, 0, slices=16).item() for x in clouds]
    assert values[0] < 0.002
    assert min(values[1:]) > 0.1


def test_slices_follow_the_seed_alone(rows: Tensor) -> None:
    torch.manual_seed(1)
    first = sigreg_loss(rows, 7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(sigreg_loss(rows, 7), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sigreg_loss(rows, 8), first)


def test_sigreg_pulls_a_collapsed_cloud_apart() -> None:
    torch.manual_seed(0)
    x = (0.05 * torch.randn(64, 4)).requires_grad_()
    optimizer = torch.optim.Adam([x], 0.05)
    for step in range(60):
        optimizer.zero_grad()
        sigreg_loss(x, step, slices=16).backward()
        optimizer.step()
    assert 0.7 < x.std(0).min() <= x.std(0).max() < 1.3


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0]])
    assert masked_mean(values, torch.tensor([[True, False, True]])).item() == 3.5
    assert masked_mean(values, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


def test_inverse_dynamics_has_two_hidden_layers_of_256() -> None:
    count = sum(p.numel() for p in InverseDynamics(512, 2).parameters())
    assert count == (1024 * 256 + 256) + (256 * 256 + 256) + (256 * 2 + 2)
