"""Practice of DIAMOND: the agent acts in dreams that go on, and hears what its steps were worth.

A dream's state is that of `Dream`, with the agent's memory `agent_h`, `agent_c` and the dream's
`age` in steps. A dream that ends, or has lasted so many steps, begins anew from a replayed history;
what is cut off is still worth the critic's value of the state in which it arrived.

Letters of shapes: N dreams, H steps, A length of an encoded action.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.collector import choose_rows
from zoo.base import State
from zoo.diamond.actor_critic import ActorCritic
from zoo.diamond.dream import Dream, latest
from zoo.diamond.lstm import Memory
from zoo.nets.distributions import PolicySteps
from zoo.returns import lambda_returns


class Rollout(NamedTuple):
    """What happened in H steps of N dreams.

    Attributes:
        policy: over actions (N, H, A).
        action: (N, H, A) taken, encoded.
        value: (N, H) of the states acted in.
        arrival: (N, H) value of the state each step arrived in, before dreams began anew; of no
            meaning where the dream ended.
        reward: (N, H).
        end, cut: (N, H) bool, the dream ended with this step, or was cut off after it.
    """

    policy: PolicySteps
    action: Tensor
    value: Tensor
    arrival: Tensor
    reward: Tensor
    end: Tensor
    cut: Tensor

    def returns(self, discount: float, lam: float) -> Tensor:
        """Lambda-returns (N, H) of the steps."""
        rows = (self.reward, self.arrival, discount * (~self.end).float(), self.cut)
        reward, arrival, discounts, cut = (F.pad(row, (1, 0)) for row in rows)
        return lambda_returns(reward, arrival, discounts, cut, lam)


def starts_of(states: State, is_last: Tensor) -> State:
    """States (M, ...) from which dreams can begin: at the ends of sequences (B, T, ...).

    Those where an episode ends are left out, unless all do: nobody has seen how these go on.
    """
    goes_on = ~is_last[:, -1]
    goes_on = goes_on | ~goes_on.any()
    starts = {key: value[:, -1][goes_on] for key, value in states.items()}
    age = torch.zeros(len(starts["frames"]), dtype=torch.long, device=goes_on.device)
    return {**starts, "age": age}


def draw(starts: State, count: int) -> State:
    """States (count, ...) of starts (M, ...), different ones as long as there are enough."""
    age = starts["age"]
    if len(age) < count:
        rows = torch.randint(len(age), (count,), device=age.device)
    else:
        rows = torch.randperm(len(age), device=age.device)[:count]
    return {key: value[rows] for key, value in starts.items()}


def practise(
    agent: ActorCritic, dream: Dream, now: State, starts: State, horizon: int
) -> tuple[Rollout, State]:
    """Goes on with dreams for `horizon` steps; also returns the states they are in then.

    Gradients are those of policies and values through the agent's memory; what the agent sees and
    earns has none.

    Args:
        agent: chooses.
        dream: the world.
        now: (N, ...) states of dreams.
        starts: (M, ...) states from which dreams that are over begin anew.
        horizon: steps H, and those after which a dream is cut off.
    """
    policies, steps, arrived = [], [], []
    for _ in range(horizon):
        policy, value, memory = agent(latest(now), Memory(now["agent_h"], now["agent_c"]))
        action = policy.sample().detach()
        following, outcome = dream.step(now, action)
        reward, end = outcome.sample()
        age = now["age"] + 1
        cut = (age >= horizon) & ~end
        policies.append(policy)
        steps.append((action, value, reward, end, cut))
        arrived.append((following["frames"][:, -1:], memory.h.detach(), memory.c.detach()))
        following |= {"agent_h": memory.h, "agent_c": memory.c, "age": age}
        now = choose_rows(end | cut, draw(starts, len(age)), following)
    action, value, reward, end, cut = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
    # On arriving at the state acted in next, unless another dream began there.
    arrival = F.pad(value.detach()[:, 1:], (0, 1))
    asked = cut.clone()
    asked[:, -1] = True
    frames, h, c = (torch.stack(parts, 1)[asked] for parts in zip(*arrived, strict=True))
    with torch.no_grad():
        arrival[asked] = agent(latest({"frames": frames}), Memory(h, c))[1]
    rollout = Rollout(PolicySteps(policies), action, value, arrival, reward, end, cut)
    return rollout, {key: value.detach() for key, value in now.items()}
