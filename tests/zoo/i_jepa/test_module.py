"""I-JEPA: its sizes, its loss, images of any datamodule."""

from __future__ import annotations

import pytest
import torch

from datamodules import ActionSpec, ArraySpec, Spec
from zoo.i_jepa.module import IJEPA, SIZES
from zoo.jepa.masks import Dice

IMAGE = ArraySpec((224, 224, 3), "uint8")


@pytest.mark.parametrize(
    ("size", "patch", "layers", "predictor"),
    [("small", 16, 12, 6), ("base", 16, 12, 6), ("large", 16, 24, 12), ("huge", 14, 32, 12)],
)
def test_parameters_are_those_of_the_paper(
    size: str, patch: int, layers: int, predictor: int
) -> None:
    """D of 384, 768, 1024, 1280; the predictor is 384 wide (appendix A.1)."""
    with torch.device("meta"):
        model = IJEPA(Spec({"image": IMAGE}), size=size, patch=patch)
    width = {"small": 384, "base": 768, "large": 1024, "huge": 1280}[size]
    encoder = (3 * patch * patch + 1) * width + layers * (12 * width**2 + 13 * width) + 2 * width
    narrow = predictor * (12 * 384**2 + 13 * 384) + 2 * 384
    narrow += (width + 1) * 384 + 384 + (384 + 1) * width  # in, mask token, out
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.predictor.parameters()) == narrow
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == encoder + narrow
    assert SIZES[size]["predictor_heads"] == SIZES[size]["heads"]


def test_every_frame_is_an_image_by_itself() -> None:
    torch.manual_seed(0)
    spec = Spec({"image": ArraySpec((16, 16, 3), "uint8")}, ActionSpec("discrete", nvec=(2,)))
    model = IJEPA(spec, size="nano", patch=4, crop_scale=None)
    obs = {"image": torch.randint(256, (2, 3, 16, 16, 3)).byte()}
    view = model.view(obs, Dice.of(0, 0))
    assert view.patches.shape == (6, 16, 48)
    (prediction,) = model.predictions(view)
    assert prediction.masks.targets.shape[:2] == (6, 4)
    assert prediction.predicted.shape == (*prediction.masks.targets.shape, 96)
    one = model.encode({"image": obs["image"][1:, 2:]})
    torch.testing.assert_close(model.encode(obs)[1:, 2:], one)


def test_mask_options_reach_the_masks() -> None:
    spec = Spec({"image": ArraySpec((64, 64, 3), "uint8")})
    model = IJEPA(
        spec,
        size="nano",
        patch=8,
        targets=2,
        target_scale=(1 / 64, 1 / 64),
        target_aspect=(1.0, 1.0),
        context_scale=(1.0, 1.0),
    )
    view = model.view({"image": torch.zeros(2, 1, 64, 64, 3, dtype=torch.uint8)}, Dice.of(0, 0))
    (prediction,) = model.predictions(view)
    assert prediction.masks.targets.shape == (2, 2, 1)
    assert prediction.masks.context.shape[1] >= 62
