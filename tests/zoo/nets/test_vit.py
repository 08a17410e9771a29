"""The vision transformer: where patches are, and that what is not read costs and counts nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.nets.transformer import rotate
from zoo.nets.vit import SIZES, ViT, coordinates, patchify, rotations, sincos, take

GRID = (4, 6)

# Blocks of 12 D^2 + 13 D parameters, the patches' embedding and a LayerNorm: the usual counts of
# ViT-S/16, B/16, L/16 and H/14 at 224 pixels without head, class token and learned positions.
PUBLISHED = {
    "small": (16, 21_665_664 - 384 * (1 + 197)),
    "base": (16, 85_798_656 - 768 * (1 + 197)),
    "large": (16, 303_301_632 - 1024 * (1 + 197)),
    "huge": (14, 630_764_800 - 1280 * (1 + 257)),
}


def build(rope: bool = False, axes: int = 3, values: int = 5) -> ViT:
    torch.manual_seed(0)
    model = ViT(values, GRID, width=24, layers=2, heads=2, axes=axes, rope=rope)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_a_patch_is_a_cuboid_of_the_clip() -> None:
    clip = torch.arange(2 * 4 * 8 * 12 * 3).reshape(2, 4, 8, 12, 3)
    patches = patchify(clip, patch=2, tubelet=2)
    assert patches.shape == (2, 2 * 4 * 6, 2 * 2 * 2 * 3)
    for place, (t, y, x) in enumerate(coordinates(GRID, 2).tolist()):
        cuboid = clip[:, 2 * t : 2 * t + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert torch.equal(patches[:, place], cuboid.flatten(1))


def test_frames_that_fill_no_tubelet_are_left_out() -> None:
    clip = torch.rand(1, 5, 4, 4, 1)
    assert torch.equal(patchify(clip, 2, 2), patchify(clip[:, :4], 2, 2))


def test_tokens_are_taken_row_by_row() -> None:
    tokens = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    places = torch.tensor([[[0, 4]], [[2, 1]]])
    taken = take(tokens, places)
    assert taken.shape == (2, 1, 2, 3)
    assert torch.equal(taken[1, 0, 0], tokens[1, 2])
    assert torch.equal(taken[0, 0, 1], tokens[0, 4])


def test_positions_are_sines_and_cosines_of_each_axis() -> None:
    table = sincos(torch.tensor([[0, 0], [2, 5]]), 8)
    assert table[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    expected = [f(a * r) for a in (2, 5) for f in (math.sin, math.cos) for r in (1, 0.01)]
    torch.testing.assert_close(table[1], torch.tensor(expected))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("width", [16, 64, 96, 1024])
def test_every_place_has_a_position_of_its_own(axes: int, width: int) -> None:
    where = coordinates((8, 8), 4 if axes == 3 else 1)[:, 3 - axes :]
    table = sincos(where, width)
    assert table.shape == (len(where), width)
    apart = torch.cdist(table, table) + 9 * torch.eye(len(table))
    assert apart.min() > 0.1


def test_rotated_products_depend_on_distances_alone() -> None:
    table = rotations(coordinates(GRID, 3), head=24)
    assert table.shape == (3 * 24, 24)
    query, key = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    turned = rotate(query.expand_as(table), table) @ rotate(key.expand_as(table), table).T
    places = {tuple(c): i for i, c in enumerate(coordinates(GRID, 3).tolist())}
    for a, b in (((0, 0, 0), (1, 2, 3)), ((0, 1, 0), (1, 0, 1))):
        shifted = [places[t + 1, y + 1, x + 2] for t, y, x in (a, b)]
        first = turned[places[a], places[b]]
        torch.testing.assert_close(first, turned[shifted[0], shifted[1]])
        assert not torch.isclose(first, turned[places[a], places[a]])
    torch.testing.assert_close(rotate(query, table[5]).norm(), query.norm())
    # 24 // 3 // 2 pairs for each axis: none are left over; of 16 features, one pair is.
    assert (table[-1, :12] != 1).all()
    assert rotations(coordinates(GRID, 3), head=16)[-1, :8].tolist()[6:] == [1, 1]


@pytest.mark.parametrize("rope", [False, True])
def test_hidden_patches_do_not_matter_and_visible_ones_do(rope: bool) -> None:
    model = build(rope)
    patches = torch.randn(2, 2 * 24, 5)
    seen = torch.tensor([[1, 7, 30], [0, 25, 47]])
    other = torch.randn_like(patches).scatter(
        1, seen[..., None].expand(-1, -1, 5), take(patches, seen)
    )
    assert torch.equal(model(patches, seen), model(other, seen))
    other[0, 7] += 1
    assert not torch.isclose(model(patches, seen)[0], model(other, seen)[0]).any()


@pytest.mark.parametrize("rope", [False, True])
def test_the_order_of_places_is_that_of_the_outputs(rope: bool) -> None:
    model, patches = build(rope), torch.randn(2, 24, 5)
    order = torch.stack([torch.randperm(24) for _ in range(2)])
    torch.testing.assert_close(model(patches, order), take(model(patches), order))


@pytest.mark.parametrize("rope", [False, True])
def test_positions_are_told_apart(rope: bool) -> None:
    model = build(rope)
    patches = torch.randn(1, 48, 5)
    there, elsewhere = (model(patches, torch.tensor([places])) for places in ([0, 1], [0, 40]))
    same = patches.clone()
    same[:, 40] = patches[:, 1]
    assert not torch.allclose(there, model(same, torch.tensor([[0, 40]])), atol=1e-3)
    assert not torch.allclose(there, elsewhere)


def test_longer_clips_only_add_positions() -> None:
    model = build()
    short = model(torch.ones(1, 24, 5))
    model(torch.ones(1, 72, 5))
    assert len(model.transformer.positions.table) == 72
    assert torch.equal(model(torch.ones(1, 24, 5)), short)
    assert not any("table" in key for key in model.state_dict())


def test_a_step_costs_what_the_visible_patches_cost() -> None:
    model, patches = build(), torch.randn(1, 240, 5)

    def flops(visible: int) -> int:
        with FlopCounterMode(display=False) as counter:
            model(patches, torch.arange(visible)[None])
        return counter.get_total_flops()

    assert flops(60) <= flops(240) / 4  # attention itself is not counted on CPUs


@pytest.mark.parametrize("size", PUBLISHED)
def test_encoders_have_the_published_number_of_parameters(size: str) -> None:
    patch, count = PUBLISHED[size]
    with torch.device("meta"):
        model = ViT(3 * patch * patch, (224 // patch,) * 2, **SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == count
    width, layers = SIZES[size]["width"], SIZES[size]["layers"]
    blocks = layers * (12 * width**2 + 13 * width)
    assert count == blocks + (3 * patch * patch + 1) * width + 2 * width


def test_weights_start_small_and_smaller_in_deeper_blocks() -> None:
    model = ViT(64, GRID, width=128, layers=8, heads=2)
    first, last = model.transformer.blocks[0], model.transformer.blocks[-1]
    for weight in (model.embed.weight, last.qkv.weight, last.up.weight):
        assert 0.018 < weight.std() < 0.022
    for depth, block in ((1, first), (8, last)):
        for weight in (block.project.weight, block.down.weight):
            assert math.isclose(weight.std(), 0.02 / math.sqrt(2 * depth), rel_tol=0.1)
    assert all((p == 0).all() for key, p in model.named_parameters() if key.endswith("bias"))
