"""Probes on features of which is known what they tell; ranks and spreads; pictures of features."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.collapse import covariance_rank, rank_me, relative_std
from callbacks.feature_pictures import SIDE, feature_frames, principal_colours
from callbacks.probes import probe
from callbacks.probing import Truth, attentive_r2, linear_r2, nearest_r2, record_truth
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from datamodules.spec import Spec


@pytest.fixture
def truth() -> Tensor:
    return torch.rand(120, 3, 2, generator=torch.Generator().manual_seed(0))


def test_what_is_there_is_found_and_what_is_not_is_not(truth: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(120, 3, 10, generator=generator)
    linear = torch.cat([truth @ torch.randn(2, 5, generator=generator), 0.1 * noise], -1)
    assert linear_r2(linear, truth) > 0.999
    assert linear_r2(noise, truth) < 0.1
    # A constant feature is no trouble.
    assert linear_r2(torch.cat([linear, torch.ones(120, 3, 1)], -1), truth) > 0.999
    bumps = torch.exp(-20 * (truth[..., None] - torch.linspace(0, 1, 4)).square()).flatten(2)
    assert nearest_r2(bumps, truth) > 0.9
    assert nearest_r2(noise, truth) < 0.1


def test_attention_finds_the_patch_that_knows(truth: Tensor) -> None:
    """The patch differs from step to step, and is marked; a mean over the patches blurs it."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(120, 3, 9, 6, generator=generator)
    where = torch.randint(9, (120, 3, 1, 1), generator=generator).expand(-1, -1, 1, 6)
    told = torch.cat([torch.full((120, 3, 1), 6.0), truth * 4 - 2, torch.zeros(120, 3, 3)], -1)
    tokens.scatter_(2, where, told[:, :, None])
    assert attentive_r2(tokens, truth) > 0.8
    assert linear_r2(tokens.mean(2), truth) < 0.5
    assert attentive_r2(tokens, truth) == attentive_r2(tokens, truth)


def test_clips_tell_where_the_sprite_is() -> None:
    make = partial(make_env, "zoo/Sprites-v0")
    found = record_truth(make, "position", clips=6, length=5, seed=3)
    assert found.obs["image"].shape == (6, 5, 32, 32, 3)
    assert found.value.shape == (6, 5, 2)
    for image, (x, y) in zip(found.obs["image"][:, -1], found.value[:, -1], strict=True):
        assert image[int(y), int(x)].tolist() == [255, 255, 255]
    again = record_truth(make, "position", clips=6, length=5, seed=3)
    assert torch.equal(again.obs["image"], found.obs["image"])
    with pytest.raises(UserError, match="no 'place' to probe for, only distractors"):
        record_truth(make, "place", clips=1, length=2, seed=0)
    with pytest.raises(UserError, match="hardly ever 99 steps"):
        record_truth(make, "position", clips=1, length=99, seed=0)


class Patches:
    """A model that sees the truth, one patch for each pixel, two steps in one."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        env = make_env("zoo/Sprites-v0")
        self.spec = Spec.from_spaces(env.observation_space, env.action_space)

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        return obs["image"].float().mean((2, 3))

    def feature_map(self, obs: dict[str, Tensor]) -> Tensor:
        return obs["image"][:, ::2, ::8, ::8].float()


def test_a_model_is_probed_with_the_probes_that_it_allows() -> None:
    clips = record_truth(partial(make_env, "zoo/Sprites-v0"), "position", 16, 3, seed=0)
    found = probe(Patches(), clips)
    assert set(found) == {"r2", "knn_r2", "attentive_r2"}
    assert all(value <= 1 for value in found.values())
    assert isinstance(clips, Truth)


def test_features_become_pictures() -> None:
    model: Any = Patches()
    obs = record_truth(partial(make_env, "zoo/Sprites-v0"), "position", 4, 3, seed=0).obs
    frames = feature_frames(model, obs)
    assert frames.shape == (3, 2 * SIDE, 4 * SIDE, 3)
    assert frames.dtype.name == "uint8"
    features = torch.randn(50, 40, 8) * torch.tensor([9.0, 3.0, 1.0, *[0.01] * 5])
    colours = principal_colours(features).float()
    for axis in range(3):
        pair = torch.stack([colours[..., axis].flatten(), features[..., axis].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95


def test_spread_and_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    assert relative_std(x) == pytest.approx(1, abs=0.01)
    assert relative_std(1000 * x + 10_000) == pytest.approx(0.1, abs=0.005)
    assert relative_std(torch.ones(5, 8)) == 0
    assert rank_me(x) == pytest.approx(8, abs=0.1)
    assert covariance_rank(x) == pytest.approx(8, abs=0.1)
    flat = torch.cat([x[:, :2], torch.zeros(4000, 6)], -1)
    assert rank_me(flat) == pytest.approx(2, abs=0.1)
    assert covariance_rank(flat) == pytest.approx(2, abs=0.1)
    assert covariance_rank(torch.ones(5, 8)) == 0
