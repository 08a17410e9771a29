"""A walk along seven places, seen as images: the right end is the goal, the left end the end."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

PLACES = 7


class Walk(gym.Env):
    """Left (0) or right (1); reward 1 at the right end, which does not end the episode."""

    def __init__(self, limit: int = 12) -> None:
        self.observation_space = Box(0, 255, (64, 64, 1), np.uint8)
        self.action_space = Discrete(2)
        self.limit = limit

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.time = int(self.np_random.integers(2, 5)), 0
        return self._image(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = min(self.place + (1 if action else -1), PLACES - 1)
        self.time += 1
        done = self.place == 0
        return self._image(), float(self.place == PLACES - 1), done, self.time == self.limit, {}

    def _image(self) -> np.ndarray:
        image = np.zeros((64, 64, 1), np.uint8)
        image[:, self.place * 9 : self.place * 9 + 9] = 255
        return image
