"""Plays episodes in fresh environments and measures the returns.

This is the one evaluation loop: `zoo eval`, the Evaluation callback and the benchmarks call it.
Environments are stepped together, so that the policy answers one batch per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from datamodules.envs.wrappers import DictObservation, env_name
from datamodules.errors import UserError
from datamodules.spec import Spec

if TYPE_CHECKING:
    from zoo.base import ZooModel

MakeEnv = Callable[[], gym.Env]


@dataclass(frozen=True)
class EvalResult:
    """Undiscounted return and length (agent steps) of each episode, in the order of the seeds."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def return_mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def return_std(self) -> float:
        """Standard deviation of the returns over the episodes."""
        return float(np.std(self.returns))


def evaluate(
    model: ZooModel,
    make_env: MakeEnv,
    episodes: int,
    seed: int,
    explore: bool = False,
    num_envs: int = 16,
) -> EvalResult:
    """Plays `episodes` episodes with a policy and returns what they earned.

    Episode i is always reset with the i-th child of `SeedSequence(seed)`, whatever the number of
    environments; the noise of a stochastic policy is drawn per batch and does depend on it. The
    global random state and the model's train mode are left as they were found.

    Args:
        model: anything that fulfils the `Policy` protocol; it acts on its own device.
        make_env: builds one environment, wrapped as for training.
        episodes: number of episodes, at least 1.
        seed: seeds the environments and the policy's noise.
        explore: sample actions rather than take the best.
        num_envs: most environments that live at once.

    Raises:
        UserError: another environment than the model was made for, or one that fails.
    """
    if episodes < 1 or num_envs < 1:
        raise ValueError(f"episodes ({episodes}) and num_envs ({num_envs}) must be at least 1")
    seeds = [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(episodes)]
    envs = [make_env() for _ in range(min(num_envs, episodes))]
    try:
        require_spaces(model, envs[0])
        with _apart(model, seed):
            return _play(model, envs, seeds, explore)
    finally:
        for env in envs:
            env.close()


def require_spaces(model: Any, env: gym.Env) -> None:
    """Refuses an environment without what the model looks at, or with other actions.

    Raises:
        UserError: names what the model and the environment have.
    """
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    seen = {key: spec.obs.get(key) for key in model.spec.obs}
    acts = model.spec.action is not None and spec.action.agrees(model.spec.action)
    if seen != dict(model.spec.obs) or not acts:
        name = env.name if isinstance(env, DictObservation) else env_name(env)
        raise UserError(
            f"the model was made for {model.spec}, but the environment {name} has {spec}: set "
            "`env` to the one that its data comes from"
        )


def require_env(model: Any, data: Any) -> None:
    """Refuses recorded data that is to be evaluated in another environment, see `require_spaces`.

    Args:
        model: what is evaluated.
        data: its datamodule. One that counts env steps has played in its environment already.
    """
    if hasattr(data, "make_env") and not hasattr(data, "env_steps"):
        with closing(data.make_env()) as env:
            require_spaces(model, env)


class _Episode:
    """One episode on its way."""

    def __init__(self, env: gym.Env, index: int, seed: int) -> None:
        self.env = env
        self.index = index
        self.total = 0.0
        self.reward = 0.0
        self.length = 0
        with _named(env):
            self.obs, _ = env.reset(seed=seed)

    def step(self, action: np.ndarray) -> bool:
        """Acts once; True when the episode has ended."""
        chosen = action if action.ndim else action.item()
        with _named(self.env):
            self.obs, reward, terminated, truncated, _ = self.env.step(chosen)
        self.reward = float(reward)
        self.total += self.reward
        self.length += 1
        return bool(terminated or truncated)


@contextmanager
def _named(env: gym.Env) -> Iterator[None]:
    """An evaluation cannot leave out the episodes that fail: it would flatter the policy."""
    try:
        yield
    except Exception as error:
        name = type(env.unwrapped).__name__
        raise UserError(
            f"the environment {name} failed in an evaluation with {type(error).__name__}: {error}; "
            "mend it and resume the run"
        ) from error


def _play(model: Any, envs: Sequence[gym.Env], seeds: Sequence[int], explore: bool) -> EvalResult:
    returns, lengths = [0.0] * len(seeds), [0] * len(seeds)
    waiting = iter(range(len(envs), len(seeds)))
    running = [_Episode(env, i, seeds[i]) for i, env in enumerate(envs)]
    state = model.initial_state(len(running))
    fresh = model.initial_state(1)
    rewarded = getattr(model, "rewarded", None)
    while running:
        if rewarded is not None:
            earned = torch.tensor([episode.reward for episode in running], device=model.device)
            state = rewarded(state, earned)
        obs = _batch([episode.obs for episode in running], model)
        action, state = model.act(obs, state, explore=explore)
        ended = [e.step(a) for e, a in zip(running, action.cpu().numpy(), strict=True)]
        if not any(ended):
            continue
        keep, renewed = [], []
        for row, episode in enumerate(running):
            if ended[row]:
                returns[episode.index] = episode.total
                lengths[episode.index] = episode.length
                following = next(waiting, None)
                if following is None:
                    continue
                running[row] = _Episode(episode.env, following, seeds[following])
                renewed.append(row)
            keep.append(row)
        state = _renew(state, fresh, renewed, keep)
        running = [running[row] for row in keep]
    return EvalResult(tuple(returns), tuple(lengths))


def _batch(observations: list[dict[str, np.ndarray]], model: Any) -> dict[str, Tensor]:
    """Stacks observations to one tensor (B, ...) for each key of the spec, and for the goal."""
    goal = getattr(model, "goal_key", None)
    keys = dict.fromkeys([*model.spec.obs, *([goal] if goal in observations[0] else [])])
    return {
        key: torch.from_numpy(np.stack([obs[key] for obs in observations])).to(model.device)
        for key in keys
    }


def _renew(
    state: dict[str, Tensor], fresh: dict[str, Tensor], renewed: list[int], keep: list[int]
) -> dict[str, Tensor]:
    """Puts the initial state into the rows whose episode is new and drops those not kept."""
    result = {}
    for key, value in state.items():
        value = value.clone()
        value[renewed] = fresh[key]
        result[key] = value[keep]
    return result


@contextmanager
def _apart(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, and a random state of its own."""
    training = model.training
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)
