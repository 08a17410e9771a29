"""The stage of C: what a generation moves and says, and what a checkpoint keeps of it."""

from __future__ import annotations

from typing import Any

import torch
from latent_models import sequences, vectors

from zoo.world_models.module import Clock, WorldModels

TINY: dict[str, Any] = {"hidden": 8, "population": 4, "rollouts": 3, "horizon": 6, "sigma": 0.5}


def build() -> WorldModels:
    torch.manual_seed(0)
    return WorldModels(vectors(), **TINY)


def test_a_generation_moves_the_controller_to_the_mean() -> None:
    model = build()
    metrics = model.generations.step(Clock(0, "controller", 0), sequences(model.spec), None)
    evolution = model.generations.evolution
    assert evolution is not None
    assert torch.equal(model.controller.flat, evolution.mean)
    assert (evolution.mean != 0).any()
    names = {"dream_return", "dream_return_best", "dream_return_population", "dream_length"}
    assert metrics.keys() == {*names, "sigma"}
    assert 1 <= metrics["dream_length"] <= 6


def test_each_round_evolves_anew_from_the_controller() -> None:
    model = build()
    batch = sequences(model.spec)
    for update in range(2):
        model.generations.step(Clock(0, "controller", update), batch, None)
    reached, before = model.controller.flat, model.generations.evolution
    model.generations.step(Clock(1, "controller", 0), batch, None)
    evolution = model.generations.evolution
    assert evolution is not None
    assert evolution is not before
    assert evolution.generation == 1
    assert torch.equal(evolution.start.float(), reached)


def test_what_was_told_is_kept_until_it_is_needed() -> None:
    model, other = build(), build()
    batch = sequences(model.spec)
    assert model.generations.state_dict() is None
    model.generations.step(Clock(0, "controller", 0), batch, None)
    told = model.generations.state_dict()
    assert told is not None
    other.generations.load_state_dict(told)
    assert other.generations.state_dict() is told
    for generations in (model.generations, other.generations):
        torch.manual_seed(1)
        generations.step(Clock(0, "controller", 1), batch, None)
    after, again = model.generations.state_dict(), other.generations.state_dict()
    assert after is not None
    assert again is not None
    assert after["scores"].shape == (2, 4)
    for key, value in after.items():
        assert torch.equal(value, again[key])
    assert torch.equal(model.controller.flat, other.controller.flat)
