"""Parameter counts: published numbers, and every size against a formula written down here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.dreamer_v3.module import DreamerV3
from zoo.dreamer_v3.sizes import SIZES

# dm_control walker-walk: 1 + 14 + 9 numbers, 6 torques.
VECTORS = {"height": 1, "orientations": 14, "velocity": 9}
WALKER = Spec(
    {key: ArraySpec((n,), "float32") for key, n in VECTORS.items()},
    ActionSpec("box", low=(-1.0,) * 6, high=(1.0,) * 6),
)
PIXELS = Spec({"image": ArraySpec((64, 64, 3), "uint8")}, ActionSpec("discrete", nvec=(18,)))
PARTS = ("encoder", "rssm", "decoder", "reward_head", "continue_head", "actor", "critic")


def counts(model: nn.Module) -> dict[str, int]:
    return {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def dense(inputs: int, outputs: int) -> int:
    return linear(inputs, outputs) + outputs  # with the scale of the norm


def mlp(inputs: int, layers: int, units: int) -> int:
    return dense(inputs, units) + (layers - 1) * dense(units, units)


def conv(inputs: int, outputs: int) -> int:
    return 25 * inputs * outputs + outputs


def formula(w: dict[str, int], spec: Spec) -> dict[str, int]:
    deter, hidden, units, depth = w["deter"], w["hidden"], w["units"], w["depth"]
    latent = w["stoch"] * w["classes"]
    vectors = [spec.obs[key].size for key in spec.vectors]
    actions, feature = spec.action.encoded_size, deter + latent
    a, b, c = 2 * depth, 3 * depth, 4 * depth
    encoder = decoder = tokens = 0
    if vectors:
        tokens += units
        encoder += mlp(sum(vectors), 3, units)
        decoder += mlp(feature, 3, units) + sum(linear(units, n) for n in vectors)
    if spec.images:
        cells = 4 * 4 * c
        tokens += cells
        encoder += conv(3, a) + conv(a, b) + conv(b, c) + conv(c, c) + (a + b + c + c)
        decoder += deter * cells // 8 + cells  # eight blocks
        decoder += dense(latent, 2 * units) + linear(2 * units, cells) + c
        decoder += conv(c, c) + conv(c, b) + conv(b, a) + (c + b + a) + conv(a, 3)
    rssm = dense(deter, hidden) + dense(latent, hidden) + dense(actions, hidden)
    rssm += (deter + 8 * 3 * hidden) * deter // 8 + 2 * deter
    rssm += deter * 3 * deter // 8 + 3 * deter
    rssm += mlp(deter, 2, hidden) + linear(hidden, latent)
    rssm += dense(deter + tokens, hidden) + linear(hidden, latent)
    outs = 2 if spec.action.kind == "box" else 1
    return {
        "encoder": encoder,
        "rssm": rssm,
        "decoder": decoder,
        "reward_head": dense(feature, units) + linear(units, 255),
        "continue_head": dense(feature, units) + linear(units, 1),
        "actor": mlp(feature, 3, units) + outs * linear(units, actions),
        "critic": mlp(feature, 3, units) + linear(units, 255),
    }


def test_published_counts_of_1m() -> None:
    model = DreamerV3(WALKER, size="1m")
    assert counts(model) == {
        "encoder": 10_112,
        "rssm": 364_416,
        "decoder": 51_096,
        "reward_head": 57_663,
        "continue_head": 41_153,
        "actor": 50_316,
        "critic": 66_111,
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 640_867


def test_published_count_of_12m() -> None:
    with torch.device("meta"):
        model = DreamerV3(WALKER, size="12m")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9_738_019


@pytest.mark.parametrize("spec", [WALKER, PIXELS], ids=["walker", "pixels"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_parts_of_the_formula(size: str, spec: Spec) -> None:
    with torch.device("meta"):
        model = DreamerV3(spec, size=size)
    assert counts(model) == formula(SIZES[size], spec)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == sum(formula(SIZES[size], spec).values())  # nothing beside the parts


def test_single_widths_override_the_size() -> None:
    model = DreamerV3(WALKER, size="nano", deter=32, units=16)
    width = {**SIZES["nano"], "deter": 32, "units": 16}
    assert counts(model) == formula(width, WALKER)


def test_unknown_sizes_and_loss_scales_are_named() -> None:
    with pytest.raises(UserError, match=r"no size '13m': choose one of nano, 1m"):
        DreamerV3(WALKER, size="13m")
    with pytest.raises(UserError, match=r"unknown loss scale \['rewrad'\]"):
        DreamerV3(WALKER, size="nano", loss_scales={"rewrad": 1.0})
