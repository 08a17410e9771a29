"""A key, a long corridor, a door: what is done at the beginning is paid for at the end."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from datamodules.envs.wrappers import StepResult
from datamodules.errors import UserError

LEFT, RIGHT, USE = range(3)
ROOM_STEPS = 4  # spent in each of the two rooms


class KeyCorridor(gym.Env):
    """Pick up a key, cross a corridor in which nothing matters, and open a door with it.

    An episode has 4 steps in a room of three cells with a key at one of its ends, `length` steps in
    the corridor, and 4 steps in a like room with a door at one of its ends. The agent enters each
    room in the middle, moves left or right, and uses what is in its cell. The reward is 1 at the
    last step if the door was opened with the key, and 0 otherwise and at all other steps: about one
    in fifteen random episodes is rewarded. (After the key-to-door task of Mesnard et al., 2021, of
    the Decision Transformer paper, section 5.4.)

    The observation is (10,): one-hot room (key, corridor, door), one-hot cell, side of the key or
    door that is in sight (-1, 1; 0 in the corridor or once it was used), whether the key is held,
    whether the door is open, and the share of the episode that has passed.

    Args:
        length: steps in the corridor.
        remember: show after the first room whether the key is held. Without it, as in the paper,
            only a memory tells, and a value of what is seen cannot: the corridor looks the same
            with and without the key.
    """

    def __init__(self, length: int = 20, remember: bool = False) -> None:
        if length < 1:
            raise UserError(f"KeyCorridor needs a length of at least 1, got {length}")
        self.length, self.remember = length, remember
        self.steps = 2 * ROOM_STEPS + length
        self.observation_space = Box(-1.0, 1.0, (10,), np.float32)
        self.action_space = Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts key and door to random sides."""
        super().reset(seed=seed)
        self.sides = self.np_random.choice((-1, 1), size=2)
        self.t, self.cell, self.key, self.open = 0, 0, False, False
        return self._observe(), {}

    def step(self, action: int) -> StepResult:
        """Moves or uses; 1 is paid when the episode ends with the door open."""
        room = self._room()
        if action == USE:
            there = room != 1 and self.cell == self.sides[room // 2]
            self.key = self.key or (room == 0 and there)
            self.open = self.open or (room == 2 and there and self.key)
        else:
            move = -1 if action == LEFT else 1
            self.cell = int(np.clip(self.cell + move, -1, 1))
        self.t += 1
        if self._room() != room:
            self.cell = 0
        over = self.t == self.steps
        return self._observe(), float(over and self.open), over, False, {"success": self.open}

    def _room(self) -> int:
        """0 with the key, 1 the corridor, 2 with the door."""
        return int(self.t >= ROOM_STEPS) + int(self.t >= ROOM_STEPS + self.length)

    def _observe(self) -> np.ndarray:
        room = self._room()
        obs = np.zeros(10, np.float32)
        obs[room] = obs[3 + self.cell + 1] = 1.0
        if (room == 0 and not self.key) or (room == 2 and not self.open):
            obs[6] = self.sides[room // 2]
        obs[7] = self.key and (self.remember or room == 0)
        obs[8], obs[9] = self.open, self.t / self.steps
        return obs


TASKS: dict[str, dict[str, Any]] = {"KeyCorridor": {}, "KeyCorridorSeen": {"remember": True}}
for name, options in list(TASKS.items()):
    TASKS |= {f"{name}{length}": {**options, "length": length} for length in (20, 50, 100)}
for name, options in TASKS.items():
    if f"zoo/{name}-v0" not in gym.registry:
        gym.register(f"zoo/{name}-v0", entry_point=f"{__name__}:KeyCorridor", kwargs=options)
