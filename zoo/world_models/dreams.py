"""Whole populations in dreams of M: every rollout of every member advances in one tensor.

Section 4.2 of the paper's Doom experiment ("training inside of the dream"). All members meet the
same starts and the same noise, so that what differs between their scores is their own doing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zoo.base import State
from zoo.world_models.controller import Actions, Population
from zoo.world_models.memory import Memory

# Members whose rollouts have all ended leave the batch; looked for every so many steps.
_LEAVE_EVERY = 8


class Scores(NamedTuple):
    """What P members earned in R dreams each.

    Attributes:
        reward: (P, R) undiscounted returns.
        length: (P, R) steps.
    """

    reward: Tensor
    length: Tensor


class Members(Protocol):
    """P policies."""

    def act(self, state: State) -> Tensor:
        """Encoded actions (P, R, A) in states {key: (P, R, ...)}."""

    def select(self, members: Tensor) -> Members:
        """Some of them (N,)."""


class LinearMembers:
    """A population of controllers that see features of the state."""

    def __init__(
        self, population: Population, actions: Actions, features: Callable[[State], Tensor]
    ) -> None:
        self.population, self.actions, self.features = population, actions, features

    def act(self, state: State) -> Tensor:
        """Encoded actions (P, R, A)."""
        return self.actions.choose(self.population.raw(self.features(state)))

    def select(self, members: Tensor) -> LinearMembers:
        """Some of them (N,)."""
        return LinearMembers(self.population.select(members), self.actions, self.features)


class FixedMembers:
    """Members that act without looking: each has actions of its own, one of which is drawn."""

    def __init__(self, choices: list[Tensor]) -> None:
        """`choices`: for each member encoded actions (n, A)."""
        self.choices = choices

    def act(self, state: State) -> Tensor:
        """Encoded actions (P, R, A), uniform over each member's own."""
        rollouts = state["z"].shape[1]
        drawn = [c[torch.randint(len(c), (rollouts,), device=c.device)] for c in self.choices]
        return torch.stack(drawn)

    def select(self, members: Tensor) -> FixedMembers:
        """Some of them (N,)."""
        return FixedMembers([self.choices[i] for i in members.tolist()])


class Advanced(NamedTuple):
    """Where one dreamed step leads.

    Attributes:
        z, h, c: (..., Z), (..., H), (..., H).
        reward: (...) earned on the way.
        done: (...) probability that the task ends there.
    """

    z: Tensor
    h: Tensor
    c: Tensor
    reward: Tensor
    done: Tensor


class Dreamer:
    """Advances dreams; made anew for each rollout, for it keeps M's weights side by side.

    Args:
        memory: M.
        temperature: of the mixtures.
        threshold: end where the head finds it more likely than not, rather than with the
            probability it says.
    """

    def __init__(self, memory: Memory, temperature: float = 1.0, threshold: bool = False) -> None:
        self.memory, self.temperature, self.threshold = memory, temperature, threshold
        weight = torch.cat(memory.weights, 1).detach().clone()
        # tanh x = 2 sigmoid(2 x) - 1: one sigmoid for all gates, and tanh is slow on CPUs.
        weight[2 * memory.hidden : 3 * memory.hidden] *= 2
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        self._weight = weight.t()

    def recall(self, state: State, action: Tensor) -> tuple[Tensor, Tensor]:
        """The next h and c (..., H) of states {"z", "h", "c", "first"} and encoded actions."""
        x = torch.cat([self.memory.inputs(state["z"], action, state["first"]), state["h"]], -1)
        i, f, g, o = torch.sigmoid(x @ self._weight).float().chunk(4, -1)
        c = f * state["c"] + i * (2 * g - 1)
        return o * (2 * torch.sigmoid(2 * c) - 1), c

    def step(
        self,
        state: State,
        action: Tensor,
        choice: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Advanced:
        """One dreamed step from states {"z", "h", "c", "first"} (..., N) and encoded actions.

        `choice` and `noise` are those of `Mixture.sample`.
        """
        memory = self.memory
        h, c = self.recall(state, action)
        drawn = memory.predict(h).sample(self.temperature, choice, noise)
        z = memory.following(state["z"], drawn)
        inputs = memory.head_inputs(h, z)
        if memory.reward_head is not None:
            # Ours: where dreams leave the data, a linear head promises what nobody ever earned.
            reward = memory.reward_head(inputs).pred().clamp(*memory.rewards)
        else:
            reward = torch.full_like(h[..., 0], memory.step_reward or 0.0)
        return Advanced(z, h, c, reward, self._done(inputs, z))

    def _done(self, inputs: Tensor, z: Tensor) -> Tensor:
        """Probability (...) that the task ends at z, of what the head sees; 0 without a head."""
        memory = self.memory
        done = torch.zeros_like(z[..., 0])
        if memory.done_head is not None:
            logit = memory.done_head(inputs).logit
            if self.threshold:
                done = (logit > 0).float()
            else:  # the loss weighs ends more, which adds ln(weight) to the log-odds
                done = torch.sigmoid(logit - math.log(memory.done_weight))
        if memory.halt_outside is not None:
            margin = memory.halt_outside * (memory.high - memory.low)
            outside = (z < memory.low - margin) | (z > memory.high + margin)
            done = torch.where(outside.any(-1), 1.0, done)
        return done


@torch.no_grad()
def dream(dreamer: Dreamer, members: Members, count: int, start: Tensor, horizon: int) -> Scores:
    """Scores of `count` members in dreams from the same starts.

    Args:
        dreamer: advances the dreams.
        members: `count` policies P.
        start: (R, Z) codes of first observations of episodes.
        horizon: most steps of a dream.
    """
    rollouts = len(start)
    shape = (count, rollouts)
    hidden = start.new_zeros(*shape, dreamer.memory.hidden)
    state: State = {"z": start.expand(*shape, -1), "h": hidden, "c": hidden}
    state["first"] = torch.ones(shape, dtype=torch.bool, device=start.device)
    total = Scores(start.new_zeros(shape), start.new_zeros(shape))
    here = torch.arange(count, device=start.device)
    alive = start.new_ones(shape)
    reward, length = start.new_zeros(shape), start.new_zeros(shape)
    for t in range(horizon):
        action = members.act(state)
        choice = torch.rand(rollouts, start.shape[-1], device=start.device)
        noise = torch.randn_like(start)
        ends = torch.rand(rollouts, device=start.device)
        following = dreamer.step(state, action, choice, noise)
        reward += following.reward * alive
        length += alive
        alive = alive * (ends >= following.done)
        state = {"z": following.z, "h": following.h, "c": following.c}
        state["first"] = torch.zeros_like(alive, dtype=torch.bool)
        if (t + 1) % _LEAVE_EVERY and t + 1 < horizon:
            continue
        stay = alive.any(1)
        if t + 1 < horizon and bool(stay.all()):
            continue
        total.reward[here], total.length[here] = reward, length
        if not bool(stay.any()):
            break
        kept = torch.nonzero(stay).flatten()
        members, here = members.select(kept), here[kept]
        state = {key: value[kept] for key, value in state.items()}
        reward, length, alive = reward[kept], length[kept], alive[kept]
    return total
