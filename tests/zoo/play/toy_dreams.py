"""A dream whose every pixel is known, and the environment that it dreams of."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from datamodules.envs.wrappers import DictObservation
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.base import Imagined, State
from zoo.play.session import DreamSession
from zoo.play.starts import from_env

HEIGHT, WIDTH = 4, 16
SHAPE = (HEIGHT, WIDTH, 3)
SPEC = Spec({"image": ArraySpec(SHAPE, "uint8")}, ActionSpec("discrete", nvec=(3,)))
MOVES = torch.tensor([0, -1, 1])  # stay, left, right


class Walk(gym.Env):
    """A white column in black; it earns its place / 10, and the right edge is the end."""

    observation_space = Box(0, 255, SHAPE, np.uint8)
    action_space = Discrete(3)

    def __init__(self, repeats: bool = True) -> None:
        self.repeats = repeats

    def get_action_meanings(self) -> list[str]:
        return ["NOOP", "LEFT", "RIGHT"]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        shift = 0 if self.repeats else getattr(self, "place", 0) + 1
        self.place = (int(self.np_random.integers(5, 9)) + shift) % WIDTH
        return self.see(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place = int(np.clip(self.place + int(MOVES[action]), 0, WIDTH - 1))
        return self.see(), self.place / 10, self.place == WIDTH - 1, False, {}

    def see(self) -> np.ndarray:
        image = np.zeros(SHAPE, np.uint8)
        image[:, self.place] = 255
        return image


class Dreamer(torch.nn.Module):
    """Dreams exactly what happens in `Walk`; `noise` is drawn and shows in the reward."""

    spec, device = SPEC, torch.device("cpu")

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise

    def observe(self, batch: Any) -> State:
        return {"place": batch["obs"]["image"][..., 0, :, 0].float().argmax(-1, keepdim=True)}

    def imagine(self, state: State, actions: Any, horizon: int) -> Imagined:
        assert horizon == 1 and actions.dtype == torch.int64
        place = (state["place"][:, None] + MOVES[actions][..., None]).clamp(0, WIDTH - 1)
        reward = place[..., 0] / 10 + self.noise * torch.randn(place.shape[:2])
        cont = (place[..., 0] < WIDTH - 1).float()
        return Imagined(reward, cont, {"place": place}, actions)

    def decode(self, state: State) -> dict[str, Tensor]:
        column = torch.arange(WIDTH) == state["place"]
        return {"image": column[..., None, :, None].float().expand(*column.shape[:-1], *SHAPE)}


class Judging(Dreamer):
    def value(self, state: State) -> Tensor:
        return 2.0 * state["place"][:, 0]


class Silent(Dreamer):
    """Finds actions in video, and predicts no rewards."""

    num_latent_actions = 3
    spec = Spec(SPEC.obs)

    def infer_actions(self, video: Tensor) -> Tensor:
        raise NotImplementedError

    def imagine(self, state: State, actions: Any, horizon: int) -> Imagined:
        dream = super().imagine(state, actions, horizon)
        return dream._replace(reward=torch.full_like(dream.reward, torch.nan))


def make_walk(repeats: bool = True) -> gym.Env:
    return DictObservation(Walk(repeats))


def session(model: Any = None, count: int = 3, **options: Any) -> DreamSession:
    """A dream beside reality."""
    model = Judging() if model is None else model
    starts = from_env(model, make_walk, count, context=2)
    return DreamSession(model, starts, make_walk, **options)


def place(picture: np.ndarray) -> int:
    """Where the white column is."""
    return int(picture[0, :, 0].argmax())


def recorded(*places: int) -> dict[str, Any]:
    """One recorded sequence through the places."""
    env = Walk()
    images = []
    for env.place in places:
        images.append(env.see())
    none = torch.zeros(1, len(places), dtype=torch.bool)
    first = none.clone()
    first[0, 0] = True
    return {
        "obs": {"image": torch.from_numpy(np.stack(images))[None]},
        "action": torch.zeros(1, len(places), dtype=torch.int64),
        "reward": torch.zeros(1, len(places)),
        "is_first": first,
        "is_last": none,
        "is_terminal": none,
    }
