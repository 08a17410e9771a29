"""What single games need: ViZDoom, MiniGrid and CarRacing."""

from __future__ import annotations

import os
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict

from datamodules.envs.wrappers import ActionRepeat, StepResult
from datamodules.errors import UserError
from datamodules.spec import IMAGE_KEY

MINIGRID_TILE = 8  # pixels; an 8x8 grid is then 64x64 without resizing


class Doom(gym.Wrapper):
    """ViZDoom: the key `screen` as `image`, and `gamevariables` (float) if asked for.

    The screen of a finished game is black: ViZDoom keeps no last frame. A game that ends by its
    own time-out is truncated; one that ends otherwise is terminated.

    Args:
        env: a ViZDoom environment.
        variables: whether to observe the scenario's game variables (health, ammunition, ...).
        screen_rows: rows of the screen to keep from the top; the 2018 World Models paper cuts the
            status bar (200 of 240 rows). All of them by default.

    Raises:
        UserError: `screen_rows` out of range, or no game variables in the scenario.
    """

    def __init__(
        self, env: gym.Env, variables: bool = False, screen_rows: int | None = None
    ) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, Dict)
        height, width, channels = space["screen"].shape or ()
        self._rows = height if screen_rows is None else screen_rows
        if not 1 <= self._rows <= height:
            raise UserError(f"screen_rows={screen_rows} must lie between 1 and {height}")
        self._variables = variables
        # Otherwise every game leaves, and reads, `_vizdoom.ini` in the working directory.
        cast(Any, env.unwrapped).game.set_doom_config_path(os.devnull)
        self.frames_per_step = getattr(env.unwrapped, "frame_skip", 1)
        spaces: dict[str, gym.Space] = {
            IMAGE_KEY: Box(0, 255, (self._rows, width, channels), np.uint8)
        }
        if variables:
            if "gamevariables" not in space.spaces:
                raise UserError("variables=True, but this scenario has no game variables")
            spaces["gamevariables"] = space["gamevariables"]
        self.observation_space = Dict(spaces)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts a game."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe(obs), info

    def step(self, action: Any) -> StepResult:
        """One action for `frame_skip` tics."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        # ViZDoom calls a game that timed out finished as well.
        return self._observe(obs), reward, terminated and not truncated, truncated, info

    def _observe(self, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        kept = {IMAGE_KEY: obs["screen"][: self._rows]}
        if self._variables:
            kept["gamevariables"] = obs["gamevariables"]
        return kept


class GridImage(gym.ObservationWrapper):
    """MiniGrid drawn as RGB, 8 pixels a tile: the whole grid, or what the agent sees.

    Args:
        env: a MiniGrid environment.
        view: `full`, or `partial` (the agent's own view, looking up).

    Raises:
        UserError: another view.
    """

    def __init__(self, env: gym.Env, view: str = "full") -> None:
        super().__init__(env)
        if view not in ("full", "partial"):
            raise UserError(f"view={view!r} must be full or partial")
        self._grid: Any = cast(Any, env.unwrapped)
        self._full = view == "full"
        grid = self._grid
        columns = grid.width if self._full else grid.agent_view_size
        rows = grid.height if self._full else grid.agent_view_size
        shape = (rows * MINIGRID_TILE, columns * MINIGRID_TILE, 3)
        self.observation_space = Box(0, 255, shape, np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        """Draws the grid; the symbolic observation and the mission are left out."""
        if self._full:
            return self._grid.get_frame(highlight=self._grid.highlight, tile_size=MINIGRID_TILE)
        return self._grid.get_pov_render(tile_size=MINIGRID_TILE)


class CarRacing(ActionRepeat):
    """Repeats actions in Gymnasium's CarRacing, and draws only the frames that are returned.

    Drawing is nearly all of its time, and nothing in the game depends on it.
    """

    def step(self, action: Any) -> StepResult:
        """One agent step, at most `repeat` environment steps."""
        game: Any = self.env.unwrapped
        shown = 0.0

        def draw_nothing(mode: str) -> None:
            nonlocal shown
            shown = game.reward  # of which a frame's own cost is taken after it was drawn

        game._render = draw_nothing  # shadows the method
        try:
            _, reward, terminated, truncated, info = super().step(action)
        finally:
            del game._render
        actual, game.reward = game.reward, shown
        game.state = game._render("state_pixels")
        game.reward = actual
        return game.state, reward, terminated, truncated, info
