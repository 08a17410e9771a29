"""Sprites: one that obeys, among others that bounce about; for models of video and of actions.

Nothing is to be achieved: the reward is always 0. What a model of such video should find out is
where the sprites are and which part of the picture an action moves; both are in `info`. Positions
are the middles (x, y) of sprites in pixels, x along the columns of the image and y down its rows.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from datamodules.envs.wrappers import StepResult
from datamodules.errors import UserError

SIZES = (32, 64)
MOVES = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])  # stay, left, right, up, down
SPEEDS = (-2, -1, 1, 2)  # of distractors along each axis, in pixels of a 32x32 image
SIDE = 5  # of a sprite in a 32x32 image
# The first is the agent's; further distractors begin again with the second.
SHAPES = (
    ("#####", "#####", "#####", "#####", "#####"),
    (".###.", "#####", "#####", "#####", ".###."),
    ("..#..", ".###.", "#####", ".###.", "..#.."),
    ("..#..", "..#..", "#####", "..#..", "..#.."),
    ("#####", "#...#", "#...#", "#...#", "#####"),
    ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
)
COLOURS = (
    (255, 255, 255),
    (255, 64, 64),
    (64, 160, 255),
    (64, 220, 64),
    (255, 200, 0),
    (220, 80, 220),
)


def bounds(size: int = 32) -> tuple[float, float]:
    """The smallest and the largest position of a sprite along an axis."""
    margin = (SIDE * size // 32 - 1) / 2
    return margin, size - 1 - margin


def move_agent(
    positions: np.ndarray, actions: np.ndarray, step: int = 3, size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Where actions (...) lead from positions (..., 2), and which actions these moves are.

    The edge of the image holds the agent back. The effective actions (...) are 0 (stay) where it
    could not move at all.
    """
    moved = np.clip(positions + step * MOVES[actions], *bounds(size))
    return moved, np.where((moved != positions).any(-1), actions, 0)


def bounce(
    positions: np.ndarray, velocities: np.ndarray, size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """The next positions and velocities (..., 2) of distractors, which the edges reflect."""
    low, high = bounds(size)
    moved = positions + velocities
    reflected = np.where(
        moved < low, 2 * low - moved, np.where(moved > high, 2 * high - moved, moved)
    )
    return reflected, np.where(reflected == moved, velocities, -velocities)


def render_sprites(agent: np.ndarray, distractors: np.ndarray, size: int = 32) -> np.ndarray:
    """Images uint8 (..., S, S, 3) of agents (..., 2) over distractors (..., n, 2), on black."""
    places = np.concatenate([agent[..., None, :], distractors], -2)
    batch, count = places.shape[:-2], places.shape[-2]
    corners = np.rint(places - bounds(size)[0]).astype(np.int64).reshape(-1, count, 2)
    images = np.zeros((len(corners), size, size, 3), np.uint8)
    image = np.arange(len(corners))[:, None]
    for sprite in reversed(range(count)):  # the agent last, on top
        kind = (sprite - 1) % (len(SHAPES) - 1) + 1 if sprite else 0
        rows, columns = _pixels(kind, size)
        x, y = corners[:, sprite, :1], corners[:, sprite, 1:]
        images[image, y + rows, x + columns] = COLOURS[kind]
    return images.reshape(*batch, size, size, 3)


class Sprites(gym.Env):
    """A white square that goes left, right, up or down, or stays, among bouncing distractors.

    The observation is (S, S, 3) uint8. `info` has `position` (2,) of the agent, `distractors`
    (n, 2), both float64, and `effective_action`: what the last action did, 0 (stay) where the edge
    kept the agent from moving. All episodes are truncated after `max_steps`; the reward is 0.

    Args:
        size: side of the image, 32 or 64; everything scales with it.
        distractors: how many, at least 0.
        step: pixels that an action moves the agent; by default 3 at 32 pixels and 6 at 64.
        max_steps: length of an episode.

    Raises:
        UserError: an argument out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self, size: int = 32, distractors: int = 2, step: int | None = None, max_steps: int = 64
    ) -> None:
        if size not in SIZES:
            raise UserError(f"size={size} of Sprites must be one of {list(SIZES)}")
        self.size, self.count, self.max_steps = size, distractors, max_steps
        self.step_size = 3 * size // 32 if step is None else step
        for name, value, least in (
            ("distractors", distractors, 0),
            ("step", self.step_size, 1),
            ("max_steps", max_steps, 1),
        ):
            if value < least:
                raise UserError(f"{name}={value} of Sprites must be at least {least}")
        self.observation_space = Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts the sprites to random places."""
        super().reset(seed=seed)
        low, high = bounds(self.size)
        steps = round(high - low) + 1
        self.position = low + self.np_random.integers(steps, size=2)
        self.distractors = low + self.np_random.integers(steps, size=(self.count, 2))
        speeds = self.np_random.choice(SPEEDS, (self.count, 2))
        self.velocities = speeds * (self.size // 32)
        self.t = 0
        return self.render(), self._info(0)

    def step(self, action: int) -> StepResult:
        """Moves the agent and lets the others bounce."""
        self.position, effective = move_agent(
            self.position, np.asarray(action), self.step_size, self.size
        )
        self.distractors, self.velocities = bounce(self.distractors, self.velocities, self.size)
        self.t += 1
        over = self.t >= self.max_steps
        return self.render(), 0.0, False, over, self._info(int(effective))

    def get_action_meanings(self) -> list[str]:
        """Names of the actions, as Atari games have them."""
        return ["stay", "left", "right", "up", "down"]

    def render(self) -> np.ndarray:
        """The observation."""
        return render_sprites(self.position, self.distractors, self.size)

    def _info(self, effective: int) -> dict[str, Any]:
        return {
            "position": self.position.copy(),
            "distractors": self.distractors.copy(),
            "effective_action": effective,
        }


def _pixels(kind: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a sprite, from its upper left corner."""
    mask = np.array([[pixel == "#" for pixel in row] for row in SHAPES[kind]])
    scale = size // 32
    rows, columns = np.nonzero(mask.repeat(scale, 0).repeat(scale, 1))
    return rows, columns


if "zoo/Sprites-v0" not in gym.registry:
    gym.register("zoo/Sprites-v0", entry_point=f"{__name__}:Sprites")
