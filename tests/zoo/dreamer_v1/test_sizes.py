"""Parameter counts against the layer tables of the paper and of its code."""

from __future__ import annotations

import pytest
import torch
from latent_models import conv, counts, linear, mlp

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.dreamer_v1.module import DreamerV1

IMAGE = {"image": ArraySpec((64, 64, 3), "uint8")}
BOX = ActionSpec("box", low=(-1.0,) * 6, high=(1.0,) * 6)
DISCRETE = ActionSpec("discrete", nvec=(6,))


@pytest.mark.parametrize(("action", "outputs"), [(BOX, 2), (DISCRETE, 1)], ids=["box", "discrete"])
def test_parts_of_the_papers_size(action: ActionSpec, outputs: int) -> None:
    with torch.device("meta"):
        model = DreamerV1(Spec(IMAGE, action), continue_scale=10.0)
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
        "reward_head": mlp(feature, 2, 400) + linear(400, 1),
        "continue_head": mlp(feature, 3, 400) + linear(400, 1),
        "actor": mlp(feature, 4, 400) + outputs * linear(400, 6),
        "critic": mlp(feature, 3, 400) + linear(400, 1),
    }


def test_the_control_suite_needs_no_continue_head() -> None:
    with torch.device("meta"):
        assert "continue_head" not in counts(DreamerV1(Spec(IMAGE, BOX)))
