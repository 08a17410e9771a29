"""V-JEPA: its sizes, its two kinds of masks, the options of V-JEPA 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from video_standin import MovingSquares

from datamodules import ArraySpec, Spec
from zoo.jepa.masks import Dice
from zoo.v_jepa.module import VJEPA

VIDEO = Spec({"image": ArraySpec((224, 224, 3), "uint8")})


def build(**options: Any) -> VJEPA:
    torch.manual_seed(0)
    return VJEPA(MovingSquares.spec, **{"size": "nano", "patch": 4, "crop_scale": None, **options})


def obs(clips: int = 2, frames: int = 4) -> dict[str, torch.Tensor]:
    return MovingSquares(clips, frames).next_batch()["obs"]


@pytest.mark.parametrize(
    ("size", "width", "layers"), [("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)]
)
def test_parameters_are_those_of_the_paper(size: str, width: int, layers: int) -> None:
    """Patches of 2 frames of 16 x 16; a predictor of 12 blocks of width 384 (section 3.3)."""
    with torch.device("meta"):
        model = VJEPA(VIDEO, size=size)
    encoder = (2 * 3 * 256 + 1) * width + layers * (12 * width**2 + 13 * width) + 2 * width
    predictor = 12 * (12 * 384**2 + 13 * 384) + 2 * 384
    predictor += (width + 1) * 384 + 2 * 384 + (384 + 1) * width  # in, two mask tokens, out
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.predictor.parameters()) == predictor


def test_a_clip_of_16_frames_has_1568_patches() -> None:
    model = VJEPA(VIDEO, size="nano", crop_scale=None)
    view = model.view({"image": torch.zeros(1, 16, 224, 224, 3, dtype=torch.uint8)}, Dice.of(0, 0))
    assert view.patches.shape == (1, 8 * 14 * 14, 2 * 16 * 16 * 3)


def test_both_kinds_of_masks_are_predicted_each_with_its_token() -> None:
    model = build()
    view = model.view(obs(), Dice.of(0, 0))
    short, long = model.predictions(view)
    assert (short.name, long.name) == ("short_range", "long_range")
    assert short.masks.targets.shape[1] == long.masks.targets.shape[1] == 1
    sum(p.predicted.sum() for p in (short, long)).backward()
    assert (model.predictor.mask_tokens.grad != 0).any(1).all()
    shared = build(one_mask_token=True)
    assert shared.predictor.mask_tokens.shape[0] == 1


def test_rotary_positions_replace_the_added_ones() -> None:
    model = build(rope=True)
    loss = model.training_step({"obs": obs()}, 0)
    loss.backward()
    assert loss.isfinite()
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, build())]
    assert counts[0] == counts[1]
    still = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
    features = model.feature_map({"image": still})  # nothing but distances tells patches apart
    torch.testing.assert_close(features, features[:, :1, :1, :1].expand_as(features))
    added = build().feature_map({"image": still})
    assert not torch.allclose(added, added[:, :1, :1, :1].expand_as(added), atol=1e-2)


def test_the_constant_schedules_of_v_jepa_2() -> None:
    rate = 5.25e-4
    model = build(ema=(0.99925,) * 2, weight_decay=(0.04,) * 2, lr=rate, final_lr=rate)
    optimizer = model.configure_optimizers()
    for updates in (12_000, 50_000, 200_000):
        model.updates = updates
        model.on_before_optimizer_step(optimizer)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate, rate])
        assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.04, 0])


def test_gradients_are_clipped_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(warmup=3, clip=2.0)
    asked: list[Any] = []
    monkeypatch.setattr(model, "clip_gradients", lambda _, *how: asked.append(how))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def norms() -> list[float]:
        parts = (model.encoder, model.predictor)
        return [
            float(
                torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
            )
            for part in parts
        ]

    before = norms()
    model.updates = 2
    model.configure_gradient_clipping(None, None, None)
    assert norms() == before
    model.updates = 3
    model.configure_gradient_clipping(None, None, None)
    assert norms() == pytest.approx([2.0, 2.0], rel=1e-4)
    model.configure_gradient_clipping(None, 0.5, "value")
    assert asked == [(0.5, "value")]


def test_the_encoder_costs_less_the_more_is_hidden() -> None:
    model = build()
    view = model.view(obs(frames=8), Dice.of(0, 0))
    short, long = model.predictions(view)

    def flops(places: torch.Tensor | None) -> int:
        with FlopCounterMode(display=False) as counter:
            model.encoder(view.patches, places)
        return counter.get_total_flops()

    whole = flops(None)
    for masks in (short.masks, long.masks):
        visible = masks.context.shape[1] / view.patches.shape[1]
        assert flops(masks.context) <= visible * whole


def test_clips_of_any_length_of_at_least_a_tubelet() -> None:
    model = build()
    for frames in (2, 3, 7):
        assert model.training_step({"obs": obs(frames=frames)}, 0).isfinite()
