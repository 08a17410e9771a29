"""The predictor: what it may know, and how large it is."""

from __future__ import annotations

import pytest
import torch

from zoo.jepa.predictor import Predictor
from zoo.nets.vit import take

GRID = (4, 4)


def build(zero_tokens: bool = False, rope: bool = False, axes: int = 3) -> Predictor:
    torch.manual_seed(0)
    return Predictor(10, GRID, 24, 2, 2, axes, rope, mask_tokens=2, zero_tokens=zero_tokens)


def case(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(32, generator=generator) for _ in range(2)])
    context = torch.randn(2, 8, 10, generator=generator)
    return context, places[:, :8], places[:, 8:20].reshape(2, 3, 4)


@pytest.mark.parametrize("rope", [False, True])
def test_each_target_set_is_predicted_by_itself(rope: bool) -> None:
    model, (context, seen, wanted) = build(rope=rope), case()
    out = model(context, seen, wanted, times=2)
    assert out.shape == (2, 3, 4, 10)
    for i in range(3):
        alone = model(context, seen, wanted[:, i : i + 1], times=2)
        torch.testing.assert_close(out[:, i], alone[:, 0])


def test_predictions_depend_on_the_places_the_context_and_the_kind_of_mask() -> None:
    model, (context, seen, wanted) = build(), case()
    with torch.no_grad():
        model.mask_tokens.normal_()
    out = model(context, seen, wanted, 2)
    for other in (
        model(context + 1, seen, wanted, 2),
        model(context, seen.flip(0), wanted, 2),
        model(context, seen, wanted.flip(0), 2),
        model(context, seen, wanted, 2, kind=1),
    ):
        assert not torch.isclose(out, other).all(-1).any()


def test_the_order_of_the_context_does_not_matter() -> None:
    model, (context, seen, wanted) = build(), case()
    order = torch.randperm(8).expand(2, -1)
    out = model(take(context, order), seen.gather(1, order), wanted, 2)
    torch.testing.assert_close(out, model(context, seen, wanted, 2))


def test_mask_tokens_start_as_zeros_or_small() -> None:
    assert (build(zero_tokens=True).mask_tokens == 0).all()
    assert 0.01 < build().mask_tokens.std() < 0.03


@pytest.mark.parametrize(
    ("features", "layers", "tokens"), [(768, 6, 1), (1024, 12, 1), (1280, 12, 1), (1024, 12, 2)]
)
def test_parameters_are_those_of_the_papers(features: int, layers: int, tokens: int) -> None:
    """A narrow ViT: 384 wide; an embedding of features, a token, blocks, a norm, a projection."""
    with torch.device("meta"):
        model = Predictor(features, (14, 14), 384, layers, 12, mask_tokens=tokens)
    blocks = layers * (12 * 384**2 + 13 * 384)
    ends = (features + 1) * 384 + (384 + 1) * features
    expected = blocks + ends + 2 * 384 + tokens * 384
    assert sum(p.numel() for p in model.parameters()) == expected
