"""`python -m benchmarks.error_budget RUN`: what a planner in Two Rooms loses where.

A run of jepa-wm plans with learnt dynamics, a learnt cost and a search of limited effort. Here each
is replaced by the truth in turn, on the same fresh tasks:

- true dynamics: the images to which actions really lead, encoded by the model;
- true cost: the length of the way through the door, from where a linear probe of the latents says
  that the dot is (with true dynamics, from where it is);
- more effort: four times the candidates, twice the iterations.

Beside them: pixels in place of latents (with true dynamics), actions cloned from the random walk
that the run learnt from, relabelled with the goals that it happened to reach, and the policies of
`two_rooms_policies`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.envs.two_rooms import (
    Tasks,
    TwoRooms,
    move,
    reached,
    render_dots,
    render_positions,
    sample_positions,
    sample_tasks,
    sample_walls,
)
from datamodules.envs.two_rooms_policies import (
    Policy,
    noisy_line,
    random_walk,
    straight_line,
    success_rate,
)
from datamodules.errors import UserError
from zoo.base import Imagined, State
from zoo.jepa_wm.encoder import Encoder
from zoo.jepa_wm.module import JEPAWorldModel
from zoo.planning import CEM
from zoo.runs import Run, load

PROBED = 2000  # frames that the probe is fitted to; as many check it
RIDGE = 1e-3
WALKS, WALK_STEPS, FURTHEST = 600, 100, 50  # of the random walk, and the furthest goals in steps
CLONE_UPDATES, CLONE_BATCH, CLONE_LR = 3000, 256, 1e-3


class Probe:
    """Where the dot is (N, 2) in pixels, by a linear map of latents (N, D).

    Attributes:
        r2: share of the variance of positions in other frames that it explains.
    """

    def __init__(self, model: JEPAWorldModel, rng: np.random.Generator, wall: str) -> None:
        size = model.spec.obs[model.image].shape[0]
        walls = sample_walls(rng, 2 * PROBED, wall, size)
        right = rng.random(2 * PROBED) < 0.5
        truth = torch.from_numpy(sample_positions(rng, walls, right, size))
        seen = _embed(model, render_positions(truth.numpy(), walls, size)).double()
        inputs, checked = F.pad(seen, (0, 1), value=1.0).split(PROBED)
        gram = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
        self.weight = torch.linalg.solve(gram, inputs.T @ truth[:PROBED])
        error = checked @ self.weight - truth[PROBED:]
        self.r2 = 1 - float(error.square().mean() / truth[PROBED:].var(0).mean())

    def __call__(self, latents: Tensor) -> Tensor:
        """Positions (..., 2) of latents (..., D)."""
        return F.pad(latents.double(), (0, 1), value=1.0) @ self.weight


class Swapped:
    """Imagines as a model does, but for what is replaced by the truth.

    States have "position", "wall" and "target" (N, 2) beside what the model needs.

    Args:
        model: what was learnt.
        probe: of its latents.
        dynamics: "learnt" or "true".
        cost: "learnt", "true", or "pixels", which needs true dynamics.
    """

    def __init__(self, model: JEPAWorldModel, probe: Probe, dynamics: str, cost: str) -> None:
        self.model, self.probe, self.dynamics, self.cost = model, probe, dynamics, cost
        self.size = model.spec.obs[model.image].shape[0]

    def imagine(self, state: State, actions: Any, horizon: int) -> Imagined:
        """Rewards (N, H) of actions (N, H, 2): minus the cost after each."""
        if self.dynamics == "learnt":
            imagined = self.model.imagine(state, actions, horizon)
            if self.cost == "learnt":
                return imagined
            positions = self.probe(imagined.state["latents"][:, :, -1])
            cost = way(positions, state["target"][:, None], state["wall"][:, None])
        else:
            cost = self._true_cost(state, actions)
        return Imagined(-cost, torch.ones_like(cost), {}, actions)

    def _true_cost(self, state: State, actions: Tensor) -> Tensor:
        wall, position, steps = state["wall"].numpy(), state["position"].numpy(), []
        for action in actions.unbind(1):
            position = move(position, action.numpy(), wall, self.size)
            steps.append(position)
        path = np.stack(steps, 1)
        if self.cost == "true":
            return way(torch.from_numpy(path), state["target"][:, None], state["wall"][:, None])
        if self.cost == "pixels":  # the walls are the same in both
            dots = torch.from_numpy(render_dots(path, self.size)).float()
            goal = torch.from_numpy(render_dots(state["target"].numpy(), self.size)).float()
            return (dots - goal[:, None]).div(255).square().mean((-1, -2))
        latents = torch.stack(
            [_embed(self.model, render_positions(p, wall, self.size)) for p in steps], 1
        )
        return (latents - state["goal"][:, None]).square().mean(-1)


def way(positions: Tensor, goals: Tensor, walls: Tensor) -> Tensor:
    """Pixels (...) from positions to goals (..., 2), through the door where they are apart."""
    straight = (positions - goals).norm(dim=-1)
    through = (positions - walls).norm(dim=-1) + (walls - goals).norm(dim=-1)
    apart = (positions[..., 0] < walls[..., 0]) != (goals[..., 0] < walls[..., 0])
    return torch.where(apart, through, straight)


def planned(swapped: Swapped, planner: CEM) -> Policy:
    """Acts as the model does: `replan` actions of a plan, then another that begins with the rest.

    A plan sees the newest frame only. For tasks that are solved there are no new ones. A policy is
    for one call of `success_rate`.
    """
    model, left = swapped.model, 0
    plan, done = torch.zeros(0), np.zeros(0, bool)

    def policy(rng: np.random.Generator, positions: np.ndarray, tasks: Tasks) -> np.ndarray:
        nonlocal left, plan, done
        if not len(plan):
            plan = torch.zeros(len(positions), planner.horizon, 2)
            done = np.zeros(len(positions), bool)
        done |= reached(positions, tasks.goal, tasks.size)
        before, plan = plan, torch.cat([plan[:, 1:], torch.zeros_like(plan[:, :1])], 1)
        rows = np.flatnonzero(~done)
        if not left and len(rows):
            wall, start, goal = (part[rows] for part in tasks[:3])
            open_tasks = Tasks(wall, start, goal, tasks.size)
            state = _state(model, positions[rows], open_tasks)
            found = planner.plan(swapped, state, model.actions, before[rows], model.score)
            plan[rows] = found.mean
        left = (left or model.replan) - 1
        action: np.ndarray = plan[:, 0].numpy().clip(-1, 1)
        return action

    return policy


def cloned(rng: np.random.Generator, wall: str, size: int, hold: int) -> Policy:
    """Learns which action a random walk took where it came to a place some steps later."""
    walls = sample_walls(rng, WALKS, wall, size)
    path = [sample_positions(rng, walls, rng.random(WALKS) < 0.5, size)]
    actions: list[np.ndarray] = []
    held = np.zeros(WALKS, int)
    for _ in range(WALK_STEPS):
        fresh = rng.uniform(-1, 1, (WALKS, 2))
        begins = (held == 0)[:, None]
        actions.append(fresh if not actions else np.where(begins, fresh, actions[-1]))
        held = np.where(held == 0, rng.integers(1, hold + 1, WALKS), held) - 1
        path.append(move(path[-1], actions[-1], walls, size))
    places, taken = np.stack(path, 1), np.stack(actions, 1)
    net = nn.Sequential(Encoder("conv", (size, size, 3), 256), nn.ReLU(), nn.Linear(256, 2))
    optimizer = torch.optim.Adam(net.parameters(), CLONE_LR)
    for _ in range(CLONE_UPDATES):
        row, t = rng.integers(WALKS, size=CLONE_BATCH), rng.integers(WALK_STEPS, size=CLONE_BATCH)
        later = np.minimum(t + rng.integers(1, FURTHEST + 1, CLONE_BATCH), WALK_STEPS)
        seen = _pair(places[row, t], places[row, later], walls[row], size)
        loss = F.mse_loss(net(seen).tanh(), torch.from_numpy(taken[row, t]).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def policy(rng: np.random.Generator, positions: np.ndarray, tasks: Tasks) -> np.ndarray:
        action = net(_pair(positions, tasks.goal, tasks.wall, size)).tanh()
        # The mean of random actions is short: only its direction is of use.
        out: np.ndarray = (action / action.abs().amax(-1, keepdim=True).clamp(min=1e-6)).numpy()
        return out

    return policy


def budget(
    model: JEPAWorldModel, tasks: Tasks, wall: str, hold: int, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """Names and shares of the tasks that are solved."""
    probe = Probe(model, np.random.default_rng([seed, 1]), wall)
    yield "R² of the positions read by the probe", probe.r2
    harder = replace(
        model.planner,
        candidates=4 * model.planner.candidates,
        elites=2 * model.planner.elites,
        iterations=2 * model.planner.iterations,
    )
    plans = {
        "learnt dynamics, learnt cost": ("learnt", "learnt", model.planner),
        "true dynamics, learnt cost": ("true", "learnt", model.planner),
        "learnt dynamics, true cost": ("learnt", "true", model.planner),
        "true dynamics, true cost": ("true", "true", model.planner),
        "true dynamics, true cost, more effort": ("true", "true", harder),
        "learnt dynamics, learnt cost, more effort": ("learnt", "learnt", harder),
        "true dynamics, pixels": ("true", "pixels", model.planner),
    }
    for name, (dynamics, cost, planner) in plans.items():
        torch.manual_seed(seed)
        policy = planned(Swapped(model, probe, dynamics, cost), planner)
        yield name, success_rate(policy, tasks, np.random.default_rng(seed))
    torch.manual_seed(seed)
    policies = {
        "cloned random walk": cloned(np.random.default_rng([seed, 2]), wall, tasks.size, hold),
        "random walk": random_walk,
        "straight line": straight_line,
        "straight line with noise": noisy_line,
    }
    for name, policy in policies.items():
        yield name, success_rate(policy, tasks, np.random.default_rng(seed))


@torch.no_grad()
def _embed(model: JEPAWorldModel, images: np.ndarray) -> Tensor:
    return model.embed(torch.from_numpy(images)).float()


def _state(model: JEPAWorldModel, positions: np.ndarray, tasks: Tasks) -> State:
    """What `Swapped` needs at positions (N, 2)."""
    count, key = len(positions), model.image
    images = render_positions(positions, tasks.wall, tasks.size)
    goals = render_positions(tasks.goal, tasks.wall, tasks.size)
    seen = {key: torch.from_numpy(images)[:, None], "goal": torch.from_numpy(goals)[:, None]}
    batch = {
        "obs": seen,
        "action": torch.zeros(count, 1, 2),
        "is_first": torch.ones(count, 1, dtype=torch.bool),
    }
    state = {name: value[:, 0] for name, value in model.observe(batch).items()}
    truth = {"position": positions, "wall": tasks.wall, "target": tasks.goal}
    return state | {name: torch.from_numpy(value) for name, value in truth.items()}


def _pair(positions: np.ndarray, goals: np.ndarray, walls: np.ndarray, size: int) -> Tensor:
    """Images (N, S, S, 3): dot, walls and goal."""
    images = render_positions(positions, walls, size)
    return torch.from_numpy(np.concatenate([images, render_dots(goals, size)[..., None]], -1))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run of jepa-wm in Two Rooms")
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = Run(options.run)
    model: Any = load(run.checkpoint())
    data: Any = run.datamodule()
    rooms: Any = data.make_env().unwrapped
    if not isinstance(model, JEPAWorldModel) or not isinstance(rooms, TwoRooms):
        raise UserError(f"'{options.run}' is no run of jepa-wm in zoo/TwoRooms-v0: name one")
    torch.set_num_threads(1)
    rng = np.random.default_rng(options.seed)
    tasks = sample_tasks(rng, options.tasks, rooms.wall, rooms.size)
    print(f"| {options.tasks} tasks | success |\n| --- | --- |")
    for name, share in budget(model.eval(), tasks, rooms.wall, data.random_hold, options.seed):
        print(f"| {name} | {share:.3f} |", flush=True)


if __name__ == "__main__":
    main()
