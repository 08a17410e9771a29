"""Which keys stand for which actions.

Every choice of a discrete component has a key of its own; a continuous component has two, one for
each of its bounds. Where the environment names its actions, arrows stand for directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from datamodules.errors import UserError
from datamodules.spec import ActionSpec

CHOICES = "0123456789qwertyuiopasdfghjklzxcvbnm"
PAIRS = (
    ("ArrowLeft", "ArrowRight"),
    ("ArrowDown", "ArrowUp"),
    ("a", "d"),
    ("s", "w"),
    ("f", "h"),
    ("g", "t"),
    ("j", "l"),
    ("k", "i"),
)
NAMED = {
    "left": "ArrowLeft",
    "right": "ArrowRight",
    "up": "ArrowUp",
    "forward": "ArrowUp",
    "down": "ArrowDown",
    "fire": " ",
    "toggle": " ",
}
IDLE = ("noop", "stay")


@dataclass(frozen=True)
class Key:
    """One key, by its name in a browser, and what it does to an action while it is held."""

    key: str
    component: int
    value: float
    label: str


class KeyMap:
    """Turns the keys that are held into an action.

    Args:
        actions: the action space.
        names: of the choices of a discrete space.

    Raises:
        UserError: more choices than there are keys.
    """

    def __init__(self, actions: ActionSpec, names: Sequence[str] | None = None) -> None:
        self.actions = actions
        self.idle = _idle(actions, names)
        bindings = _of_box(actions) if actions.kind == "box" else _of_choices(actions, names)
        self.bindings = {binding.key: binding for binding in bindings}

    def action(self, held: Iterable[str]) -> np.ndarray:
        """The action, () or (A,), of keys in the order in which they were pressed.

        The last key of each component counts; a component without one rests.
        """
        action = self.idle.copy()
        for key in held:
            binding = self.bindings[key]
            action[binding.component] = binding.value
        return action[0] if self.actions.kind == "discrete" else action

    @property
    def rest(self) -> str:
        """What happens while no key is held."""
        return ", ".join(f"{value:g}" for value in self.idle)


def action_names(env: gym.Env) -> list[str] | None:
    """What an environment calls its discrete actions, in lower case; None if it does not tell."""
    game: Any = env.unwrapped
    if hasattr(game, "get_action_meanings"):
        return [str(name).lower() for name in game.get_action_meanings()]
    members = getattr(getattr(game, "actions", None), "__members__", None)
    if members is not None:
        return [name.lower() for name in members]
    return None


def _idle(actions: ActionSpec, names: Sequence[str] | None) -> np.ndarray:
    if actions.kind == "box":
        return np.clip(0.0, actions.low, actions.high).astype(np.float32)
    idle = np.zeros(len(actions.nvec), np.int64)
    for name in IDLE:
        if names is not None and name in names:
            idle[0] = names.index(name)
    return idle


def _of_box(actions: ActionSpec) -> list[Key]:
    if len(actions.low) > len(PAIRS):
        raise UserError(
            f"there are keys for {len(PAIRS)} continuous actions, and the model takes "
            f"{len(actions.low)}: a person cannot play it"
        )
    found: list[Key] = []
    for i, (low, high) in enumerate(zip(actions.low, actions.high, strict=True)):
        for key, value in zip(PAIRS[i], (low, high), strict=True):
            found.append(Key(key, i, value, f"action {i}: {value:+g}"))
    return found


def _of_choices(actions: ActionSpec, names: Sequence[str] | None) -> list[Key]:
    if sum(actions.nvec) > len(CHOICES):
        raise UserError(
            f"there are keys for {len(CHOICES)} choices, and the model's actions "
            f"{list(actions.nvec)} have {sum(actions.nvec)}: a person cannot play it"
        )
    free = iter(CHOICES)
    found: list[Key] = []
    for i, n in enumerate(actions.nvec):
        for value in range(n):
            named = names is not None and actions.kind == "discrete" and len(names) == n
            name = names[value] if named and names is not None else ""
            taken = {binding.key for binding in found}
            key = NAMED.get(name, "")
            if not key or key in taken:
                key = next(free)
            label = name or (f"action {value}" if actions.kind == "discrete" else f"{i}: {value}")
            found.append(Key(key, i, float(value), label))
    return found
