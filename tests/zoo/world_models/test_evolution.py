"""CMA-ES: it maximises, and goes on bit for bit from what it was told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.world_models.evolution import Evolution


def score(members: Tensor) -> Tensor:
    return -(members - 1).square().sum(1)


@pytest.mark.parametrize("diagonal", [False, True])
def test_finds_the_top(diagonal: bool) -> None:
    evolution = Evolution(torch.zeros(5), 0.3, 12, seed=0, diagonal=diagonal)
    for _ in range(60):
        evolution.tell(score(evolution.ask()))
    torch.testing.assert_close(evolution.mean, torch.ones(5), rtol=0, atol=0.05)


@pytest.mark.parametrize("diagonal", [False, True])
def test_goes_on_from_its_state(diagonal: bool) -> None:
    once = Evolution(torch.ones(30) / 3, 0.1, 8, seed=3, diagonal=diagonal)
    states = []
    for _ in range(12):
        once.tell(score(once.ask()))
        states.append(once.state_dict())
    for told in (1, 5, 11):
        again = Evolution(torch.ones(30) / 3, 0.1, 8, seed=3, diagonal=diagonal)
        again.load_state_dict(states[told - 1])
        assert again.generation == told
        for _ in range(12 - told):
            again.tell(score(again.ask()))
        assert torch.equal(again.mean, once.mean)
        assert again.sigma == once.sigma


def test_asks_the_same_until_told() -> None:
    evolution = Evolution(torch.zeros(3), 0.1, 4, seed=0)
    assert torch.equal(evolution.ask(), evolution.ask())


def test_leaves_the_global_generator_alone() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    evolution = Evolution(torch.zeros(3), 0.1, 4, seed=0)
    evolution.tell(score(evolution.ask()))
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_seeds_differ() -> None:
    first, second = (Evolution(torch.zeros(3), 0.1, 4, seed=s).ask() for s in (0, 1))
    assert not torch.equal(first, second)
