"""Parameter counts against the layer tables of the paper and of its code."""

from __future__ import annotations

import pytest
import torch
from latent_models import conv, counts, linear, mlp

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.planet.module import SIZES, PlaNet

PIXELS = Spec(
    {"image": ArraySpec((64, 64, 3), "uint8")}, ActionSpec("box", low=(-1.0,) * 6, high=(1.0,) * 6)
)


def test_parts_of_the_papers_size() -> None:
    with torch.device("meta"):
        model = PlaNet(PIXELS)
    feature = 200 + 30
    gru = 3 * (200 * 200 + 200 * 200) + 2 * 3 * 200  # input, recurrence and two biases each
    assert counts(model) == {
        "encoder": conv(4, 3, 32) + conv(4, 32, 64) + conv(4, 64, 128) + conv(4, 128, 256),
        "rssm": linear(30 + 6, 200)
        + gru
        + (linear(200, 200) + linear(200, 2 * 30))  # prior
        + (linear(200 + 1024, 200) + linear(200, 2 * 30)),  # posterior
        "decoder": linear(feature, 1024)
        + (conv(5, 1024, 128) + conv(5, 128, 64) + conv(6, 64, 32) + conv(6, 32, 3)),
        "reward_head": mlp(feature, 3, 300) + linear(300, 1),
    }


def test_single_widths_override_the_size() -> None:
    with torch.device("meta"):
        model = PlaNet(PIXELS, size="nano", stoch=7, units=9)
    deter = SIZES["nano"]["deter"]
    assert counts(model)["reward_head"] == mlp(deter + 7, 3, 9) + linear(9, 1)


def test_impossible_widths_are_named() -> None:
    with pytest.raises(UserError, match=r"no size 'big': choose one of nano, paper"):
        PlaNet(PIXELS, size="big")
    with pytest.raises(UserError, match=r"PlaNet needs stoch > 0, got 0"):
        PlaNet(PIXELS, size="nano", stoch=0)
    with pytest.raises(UserError, match=r"PlaNet needs lr > 0, got -1"):
        PlaNet(PIXELS, size="nano", lr=-1)
