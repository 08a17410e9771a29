"""Populations in the real environment: what C evolves in where dreams are not good enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoo.base import Obs, State
from zoo.world_models.controller import Population

if TYPE_CHECKING:
    from zoo.world_models.module import WorldModels


def episode_seeds(seed: int, rank: int, key: tuple[int, int], count: int) -> list[int]:
    """Seeds of `count` episodes, other ones for each rank and key (round, generation)."""
    # The collector's keys are (rank, environment, episode): these have one number more.
    sequence = np.random.SeedSequence(seed, spawn_key=(rank, key[0], key[1] + 1, 0))
    return [int(state) for state in sequence.generate_state(count)]


class LinearPlayers:
    """A population of controllers; member i plays the episodes [i * rollouts, (i+1) * rollouts)."""

    def __init__(self, model: WorldModels, population: Population, rollouts: int) -> None:
        self.model, self.population, self.rollouts = model, population, rollouts

    def initial_state(self, batch_size: int) -> State:
        """M's empty memory."""
        return self.model.initial_state(batch_size)

    def act(self, obs: Obs, state: State, episode: Tensor) -> tuple[Tensor, State]:
        """Every row acts with the parameters of its member."""
        rows = self.population.select(episode // self.rollouts)
        return self.model.act_with(
            obs, state, lambda features: rows.raw(features.unsqueeze(1)).squeeze(1)
        )


class FixedPlayers:
    """Policies that do not look; policy i plays the episodes [i * rollouts, (i + 1) * rollouts)."""

    def __init__(self, choices: list[Tensor], rollouts: int) -> None:
        """`choices`: for each policy its actions (n, ...), in the units of the environment."""
        self.choices, self.rollouts = choices, rollouts

    def initial_state(self, batch_size: int) -> State:
        """Nothing to remember."""
        return {}

    def act(self, obs: Obs, state: State, episode: Tensor) -> tuple[Tensor, State]:
        """One of each policy's actions, drawn uniformly."""
        policies = [self.choices[i] for i in (episode // self.rollouts).tolist()]
        drawn = [choice[torch.randint(len(choice), ())] for choice in policies]
        return torch.stack(drawn), state
