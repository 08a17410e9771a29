"""What to compare a planner in Two Rooms with: policies that know where things are, and no model.

All play with the true dynamics as one batch, without an environment: the figures of any policy cost
a moment, and `success_rate` with a planner's policy tells what the planner alone loses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from datamodules.envs.two_rooms import ROOMS, Tasks, move, reached

# From the noise, positions (N, 2) and their tasks to actions (N, 2).
Policy = Callable[[np.random.Generator, np.ndarray, Tasks], np.ndarray]
NOISE = 0.75  # standard deviation of each component of an action


def random_walk(rng: np.random.Generator, positions: np.ndarray, tasks: Tasks) -> np.ndarray:
    """Uniform actions."""
    return rng.uniform(-1, 1, positions.shape)


def straight_line(rng: np.random.Generator, positions: np.ndarray, tasks: Tasks) -> np.ndarray:
    """Straight towards the goal, in steps of length 1 and one that just reaches it."""
    away = tasks.goal - positions
    distance = np.linalg.norm(away, axis=-1, keepdims=True)
    return away / np.maximum(distance, ROOMS[tasks.size].step)


def noisy_line(rng: np.random.Generator, positions: np.ndarray, tasks: Tasks) -> np.ndarray:
    """`straight_line` with normal noise (0.75): it feels its way to the door."""
    action = straight_line(rng, positions, tasks) + rng.normal(0, NOISE, positions.shape)
    return np.clip(action, -1, 1)


def success_rate(
    policy: Policy, tasks: Tasks, rng: np.random.Generator, max_steps: int | None = None
) -> float:
    """Share of the tasks that a policy solves in at most `max_steps` steps.

    Args:
        policy: what acts.
        tasks: of `sample_tasks`.
        rng: the policy's noise.
        max_steps: by default those of the environment.
    """
    positions = tasks.start
    done = reached(positions, tasks.goal, tasks.size)
    for _ in range(max_steps or ROOMS[tasks.size].max_steps):
        positions = move(positions, policy(rng, positions, tasks), tasks.wall, tasks.size)
        done |= reached(positions, tasks.goal, tasks.size)
    return float(done.mean())
