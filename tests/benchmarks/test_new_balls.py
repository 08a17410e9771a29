"""The benchmark of new balls: what it says of the game itself, and of dreams without them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.new_balls import AHEAD, describe, landings, truth


def test_new_balls_of_the_game() -> None:
    frames = truth(landings(60, seed=0))
    appeared, fell, *ways = describe(frames)
    assert (appeared, fell) == (1, 1)
    assert sum(ways) == pytest.approx(1)
    assert min(ways) > 0.1  # one third each
    without = frames.clone()
    without[:, 1:, :20] = 0
    assert describe(without) == [0, 0, 0, 0, 0]
    stuck = frames.clone()
    stuck[:, 2:] = frames[:, 1:2]
    assert describe(stuck)[:2] == [1, 0]


def test_none_are_found_in_noise() -> None:
    torch.manual_seed(0)
    assert describe(torch.rand(8, 1 + AHEAD, 32, 32, 3))[1] == 0
