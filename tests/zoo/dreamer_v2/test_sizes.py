"""Parameter counts against the layer tables of the paper and of its code."""

from __future__ import annotations

import pytest
import torch
from latent_models import conv, counts, linear, mlp

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.dreamer_v2.module import DreamerV2

IMAGE = {"image": ArraySpec((64, 64, 3), "uint8")}
BOX = ActionSpec("box", low=(-1.0,) * 6, high=(1.0,) * 6)
DISCRETE = ActionSpec("discrete", nvec=(6,))


@pytest.mark.parametrize(
    ("size", "deter", "action", "outputs"),
    [("dmc", 200, BOX, 2), ("atari", 600, DISCRETE, 1), ("crafter", 1024, DISCRETE, 1)],
)
def test_parts_of_the_official_sizes(
    size: str, deter: int, action: ActionSpec, outputs: int
) -> None:
    with torch.device("meta"):
        model = DreamerV2(Spec(IMAGE, action), size=size)
    latent = 32 * 32
    feature = deter + latent
    gru = linear(2 * deter, 3 * deter) + 2 * 3 * deter  # and the LayerNorm of its gates
    scalar = mlp(feature, 4, 400) + linear(400, 1)
    assert counts(model) == {
        "encoder": conv(4, 3, 48) + conv(4, 48, 96) + conv(4, 96, 192) + conv(4, 192, 384),
        "rssm": linear(latent + 6, deter)
        + gru
        + (linear(deter, deter) + linear(deter, latent))  # prior
        + (linear(deter + 1536, deter) + linear(deter, latent)),  # posterior
        "decoder": linear(feature, 1536)
        + (conv(5, 1536, 192) + conv(5, 192, 96) + conv(6, 96, 48) + conv(6, 48, 3)),
        "reward_head": scalar,
        "continue_head": scalar,
        "actor": mlp(feature, 4, 400) + outputs * linear(400, 6),
        "critic": scalar,
    }


def test_gaussian_latents_are_the_papers_ablation() -> None:
    with torch.device("meta"):
        model = DreamerV2(Spec(IMAGE, BOX), size="dmc", latent="gaussian", continue_scale=0.0)
    feature = 200 + 32
    found = counts(model)
    assert found["critic"] == mlp(feature, 4, 400) + linear(400, 1)
    assert "continue_head" not in found
