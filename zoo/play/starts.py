"""Where dreams begin: real steps, from fresh episodes of an environment or from recordings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.base import Batch, State
from zoo.dream_env import Arrays, dreaming, may_start

MakeEnv = Callable[[], gym.Env]


@dataclass(frozen=True)
class Start:
    """A real step in which dreams begin.

    Attributes:
        state: of the model, {key: (1, ...)}.
        obs: what was seen there, {key: (...)}.
        seed, actions: how an environment gets there: the seed of its reset and the actions (n, ...)
            that follow; None for recorded steps.
    """

    state: State
    obs: Arrays
    seed: int | None = None
    actions: np.ndarray | None = None


def from_env(
    model: Any, make_env: MakeEnv, count: int = 8, context: int = 5, seed: int = 0
) -> list[Start]:
    """Starts after 1 * context, ..., count * context random steps of fresh episodes.

    Where an episode ends before, its last step from which it went on is the start.
    """
    with closing(make_env()) as env:
        seeds = np.random.SeedSequence(seed).generate_state(count)
        return [_wander(model, env, int(s), context * (i + 1)) for i, s in enumerate(seeds)]


def from_batch(model: Any, batch: Batch, count: int = 8, context: int = 5) -> list[Start]:
    """At most `count` starts, evenly spread over recorded sequences (B, T).

    Raises:
        UserError: no step of the sequences has `context` steps up to it and one after it.
    """
    places = torch.nonzero(may_start(batch, context, False))
    if not len(places):
        raise UserError(
            f"no dream can start: no recorded sequence has {context} steps and then another"
        )
    with dreaming(model, 0):
        states = model.observe(move_data_to_device(batch, model.device))
    chosen = places[torch.linspace(0, len(places) - 1, min(count, len(places))).long()]
    return [
        Start(
            {key: value[row, step][None].clone() for key, value in states.items()},
            {key: batch["obs"][key][row, step].numpy() for key in model.spec.obs},
        )
        for row, step in chosen.tolist()
    ]


def lead(env: gym.Env, start: Start) -> Arrays:
    """Takes an environment to a start that was found in one like it; what is seen there."""
    obs, _ = env.reset(seed=start.seed)
    assert start.actions is not None
    for action in start.actions:
        obs = env.step(action)[0]
    return obs


def _wander(model: Any, env: gym.Env, seed: int, length: int) -> Start:
    """The start after up to `length` random steps of an episode."""
    spec = Spec.from_spaces(env.observation_space, env.action_space).action
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    seen, rewards, actions = [obs], [0.0], []
    for _ in range(length):
        action = np.asarray(spec.sample(rng))
        obs, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
        actions.append(action)
        seen.append(obs)
        rewards.append(float(reward))
    taken = np.array(actions, spec.dtype).reshape(-1, *spec.shape)
    steps = {
        # The action of the last step is still to be chosen.
        "action": np.concatenate([taken, np.zeros((1, *spec.shape), spec.dtype)]),
        "reward": np.array(rewards, np.float32),
        "is_first": np.arange(len(seen)) == 0,
        "is_last": np.zeros(len(seen), bool),
        "is_terminal": np.zeros(len(seen), bool),
    }
    arrays = {key: np.stack([obs[key] for obs in seen]) for key in model.spec.obs}
    batch: dict[str, Any] = {key: torch.from_numpy(value)[None] for key, value in steps.items()}
    batch["obs"] = {key: torch.from_numpy(value)[None] for key, value in arrays.items()}
    with dreaming(model, 0):
        states = model.observe(move_data_to_device(batch, model.device))
    state = {key: value[:, -1].clone() for key, value in states.items()}
    return Start(state, {key: value[-1] for key, value in arrays.items()}, seed, taken)
