"""The ST-transformer: who sees whom, padding, going on from what is remembered, parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.nets.st_transformer import Shape, STTransformer

SHAPE = Shape(layers=2, width=12, heads=2, head=4, hidden=20)
PLACES, FRAMES = 5, 4


def build(causal: bool = True) -> STTransformer:
    torch.manual_seed(0)
    return STTransformer(SHAPE, PLACES, FRAMES, causal).eval()


def tokens(clips: int = 2, frames: int = FRAMES) -> Tensor:
    return torch.randn(clips, frames, PLACES, SHAPE.width)


def moved(model: STTransformer, frame: int, place: int) -> Tensor:
    """(T, P) which outputs change with one token."""
    x = tokens(1)
    other = x.clone()
    other[0, frame, place] = torch.randn(SHAPE.width)
    with torch.no_grad():
        return ((model(x) - model(other)).abs() > 1e-6)[0].any(-1)


def test_frames_see_earlier_ones_and_themselves() -> None:
    changed = moved(build(), frame=2, place=1)
    assert not changed[:2].any()
    assert changed[2:].all()  # the frame by space, and what comes later by time and space


def test_without_the_causal_flag_all_frames_see_all() -> None:
    assert moved(build(causal=False), frame=2, place=1).all()


def test_time_is_attended_to_at_the_same_place_only() -> None:
    model = STTransformer(SHAPE._replace(layers=1), PLACES, FRAMES)
    changed = moved(model, frame=1, place=3)
    assert changed[1].all()
    # One block looks along space before it looks along time.
    assert changed[2].all()
    model.blocks[0].spatial.project.weight.data.zero_()  # type: ignore[union-attr, operator]
    changed = moved(model, frame=1, place=3)
    assert changed[1:].sum(1).tolist() == [1, 1, 1]
    assert changed[1:, 3].all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_in_front_changes_nothing(causal: bool) -> None:
    model, x = build(causal), tokens(2, 2)
    padded = torch.cat([100 * tokens(2, 2), x], 1)
    valid = torch.tensor([[False, False, True, True]]).expand(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, valid)[:, 2:], model(x))


@pytest.mark.parametrize("padding", [0, 2])
def test_a_frame_that_follows_is_read_alone(padding: int) -> None:
    model, x = build(), tokens()
    valid = torch.arange(FRAMES).expand(2, -1) >= padding
    with torch.no_grad():
        whole = model(x, valid)
        memory = model.remember(x[:, :-1], valid[:, :-1])
        torch.testing.assert_close(model.extend(x[:, -1:], memory), whole[:, -1:])


def test_parameters_follow_from_the_layers() -> None:
    layers, width, heads, head, hidden = SHAPE
    inner = heads * head
    attention = 2 * width + (width + 1) * 3 * inner + 2 * head + (inner + 1) * width
    mlp = 2 * width + (width + 1) * hidden + (hidden + 1) * width
    expected = layers * (2 * attention + mlp) + (PLACES + FRAMES) * width + 2 * width
    assert sum(p.numel() for p in build().parameters()) == expected
