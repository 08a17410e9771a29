"""The ST-transformer: who sees whom, padding, going on from what is remembered, parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.nets.st_transformer import Shape, STTransformer

SHAPE = Shape(layers=2, width=12, heads=2, head=4, hidden=20)
GRID, PLACES, FRAMES = (2, 3), 6, 4


def build(causal: bool = True, relative: bool = False) -> STTransformer:
    torch.manual_seed(0)
    return STTransformer(SHAPE, GRID, FRAMES, causal, relative).eval()


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
    model = STTransformer(SHAPE._replace(layers=1), GRID, FRAMES)
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


def test_neighbours_begin_the_most_alike() -> None:
    space = STTransformer(SHAPE._replace(width=64), (8, 8), FRAMES).space
    likeness = torch.cosine_similarity(space[3 * 8 + 3], space, dim=-1)
    nearest = likeness.topk(5).indices.tolist()
    assert sorted(nearest) == [2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3, 3 * 8 + 4, 4 * 8 + 3]


def test_without_positions_patches_are_the_same_wherever_they_are() -> None:
    model, x = STTransformer(SHAPE, GRID, FRAMES, placed=False).eval(), tokens()
    order = torch.randperm(PLACES)
    with torch.no_grad():
        torch.testing.assert_close(model(x[:, :, order]), model(x)[:, :, order])
        mixed = build()(x[:, :, order])
        assert not torch.allclose(mixed, build()(x)[:, :, order], atol=1e-3)
    assert "space" not in model.state_dict()


def test_offsets_count_for_all_pairs_that_are_as_far_apart() -> None:
    model = build(relative=True)
    offsets = model.blocks[0].offsets
    assert not offsets().any()  # at first they say nothing
    with torch.no_grad():
        offsets.table.copy_(torch.randn_like(offsets.table))
    logits = offsets()[0]
    place = torch.arange(PLACES).unflatten(0, GRID)
    right = [logits[:, place[row, col], place[row, col + 1]] for row in (0, 1) for col in (0, 1)]
    assert all(torch.equal(right[0], other) for other in right)
    left = logits[:, place[0, 1], place[0, 0]]
    assert not torch.equal(right[0], left)
    assert len({float(number) for number in logits[0].flatten()}) == 3 * 5


def test_offsets_are_heard_in_dreams_too() -> None:
    """What is remembered and extended is what `forward` says, and it depends on offsets."""
    model, x = build(relative=True), tokens(2, 3)
    with torch.no_grad():
        before = model(x)
        for block in model.blocks:
            block.offsets.table.copy_(torch.randn_like(block.offsets.table))
        after = model(x)
        assert not torch.allclose(before, after)
        extended = model.extend(x[:, 2:], model.remember(x[:, :2]))
    torch.testing.assert_close(extended, after[:, 2:])
