"""Recorded episodes in memory, served as the contract of "contexts" says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.envs.factory import make_env
from datamodules.spec import ActionSpec, ArraySpec, Spec


@dataclass
class Episode:
    """n actions: obs {key: (n, ...)} before each, action (n, ...), what each earned (n,)."""

    obs: dict[str, np.ndarray]
    action: np.ndarray
    earned: np.ndarray


class Contexts(pl.LightningDataModule):
    """Return-to-go contexts of episodes; one draws an end among all steps, and pads on the left."""

    def __init__(
        self,
        episodes: list[Episode],
        spec: Spec,
        batch_size: int = 4,
        sequence_length: int = 20,
        seed: int = 0,
        updates_per_epoch: int = 1000,
        env: str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.episodes = spec, episodes
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.updates_per_epoch, self.env_steps = updates_per_epoch, 0
        self.make_env = None if env is None else partial(make_env, env)
        self.seed = seed
        self.rng: np.random.Generator | None = None
        self._noise: Tensor | None = None
        self.returns = torch.tensor([e.earned.sum() for e in episodes], dtype=torch.float32)
        steps = {k: np.concatenate([e.obs[k] for e in episodes]) for k in spec.vectors}
        self.statistics = {
            k: (torch.from_numpy(v.mean(0)).float(), torch.from_numpy(v.std(0)).float())
            for k, v in steps.items()
        }
        self.ends = [(i, t) for i, e in enumerate(episodes) for t in range(len(e.earned))]

    def train_dataloader(self) -> Loader:
        return Loader(self)

    def next_batch(self) -> dict[str, Any]:
        if self.rng is None:
            rank = self.trainer.global_rank if self.trainer is not None else 0
            self.rng = np.random.default_rng([self.seed, rank])
            torch.manual_seed(self.seed + rank)
        elif self._noise is not None:
            torch.set_rng_state(self._noise)
            self._noise = None
        drawn = self.rng.integers(len(self.ends), size=self.batch_size)
        rows = [self.context(*self.ends[i]) for i in drawn]
        return torch.utils.data.default_collate(rows)

    def context(self, index: int, end: int) -> dict[str, Any]:
        episode, length = self.episodes[index], self.sequence_length
        steps = slice(max(0, end - length + 1), end + 1)
        count = steps.stop - steps.start

        def padded(values: np.ndarray) -> np.ndarray:
            lead = np.zeros((length - count, *values.shape[1:]), values.dtype)
            return np.concatenate([lead, values])

        to_go = episode.earned[::-1].cumsum()[::-1].astype(np.float32)
        arrived = np.concatenate([[0.0], episode.earned[:-1]]).astype(np.float32)
        return {
            "obs": {key: padded(value[steps]) for key, value in episode.obs.items()},
            "action": padded(episode.action[steps]),
            "reward": padded(arrived[steps]),
            "return_to_go": padded(to_go[steps]),
            "timestep": padded(np.arange(steps.start, steps.stop)),
            "mask": padded(np.ones(count, bool)),
        }

    def state_dict(self) -> dict[str, Any]:
        if self.rng is None:
            return {}
        state = self.rng.bit_generator.state["state"]
        words = [str(state["state"]), str(state["inc"])]
        return {"words": words, "noise": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng = np.random.default_rng(0)
        whole = self.rng.bit_generator.state
        whole["state"] = dict(zip(("state", "inc"), map(int, state["words"]), strict=True))
        self.rng.bit_generator.state = whole
        self._noise = state["noise"]


class Loader:
    def __init__(self, data: Contexts) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.updates_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(len(self)):
            yield self.data.next_batch()


class CartPoleContexts(Contexts):
    """Episodes of CartPole by a rule that errs with a different probability in each."""

    def __init__(
        self,
        count: int = 30,
        batch_size: int = 4,
        sequence_length: int = 20,
        seed: int = 0,
        updates_per_epoch: int = 1000,
        max_steps: int = 200,
    ) -> None:
        spec = Spec({"vector": ArraySpec((4,), "float32")}, ActionSpec("discrete", nvec=(2,)))
        rng = np.random.default_rng(0)
        episodes = [play_cartpole(rng, max_steps) for _ in range(count)]
        super().__init__(
            episodes, spec, batch_size, sequence_length, seed, updates_per_epoch, "CartPole-v1"
        )


def play_cartpole(rng: np.random.Generator, max_steps: int = 200) -> Episode:
    """Balances by leaning into the fall, but errs with a probability drawn for the episode."""
    env = gym.make("CartPole-v1")
    mistakes = rng.uniform(0, 1)
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    seen, actions, earned = [], [], []
    over = False
    while not over and len(earned) < max_steps:
        right = obs[2] + 0.3 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1] > 0
        action = int(right) if rng.uniform() > mistakes else int(rng.integers(2))
        seen.append(obs)
        actions.append(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        earned.append(reward)
        over = terminated or truncated
    env.close()
    return Episode(
        {"vector": np.stack(seen).astype(np.float32)}, np.array(actions), np.array(earned)
    )
