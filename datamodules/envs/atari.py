"""Atari games with the preprocessing of the Atari-100k benchmark, straight on the ALE.

Two published recipes are reachable by options:

| option | default | DIAMOND | DreamerV3 `atari100k` |
|---|---|---|---|
| noop_min, noop_max | 1, 30 | 1, 30 | 0, 30 |
| resize | area | area | bilinear |
| life_loss | False | True in training, False in evaluation | False |
| clip_reward | False | False (the agent clips its returns) | False |
| grey, sticky, full_actions | False, 0, False | same | same |
| max_frames | 108,000 | same | 108,000 |

Sources: eloialonso/diamond `src/envs`, `config/env/atari.yaml`; danijar/dreamerv3
`embodied/envs/atari.py`, `configs.yaml`.
"""

from __future__ import annotations

import difflib
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from PIL import Image

from datamodules.envs.wrappers import StepResult, area_resize
from datamodules.errors import MissingExtra, UserError

PREFIX = "ale/"
MULTIPLAYER = {"combat", "joust", "maze_craze", "warlords"}  # no single-player mode in the ROM


class Atari(gym.Env):
    """One game; observations are uint8 (size, size, 3), or (size, size, 1) with `grey`.

    One step holds an action for `frame_skip` frames, sums the rewards, and shows the pixel-wise
    maximum of the last two frames (sprites flicker). Where the game ends inside a step, only
    frames of that step are shown; both sources would mix in the previous step's.

    With `life_loss`, losing a life terminates the episode (`info["life_lost"]` is then true), and
    `reset()` without a seed goes on with the same game, at the screen that was last seen.
    `reset(seed=...)` always starts a new game, in the same state in any instance.

    Args:
        name: `ale/<Game>`, in any spelling: `ale/MsPacman`, `ale/ms_pacman`.
        size: side of the image in pixels.
        frame_skip: frames per step.
        noop_min: fewest no-ops at the start of a game.
        noop_max: most no-ops at the start of a game.
        life_loss: whether an episode ends with each life.
        clip_reward: whether each step's reward becomes its sign.
        grey: luminance instead of RGB.
        sticky: probability that the ALE repeats the last action, per frame.
        full_actions: all 18 actions instead of those the game uses.
        resize: `area` (exact) or `bilinear` (Pillow's, antialiased).
        max_frames: frames after which a game is truncated.

    Raises:
        MissingExtra: ale-py is not installed.
        UserError: unknown game or an option out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self,
        name: str,
        size: int = 64,
        *,
        frame_skip: int = 4,
        noop_min: int = 1,
        noop_max: int = 30,
        life_loss: bool = False,
        clip_reward: bool = False,
        grey: bool = False,
        sticky: float = 0.0,
        full_actions: bool = False,
        resize: str = "area",
        max_frames: int = 108_000,
    ) -> None:
        try:
            import ale_py
            from ale_py import roms
        except ImportError:
            raise MissingExtra(f"environment {name}", "atari") from None
        if resize not in ("area", "bilinear"):
            raise UserError(f"resize={resize!r} of {name} must be area or bilinear")
        if frame_skip < 1:
            raise UserError(f"frame_skip={frame_skip} of {name} must be at least 1")
        if not 0 <= noop_min <= noop_max:
            raise UserError(f"{name} needs 0 <= noop_min={noop_min} <= noop_max={noop_max}")
        self.frames_per_step = frame_skip
        rom = roms.get_rom_path(_find(name, roms.get_all_rom_ids()))
        assert rom is not None
        self._rom = rom
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # first: it prints a banner
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", sticky)
        self._ale.setInt("max_num_frames_per_episode", max_frames)
        self._ale.loadROM(self._rom)
        self._actions = (
            self._ale.getLegalActionSet() if full_actions else self._ale.getMinimalActionSet()
        )
        self._noops = (noop_min, noop_max)
        self._life_loss, self._clip_reward = life_loss, clip_reward
        self._grey, self._size, self._area = grey, size, resize == "area"
        self._seeded = self._resumable = False
        self._last: np.ndarray | None = None
        self.action_space = Discrete(len(self._actions))
        self.observation_space = Box(0, 255, (size, size, 1 if grey else 3), np.uint8)

    def get_action_meanings(self) -> list[str]:
        """Names of the actions, as the ALE has them."""
        return [action.name for action in self._actions]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a game, or goes on with it after a lost life; see the class."""
        super().reset(seed=seed)
        if seed is None and self._resumable:
            self._resumable = False
            assert self._last is not None
            return self._last, {"lives": self._ale.lives()}
        if seed is not None or not self._seeded:
            # The ALE reads its seed when it loads the game.
            self._ale.setInt("random_seed", int(self.np_random.integers(2**31)))
            self._ale.loadROM(self._rom)
            self._seeded = True
        self._resumable = False
        self._ale.reset_game()
        low, high = self._noops
        for _ in range(self.np_random.integers(low, high + 1)):
            self._ale.act(0)
            if self._over():
                self._ale.reset_game()
        self._last = self._shrink(self._screen())
        return self._last, {"lives": self._ale.lives()}

    def step(self, action: int) -> StepResult:
        """Holds one action for `frame_skip` frames."""
        lives = self._ale.lives()
        reward = 0.0
        screen: np.ndarray | None = None
        for frame in range(self.frames_per_step):
            reward += self._ale.act(self._actions[action])
            over = self._over()
            if over or frame >= self.frames_per_step - 2:
                new = self._screen()
                screen = new if screen is None else np.maximum(screen, new)
            if over:
                break
        assert screen is not None
        self._last = self._shrink(screen)
        truncated = self._ale.game_truncated()
        terminated = self._ale.game_over(with_truncation=False)
        life_lost = self._life_loss and not over and self._ale.lives() < lives
        self._resumable = life_lost
        info = {"lives": self._ale.lives(), "life_lost": life_lost}
        if self._clip_reward:
            reward = float(np.sign(reward))
        return self._last, reward, terminated or life_lost, truncated and not terminated, info

    def render(self) -> np.ndarray:
        """The whole screen as uint8 (210, 160, 3) (some games differ in height)."""
        return self._ale.getScreenRGB()

    def _over(self) -> bool:
        return self._ale.game_over() or self._ale.game_truncated()

    def _screen(self) -> np.ndarray:
        if self._grey:
            return self._ale.getScreenGrayscale()[..., None]
        return self._ale.getScreenRGB()

    def _shrink(self, screen: np.ndarray) -> np.ndarray:
        if self._area:
            return area_resize(screen, self._size)
        image = Image.fromarray(screen[..., 0] if self._grey else screen)
        small = np.asarray(image.resize((self._size, self._size), Image.Resampling.BILINEAR))
        return small.reshape(self._size, self._size, -1)


def _find(name: str, roms: list[str]) -> str:
    """The ROM that `ale/<Game>` names, whatever its capitals and underscores."""
    known = {_plain(rom): rom for rom in roms if rom not in MULTIPLAYER}
    wanted = _plain(name.removeprefix(PREFIX))
    if wanted in known:
        return known[wanted]
    nearest = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    games = [known[n].title().replace("_", "") for n in nearest]
    hint = f"did you mean {', '.join(PREFIX + game for game in games)}?" if games else ""
    raise UserError(
        f"unknown environment {name!r}: {hint or 'ale/<Game> takes a game such as ale/Breakout'}"
    )


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
