"""A dot on a small image: an environment, sequences of it, and a model that knows the truth."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor, nn

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.jepa_wm.module import JEPAWorldModel

SIDE = 12
ACTIONS = {
    "discrete": ActionSpec("discrete", nvec=(3,)),
    "box": ActionSpec("box", low=(-1.0, -1.0), high=(1.0, 1.0)),
    "multi_discrete": ActionSpec("multi_discrete", nvec=(2, 4)),
}
TINY = {"latent": 8, "hidden": 8, "layers": 1, "heads": 2}
PLAN = {"horizon": 4, "block": 2, "iterations": 2, "candidates": 20, "elites": 4}


def spec(action: str = "box", **others: ArraySpec) -> Spec:
    return Spec({"image": ArraySpec((SIDE, SIDE, 1), "uint8"), **others}, ACTIONS[action])


def build(space: Spec | None = None, **options: Any) -> JEPAWorldModel:
    torch.manual_seed(0)
    usual = {"size": "nano", "encoder": "conv", "predictor": "mlp", **TINY, **PLAN}
    return JEPAWorldModel(space or spec(), **{**usual, **options})


def draw(positions: np.ndarray) -> np.ndarray:
    """Images (..., S, S, 1) of dots at (..., 2) in [0, 1]."""
    away = np.arange(SIDE) - positions[..., None] * (SIDE - 1)
    profile = np.exp(-0.5 * away**2)
    image = 255 * profile[..., 1, :, None] * profile[..., 0, None, :]
    return image.astype(np.uint8)[..., None]


def sequences(rows: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Batches (B, T) of dots that move by a fifth of their actions, without the end of any."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(size=(rows, 1, 2)).repeat(steps, 1)
    action = rng.uniform(-1, 1, (rows, steps, 2))
    for t in range(1, steps):
        positions[:, t] = (positions[:, t - 1] + 0.2 * action[:, t - 1]).clip(0, 1)
    flags = ("is_first", "is_last", "is_terminal")
    batch = {
        "obs": {"image": torch.from_numpy(draw(positions))},
        "action": torch.from_numpy(action).float(),
        "reward": torch.zeros(rows, steps),
    }
    return batch | {key: torch.zeros(rows, steps, dtype=torch.bool) for key in flags}


class DotEnv(gym.Env):
    """Bring the dot to the goal; an episode has 8 steps."""

    observation_space = Dict({k: Box(0, 255, (SIDE, SIDE, 1), np.uint8) for k in ("goal", "image")})
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.goal, self.t = *self.np_random.uniform(size=(2, 2)), 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position = (self.position + 0.2 * action).clip(0, 1)
        self.t += 1
        reached = bool(np.linalg.norm(self.position - self.goal) < 0.1)
        return self._observe(), float(reached), reached, self.t == 8, {}

    def _observe(self) -> dict[str, np.ndarray]:
        return {"goal": draw(self.goal), "image": draw(self.position)}


class Centre(nn.Module):
    """Images to the centre of their dot: the true position, roughly."""

    def forward(self, image: Tensor) -> Tensor:
        weight = image.float().squeeze(-1)
        place = torch.arange(SIDE) / (SIDE - 1)
        total = weight.sum((-2, -1))
        x, y = (weight.sum(-2) * place).sum(-1), (weight.sum(-1) * place).sum(-1)
        return torch.stack([x, y], -1) / total.unsqueeze(-1)


class Motion(nn.Module):
    """The true dynamics, by actions that are scaled to [-1, 1]."""

    history = 1

    def forward(self, latents: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        return latents[:, -1] + 0.2 * actions[:, -1]


def truth(space: Spec | None = None, **options: Any) -> JEPAWorldModel:
    """A model whose latents are positions, and which predicts them right."""
    usual = {"latent": 2, "final_norm": False, "horizon": 6, "block": 1, "candidates": 200}
    model = build(space, **{**usual, "iterations": 8, "elites": 20, **options})
    model.encoder, model.predictor = Centre(), Motion()
    return model
