"""The stage of C: generations of controllers, scored in the dream or in the environment.

One update of the training is one generation of CMA-ES. All members meet the same starts and noise,
or the same real episodes. In shapes, P is the number of members, R of episodes of each, Z the
length of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from zoo.base import Batch
from zoo.world_models.dreams import FixedMembers, LinearMembers, Scores, dream
from zoo.world_models.evolution import Evolution
from zoo.world_models.gate import fixed_policies, judge
from zoo.world_models.reality import FixedPlayers, LinearPlayers, episode_seeds
from zoo.world_models.statistics import over_ranks
from zoo.world_models.vision import Code

if TYPE_CHECKING:
    from zoo.world_models.module import Clock, WorldModels


class Generations:
    """What moves C: an evolution in each round, and what its members are scored by.

    Attributes:
        evolution: of the present round; None before its first generation in this process.
        starts: codes (N, Z) of first frames of replayed episodes, from which dreams start.

    Args:
        model: has the parts and the settings.
    """

    def __init__(self, model: WorldModels) -> None:
        self.model = model
        self.evolution: Evolution | None = None
        self.starts: Code | None = None
        self._starts_of = 0  # steps that the replay had seen then
        self._told: Mapping[str, Tensor] | None = None  # a checkpoint's, until it is needed

    def prepare(self, data: Any) -> None:
        """Encodes the first frames of a datamodule's episodes, where dreams start from them."""
        model, seen = self.model, data.steps_seen
        if model.evolve_in == "dream" and (self.starts is None or self._starts_of != seen):
            first = data.first_steps(model.starts)
            code = model.code(model.transfer_batch_to_device(first, model.device, 0))
            self.starts, self._starts_of = Code(code.mean[:, 0], code.logvar[:, 0]), seen

    def step(self, clock: Clock, batch: Batch, data: Any) -> dict[str, float]:
        """Scores the members of one generation and moves C to the new mean; gives metrics.

        Args:
            clock: of the update.
            batch: starts dreams where nothing was prepared.
            data: the datamodule, or None.

        Raises:
            UserError: C is to evolve in an environment that there is not.
        """
        model, metrics = self.model, {}
        evolution = self._evolution_at(clock, data)
        if clock.update == 0 and model.evolve_in == "dream" and data is not None:
            metrics = self._check_dreams(clock, data)
        # The mean comes along for the record: it is what will act.
        members = torch.cat([evolution.ask(), evolution.mean[None]]).to(model.device)
        if model.evolve_in == "dream":
            scores, where = self._dream_scores(members, batch), "dream"
        else:
            scores, where = self._real_scores(members, clock, data), "real"
        reward = scores.reward.double().mean(1).cpu()
        reward = over_ranks(reward, model.ranks, model.device) / model.ranks
        penalty = model.weight_decay * members.cpu().double().square().mean(1)
        evolution.tell((reward - penalty)[:-1])
        model.controller.load(evolution.mean)
        return metrics | {
            f"{where}_return": float(reward[-1]),
            f"{where}_return_best": float(reward[:-1].max()),
            f"{where}_return_population": float(reward[:-1].mean()),
            f"{where}_length": float(scores.length[-1].float().mean()),
            "sigma": evolution.sigma,
        }

    def _evolution_at(self, clock: Clock, data: Any) -> Evolution:
        """The evolution of this round: begun here, restored, or as it is."""
        if self.evolution is None or clock.update == 0:
            model, told = self.model, self._told
            self._told = None
            fresh = clock.update == 0 or told is None
            start = model.controller.flat if fresh else told["start"]  # type: ignore[index]
            # Of the datamodule's seed and the round; the same on all ranks.
            sequence = np.random.SeedSequence([getattr(data, "seed", 0), clock.round])
            seed = int(sequence.generate_state(1)[0])
            self.evolution = Evolution(start, model.sigma, model.population, seed, model.diagonal)
            if not fresh:
                self.evolution.load_state_dict(told)  # type: ignore[arg-type]
        return self.evolution

    def _dream_scores(self, members: Tensor, batch: Batch) -> Scores:
        """Scores of members (P, size) in dreams."""
        model = self.model
        linear = LinearMembers(model.controller.population(members), model.actions, model.features)
        start = self._draw_starts(batch)
        return dream(model.dreamer(), linear, len(members), start, model.horizon)

    def _draw_starts(self, batch: Batch) -> Tensor:
        """Codes (R, Z) of first frames of replayed episodes."""
        code = self.starts
        if code is None:  # without a datamodule, of whatever frames there are
            code = Code(*(part.flatten(0, 1) for part in self.model.code(batch)))
        drawn = torch.randint(len(code.mean), (self.model.rollouts,), device=self.model.device)
        return Code(code.mean[drawn], code.logvar[drawn]).sample()

    def _real_scores(self, members: Tensor, clock: Clock, data: Any) -> Scores:
        """Scores of members (P, size) in the environment, all in the same episodes."""
        if data is None or not hasattr(data, "play"):
            raise UserError(
                "WorldModels(evolve_in='environment') needs an EnvDataModule to play in"
            )
        model = self.model
        key = (clock.round, clock.update)
        seeds = episode_seeds(data.seed, model.global_rank, key, model.rollouts)
        players = LinearPlayers(model, model.controller.population(members), model.rollouts)
        played = data.play(players, seeds * len(members), model.horizon)
        shape = (len(members), model.rollouts)
        return Scores(
            torch.from_numpy(played.reward).view(shape), torch.from_numpy(played.length).view(shape)
        )

    def _check_dreams(self, clock: Clock, data: Any) -> dict[str, float]:
        """The gate (see `gate`): fixed policies must earn in dreams what they really earn."""
        model, episodes = self.model, self.model.gate_episodes
        if not episodes or not hasattr(data, "play"):
            return {}
        policies = fixed_policies(model.spec)
        choices = [model.actions.encode(c.to(model.device)) for c in policies.values()]
        start = self._draw_starts({})
        dreamed = dream(model.dreamer(), FixedMembers(choices), len(choices), start, model.horizon)
        seeds = episode_seeds(data.seed, model.global_rank, (clock.round, -1), episodes)
        players = FixedPlayers(list(policies.values()), episodes)
        played = data.play(players, seeds * len(choices), model.horizon)
        real = torch.from_numpy(played.reward).view(len(choices), -1).double().mean(1)
        both = torch.stack([dreamed.reward.cpu().double().mean(1), real])
        both = over_ranks(both, model.ranks, model.device) / model.ranks
        return {f"gate_{name}": ratio for name, ratio in judge(policies, *both).items()}

    def state_dict(self) -> Mapping[str, Tensor] | None:
        """The present evolution's, for a checkpoint; None before there was one."""
        return self._told if self.evolution is None else self.evolution.state_dict()

    def load_state_dict(self, told: Mapping[str, Tensor] | None) -> None:
        """Keeps a checkpoint's evolution until the next generation."""
        self.evolution, self._told = None, told
