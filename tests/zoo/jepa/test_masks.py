"""Masks: sizes, shares, no overlap, every patch reachable, one size for all ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from zoo.jepa.masks import Dice, Masks, block_size, image_masks, place_blocks, stack, tube_masks

GRIDS = st.tuples(st.integers(2, 16), st.integers(2, 16))
SEEDS = st.integers(0, 10_000)
fewer = settings(max_examples=40, deadline=None)


def rows_of(places: torch.Tensor) -> list[set[int]]:
    """The set of each row; a place that comes twice, or in disorder, is an error."""
    flat = places.reshape(-1, places.shape[-1])
    assert (flat.diff(dim=-1) > 0).all()
    return [set(row.tolist()) for row in flat]


def is_block(places: set[int], columns: int) -> bool:
    ys, xs = {p // columns for p in places}, {p % columns for p in places}
    whole = (max(ys) - min(ys) + 1) * (max(xs) - min(xs) + 1)
    return len(places) == len(ys) * len(xs) == whole


@fewer
@given(GRIDS, SEEDS, st.floats(0.05, 1.0), st.floats(0.5, 2.0))
def test_blocks_have_the_share_and_the_aspect_asked_for(
    grid: tuple[int, int], seed: int, scale: float, aspect: float
) -> None:
    rng = np.random.default_rng(seed)
    size = block_size(rng, grid, (scale, scale), (aspect, aspect))
    area = scale * grid[0] * grid[1]
    for side, most, ideal in zip(
        size, grid, (math.sqrt(area * aspect), math.sqrt(area / aspect)), strict=True
    ):
        assert 1 <= side <= most
        assert abs(side - ideal) <= 0.5 or side == most or (side == 1 and ideal < 1)


def test_scales_and_aspects_are_drawn_from_their_whole_range() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([block_size(rng, (100, 100), (0.15, 0.2), (0.75, 1.5)) for _ in range(2000)])
    area, ratio = sizes.prod(1) / 1e4, sizes[:, 0] / sizes[:, 1]
    assert 0.145 < area.min() < 0.155
    assert 0.195 < area.max() < 0.205
    assert 0.72 < ratio.min() < 0.78
    assert 1.45 < ratio.max() < 1.53
    assert abs(area.mean() - 0.175) < 0.002


@fewer
@given(GRIDS, SEEDS, st.integers(1, 5))
def test_image_masks(grid: tuple[int, int], seed: int, images: int) -> None:
    masks = image_masks(Dice.of(seed, 0), grid, images)
    cells = grid[0] * grid[1]
    assert masks.context.dtype == masks.targets.dtype == torch.int64
    assert masks.targets.shape[:2] == (images, 4)
    contexts, targets = rows_of(masks.context), rows_of(masks.targets)
    assert all(is_block(target, grid[1]) for target in targets)
    for i, context in enumerate(contexts):
        hidden = set().union(*targets[4 * i : 4 * i + 4])
        assert context
        assert not context & hidden
        assert context | hidden <= set(range(cells))
    if min(grid) >= 8:
        assert masks.context.shape[1] >= 10
        side = (0.15 * cells) ** 0.5 / 1.25 - 0.5, (0.2 * cells) ** 0.5 * 1.25 + 0.5
        assert side[0] ** 2 < masks.targets.shape[2] < side[1] ** 2


@fewer
@given(GRIDS, SEEDS, st.integers(1, 5), st.integers(1, 8), st.sampled_from([(8, 0.15), (2, 0.7)]))
def test_tube_masks(
    grid: tuple[int, int], seed: int, clips: int, times: int, kind: tuple[int, float]
) -> None:
    masks = tube_masks(Dice.of(seed, 0), grid, clips, times, *kind)
    cells = grid[0] * grid[1]
    assert masks.targets.shape[:2] == (clips, 1)
    for context, target in zip(rows_of(masks.context), rows_of(masks.targets), strict=True):
        assert context
        assert target
        assert not context & target
        for places in (context, target):  # tubes: in all frames the same
            frame = {p % cells for p in places}
            assert places == {t * cells + p for t in range(times) for p in frame}
    if clips == 1:  # nothing is left out to stack
        assert masks.context.shape[1] + masks.targets.shape[2] == times * cells


def test_about_nine_tenths_of_a_clip_are_hidden_from_either_encoder() -> None:
    hidden = []
    for draw in range(50):
        for kind in ((8, 0.15), (2, 0.7)):
            masks = tube_masks(Dice.of(0, draw), (14, 14), 24, 8, *kind)
            hidden.append(1 - masks.context.shape[1] / (8 * 196))
    assert 0.75 < np.mean(hidden[::2]) < 0.95
    assert 0.85 < np.mean(hidden[1::2]) < 1.0


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (14, 14)])
def test_every_patch_is_reached_as_context_and_as_target(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    seen = {"context": torch.zeros(cells), "targets": torch.zeros(cells)}
    tubes = {"context": torch.zeros(cells), "targets": torch.zeros(cells)}

    def count(into: dict[str, torch.Tensor], masks: Masks) -> None:
        for key, places in masks._asdict().items():
            into[key] += torch.bincount(places.flatten(), minlength=cells)

    for draw in range(60):
        count(seen, image_masks(Dice.of(1, draw), grid, 16, min_keep=4))
        count(tubes, tube_masks(Dice.of(1, draw), grid, 16, 1, 8, 0.15))
        count(tubes, tube_masks(Dice.of(1, draw), grid, 16, 1, 2, 0.7))
    for counts in (*seen.values(), *tubes.values()):
        assert (counts > 0).all()
    # The last row and column, which the official code never takes, are like the first.
    for counts in seen.values():
        frame = counts.view(grid)
        assert 0.8 < frame[-1].sum() / frame[0].sum() < 1.25
        assert 0.8 < frame[:, -1].sum() / frame[:, 0].sum() < 1.25


def test_ranks_agree_in_sizes_and_differ_in_places() -> None:
    for draw in range(10):
        ours, theirs = (image_masks(Dice.of(3, draw, rank), (14, 14), 4) for rank in (0, 1))
        assert ours.targets.shape == theirs.targets.shape
        sizes = [
            len({int(p) // 14 for p in masks.targets[0, 0]}) for masks in (ours, theirs)
        ]  # rows of a block
        assert sizes[0] == sizes[1]
        assert not torch.equal(ours.targets, theirs.targets)


def test_the_same_draw_gives_the_same_masks_and_another_others() -> None:
    first, again, other = (image_masks(Dice.of(3, d), (8, 8), 4) for d in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.targets.shape != other.targets.shape or not torch.equal(first[1], other[1])


def test_images_of_a_batch_have_other_places() -> None:
    blocks = place_blocks(np.random.default_rng(0), (8, 8), (3, 3), 100, 4)
    assert blocks.shape == (100, 4, 64)
    assert (blocks.sum(-1) == 9).all()
    assert len({row.tobytes() for row in blocks.reshape(400, 64)}) == 36  # all there are


def test_stacking_keeps_as_many_as_the_fewest_and_drops_evenly() -> None:
    chosen = np.zeros((400, 6), bool)
    chosen[:, :5], chosen[0, 3:] = True, False
    places = stack(np.random.default_rng(0), chosen)
    assert places.shape == (400, 3)
    assert places[0].tolist() == [0, 1, 2]
    share = torch.bincount(places[1:].flatten(), minlength=6) / 399
    assert share[5] == 0
    assert ((share[:5] - 0.6).abs() < 0.1).all()


@pytest.mark.parametrize("min_keep", [1, 10, 20])
def test_a_context_keeps_enough_of_a_small_grid(min_keep: int) -> None:
    for draw in range(20):
        masks = image_masks(Dice.of(0, draw), (8, 8), 32, min_keep=min_keep)
        assert masks.context.shape[1] >= min(min_keep, (49 - 16) // 2)
        assert masks.targets.shape[2] <= 16


def test_blocks_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="fewer or smaller blocks"):
        image_masks(Dice.of(0, 0), (4, 4), 2, target_scale=(1.0, 1.0), target_aspect=(1.0, 1.0))
