"""The slow target: schedules, normalised features, signs of collapse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.jepa.target import copied, cosine, drift, feature_std, momentum, normalized


def test_the_momentum_rises_linearly_and_stays() -> None:
    found = [momentum(update, 4, (0.996, 1.0)) for update in (0, 1, 2, 4, 9)]
    assert found == pytest.approx([0.996, 0.997, 0.998, 1.0, 1.0])
    assert momentum(7, 100, (0.99925, 0.99925)) == pytest.approx(0.99925)


def test_half_a_cosine() -> None:
    found = [cosine(update, 100, 0.04, 0.4) for update in (0, 50, 100, 200)]
    assert found == pytest.approx([0.04, 0.22, 0.4, 0.4])
    assert cosine(25, 100, 1.0, 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_targets_have_no_scale_and_no_offset() -> None:
    x = 3 * torch.randn(2, 4, 16) + 5
    out = normalized(x)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(-1, correction=0), torch.ones(2, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized(2 * x - 1), out, atol=1e-4, rtol=0)


def test_features_that_tell_only_the_place_count_as_collapsed() -> None:
    place = torch.randn(1, 9, 4).expand(8, -1, -1)
    assert feature_std(place) == 0
    clip = torch.tensor([-1.0, 1.0]).view(2, 1, 1).expand(-1, 9, 4)
    assert feature_std(clip + place[:2]) == pytest.approx(1.0)


def test_a_copy_takes_the_nearest_visible_patch_of_the_same_frame() -> None:
    target = torch.arange(2 * 9.0).view(1, 18, 1)  # two frames of 3x3: the feature is the place
    seen = torch.tensor([[0, 8, 9, 17]])
    wanted = torch.tensor([[[1, 7], [10, 16]]])
    assert copied(target, seen, wanted, (3, 3)).squeeze(-1).tolist() == [[[0, 8], [9, 17]]]


def test_drift_is_relative() -> None:
    fast, slow = nn.Linear(2, 2), nn.Linear(2, 2)
    slow.load_state_dict({key: 1.1 * value for key, value in fast.state_dict().items()})
    assert drift(slow, fast) == pytest.approx(0.1, rel=1e-4)
    assert drift(fast, fast) == 0
