"""Catch: a small ball falls, a paddle is to be under it; for models that must not lose details.

Everything a policy needs is the ball, which is a few pixels of the picture. Positions are the upper
left corners (x, y) of ball and paddle in pixels, x along the columns of the image and y down its
rows.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from datamodules.envs.wrappers import StepResult
from datamodules.errors import UserError

SIZES = (32, 64)
MOVES = (0, -1, 1)  # stay, left, right
# In pixels of a 32x32 image: per step, or of the paddle.
FALL, DRIFT, PACE = 2, 1, 2
FALLS = (1, 2)
PADDLE_WIDTH, PADDLE_HEIGHT = 6, 2
STEPS_PER_BALL = 15  # from the top row to the paddle's, at the usual speed
PADDLE_COLOUR, BALL_COLOUR = (64, 160, 255), (255, 255, 255)


class Catch(gym.Env):
    """A ball falls, drifting left or right or not at all; the walls reflect it.

    After `steps_per_ball` actions it is in the paddle's rows: the reward is 1 if they overlap there
    and -1 if not, at all other steps 0. With the next action another ball appears at the top, at a
    random place; the last ball terminates the episode. Every ball can be caught.

    The observation is (S, S, 3) uint8. `info` has `ball` and `paddle`, (2,) int64, and `caught`,
    how many balls so far.

    Args:
        size: side of the image, 32 or 64; paddle and speeds scale with it.
        ball: side of the ball in pixels.
        balls: how many an episode has.
        fall: pixels of a 32x32 image that the ball falls in a step, 1 or 2; with 1 it takes twice
            the steps.

    Raises:
        UserError: an argument out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, size: int = 32, ball: int = 2, balls: int = 1, fall: int = FALL) -> None:
        if size not in SIZES:
            raise UserError(f"size={size} of Catch must be one of {list(SIZES)}")
        self.size, self.scale = size, size // 32
        most = PADDLE_HEIGHT * self.scale
        if not 1 <= ball <= most:
            raise UserError(f"ball={ball} of Catch must be from 1 to {most} at size {size}")
        if balls < 1:
            raise UserError(f"balls={balls} of Catch must be at least 1")
        if fall not in FALLS:
            raise UserError(f"fall={fall} of Catch must be one of {list(FALLS)}")
        self.side, self.balls, self.fall = ball, balls, fall * self.scale
        self.steps_per_ball = STEPS_PER_BALL * FALL // fall
        self.fallen = self.drift = 0
        self.observation_space = Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts the paddle to a random place and lets the first ball fall."""
        super().reset(seed=seed)
        width = self.size - PADDLE_WIDTH * self.scale
        x = int(self.np_random.integers(width // PACE + 1)) * PACE
        self.paddle = np.array([x, self.size - PADDLE_HEIGHT * self.scale])
        self.caught = self.landed = 0
        self._new_ball()
        return self.render(), self._info()

    def step(self, action: int) -> StepResult:
        """Moves the paddle; the ball falls, or a new one appears.

        Raises:
            UserError: an action that there is not.
        """
        if not self.action_space.contains(action):
            raise UserError(f"Catch has no action {action}: choose from 0 to {len(MOVES) - 1}")
        limit = self.size - PADDLE_WIDTH * self.scale
        self.paddle[0] = np.clip(self.paddle[0] + MOVES[action] * PACE * self.scale, 0, limit)
        if self.fallen == self.steps_per_ball:
            self._new_ball()
            return self.render(), 0.0, False, False, self._info()
        self.fallen += 1
        self.ball[1] += self.fall
        x, limit = int(self.ball[0]) + self.drift, self.size - self.side
        if not 0 <= x <= limit:
            x, self.drift = (-x if x < 0 else 2 * limit - x), -self.drift
        self.ball[0] = x
        if self.fallen < self.steps_per_ball:
            return self.render(), 0.0, False, False, self._info()
        self.landed += 1
        caught = -self.side < x - self.paddle[0] < PADDLE_WIDTH * self.scale
        self.caught += int(caught)
        over = self.landed == self.balls
        return self.render(), 1.0 if caught else -1.0, over, False, self._info()

    def render(self) -> np.ndarray:
        """The observation; the ball is in front of the paddle."""
        image = np.zeros((self.size, self.size, 3), np.uint8)
        x, y = self.paddle
        image[y:, x : x + PADDLE_WIDTH * self.scale] = PADDLE_COLOUR
        x, y = self.ball
        image[y : y + self.side, x : x + self.side] = BALL_COLOUR
        return image

    def _new_ball(self) -> None:
        self.ball = np.array([int(self.np_random.integers(self.size - self.side + 1)), 0])
        self.drift = int(self.np_random.integers(-1, 2)) * DRIFT * self.scale
        self.fallen = 0

    def _info(self) -> dict[str, Any]:
        return {"ball": self.ball.copy(), "paddle": self.paddle.copy(), "caught": self.caught}


if "zoo/Catch-v0" not in gym.registry:
    gym.register("zoo/Catch-v0", entry_point=f"{__name__}:Catch")
