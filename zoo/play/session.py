"""One dream that a person is in, step by step, and reality beside it; nothing here knows the web.

A dream begins in a `Start`: the state in which the model is after it has seen some real steps. If
these steps were taken in an environment it is taken there, too, and gets the same actions from then
on, so that both can be compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.sources.video_files import as_rgb
from datamodules.spec import ActionSpec, Spec
from zoo.base import Imaginer, LatentActions, State
from zoo.dream_env import Arrays, as_observation, dreaming
from zoo.play.curves import draw_curves
from zoo.play.starts import MakeEnv, Start, lead

GAP = 2  # pixels between dream and reality
ENDS = 0.5  # probability of going on below which a dream is over
MEMORY = 64  # steps of vectors that are drawn


@runtime_checkable
class Judge(Protocol):
    """A model that says what a state is worth."""

    def value(self, state: State) -> Tensor:
        """Estimated returns (...) from states {key: (..., F)} on."""


@dataclass(frozen=True)
class Moment:
    """One time step of reality or of a dream.

    Attributes:
        picture: uint8 (H, W, 3).
        reward: earned by the last action; None at a start, or if the model predicts none.
        total: rewards since the start.
        over: whether the task has ended.
    """

    picture: np.ndarray
    reward: float | None
    total: float
    over: bool


@dataclass(frozen=True)
class Frame:
    """What there is to see at one step.

    Attributes:
        step: actions since the start.
        dream: as the model imagines it.
        reality: what the same actions led to; None without an environment.
        value: what the model thinks the dreamed state is worth; None if it does not say.
        goes_on: predicted probability that the task goes on; None at a start.
    """

    step: int
    dream: Moment
    reality: Moment | None
    value: float | None
    goes_on: float | None

    @property
    def picture(self) -> np.ndarray:
        """uint8 (H, W, 3): the dream, and to its right reality if there is one."""
        if self.reality is None:
            return self.dream.picture
        gap = np.full((len(self.dream.picture), GAP, 3), 128, np.uint8)
        return np.concatenate([self.dream.picture, gap, self.reality.picture], 1)


class DreamSession:
    """A dream that one person plays.

    The same actions after `reset` give the same steps for the same seed; global random generators
    are left as they were. Not to be used by two threads at a time.

    Args:
        model: an `Imaginer`.
        starts: where it may begin, at least one.
        make_env: builds the environment that was played to find the starts, to show reality.
        seed: of the model's noise.

    Attributes:
        actions: what is to be chosen at each step.
        repeats: whether the environment got to the present start again; else reality is left out.

    Raises:
        UserError: no starts, or a model that does not dream.
    """

    def __init__(
        self, model: Any, starts: Sequence[Start], make_env: MakeEnv | None = None, seed: int = 0
    ) -> None:
        self.actions = played_actions(model)
        if not starts:
            raise UserError("there is no real step to start a dream from")
        self.model, self.starts, self.seed = model, list(starts), seed
        self._scale = _scale(self.starts, model.spec)
        # What latent actions would be in an environment is not known.
        comparable = not isinstance(model, LatentActions) and starts[0].seed is not None
        self._env = make_env() if make_env is not None and comparable else None
        self.reset()

    def reset(self, start: int = 0) -> Frame:
        """Begins anew in one of the starts.

        Raises:
            UserError: there is no such start.
        """
        if not 0 <= start < len(self.starts):
            raise UserError(f"there is no start {start}: choose 0 to {len(self.starts) - 1}")
        begin = self.starts[start]
        self._rng = np.random.default_rng([self.seed, start])
        self._state = begin.state
        self._step, self._over = 0, False
        self._dreamed = _Story(self.model.spec, self._scale)
        self._lived = _Story(self.model.spec, self._scale)
        with dreaming(self.model, self._noise()):
            dreamed, value = self._look()
        dream = self._dreamed.add(dreamed, None, False)
        self.repeats, self._reality = True, None
        if self._env is not None:
            obs = lead(self._env, begin)
            self.repeats = all(np.array_equal(obs[key], seen) for key, seen in begin.obs.items())
            if self.repeats:
                self._reality = self._lived.add(obs, None, False)
        return Frame(0, dream, self._reality, value, None)

    def step(self, action: Any) -> Frame:
        """Dreams one step, and takes it in reality until the task has ended there.

        Args:
            action: () or (A,), see `actions`; continuous ones are clipped to their bounds.

        Raises:
            UserError: no such action, or the dream is over, or the environment failed.
        """
        if self._over:
            raise UserError("the dream is over: reset it")
        chosen = checked_action(action, self.actions)
        given = torch.from_numpy(chosen).to(self.model.device)[None, None]
        with dreaming(self.model, self._noise()):
            imagined = self.model.imagine(self._state, given, 1)
            self._state = {key: value[:, 0] for key, value in imagined.state.items()}
            dreamed, value = self._look()
        reward, goes_on = _number(imagined.reward), _number(imagined.cont)
        self._over = goes_on is not None and goes_on < ENDS
        self._step += 1
        dream = self._dreamed.add(dreamed, reward, self._over)
        if self._env is not None and self._reality is not None and not self._reality.over:
            self._reality = self._live(self._env, chosen)
        return Frame(self._step, dream, self._reality, value, goes_on)

    def close(self) -> None:
        """Closes the environment."""
        if self._env is not None:
            self._env.close()

    def _look(self) -> tuple[Arrays, float | None]:
        """What the state looks like and what it is worth."""
        decoded = self.model.decode({key: part.unsqueeze(1) for key, part in self._state.items()})
        spec = self.model.spec.obs
        obs = {key: as_observation(part[0, 0], spec[key]) for key, part in decoded.items()}
        value = self.model.value(self._state) if isinstance(self.model, Judge) else None
        return obs, _number(value)

    def _live(self, env: gym.Env, action: np.ndarray) -> Moment:
        try:
            obs, reward, terminated, truncated, _ = env.step(action)
        except Exception as error:
            raise UserError(
                f"the environment failed with {type(error).__name__}: {error}; reset the dream"
            ) from error
        return self._lived.add(obs, float(reward), bool(terminated or truncated))

    def _noise(self) -> int:
        return int(self._rng.integers(2**63))


class _Story:
    """Pictures of one side: the first image as it is, or else vectors as curves over time."""

    def __init__(self, spec: Spec, scale: np.ndarray) -> None:
        self._spec, self._scale = spec, scale
        self._past: deque[np.ndarray] = deque(maxlen=MEMORY)
        self._total = 0.0

    def add(self, obs: Arrays, reward: float | None, over: bool) -> Moment:
        """One more step."""
        self._total += reward or 0.0
        return Moment(self._picture(obs), reward, self._total, over)

    def _picture(self, obs: Arrays) -> np.ndarray:
        if self._spec.images:
            return np.ascontiguousarray(as_rgb(obs[self._spec.images[0]]))
        self._past.append(_joined(obs, self._spec) / self._scale)
        return draw_curves(np.stack(self._past), MEMORY)


def _joined(obs: Arrays, spec: Spec) -> np.ndarray:
    """All numbers (D,) of the vectors."""
    return np.concatenate([np.ravel(obs[key]) for key in spec.vectors])


def _scale(starts: Sequence[Start], spec: Spec) -> np.ndarray:
    """(D,) what is drawn as 1: twice the largest magnitude of each number at the starts."""
    if spec.images:
        return np.ones(0)
    seen = np.stack([_joined(start.obs, spec) for start in starts])
    return 2 * np.abs(seen).max(0).clip(min=1e-3)


def _number(value: Tensor | None) -> float | None:
    """A lone finite number; None where a model says nothing, or NaN."""
    if value is None or not bool(torch.isfinite(value).all()):
        return None
    return float(value.reshape(()))


def played_actions(model: Any) -> ActionSpec:
    """What a person chooses in the dreams of a model: its latent actions if it finds any.

    Raises:
        UserError: the model does not dream, or knows no actions.
    """
    if not isinstance(model, Imaginer):
        raise UserError(
            f"only a model that dreams can be played, and a {type(model).__name__} is no Imaginer: "
            "`zoo list` names those that are"
        )
    if isinstance(model, LatentActions):
        return ActionSpec("discrete", nvec=(model.num_latent_actions,))
    actions: ActionSpec | None = model.spec.action  # type: ignore[attr-defined]
    if actions is None:
        raise UserError(f"the dreams of this {type(model).__name__} know no actions to play with")
    return actions


def checked_action(action: Any, spec: ActionSpec) -> np.ndarray:
    """An action () or (A,) in the dtype of the space; continuous ones are clipped to their bounds.

    Raises:
        UserError: a wrong shape, not finite numbers, or a choice that does not exist.
    """
    trouble = f"the action {action!r} is not one of the {spec.kind} space of shape {spec.shape}"
    try:
        array = np.asarray(action, np.float64)
    except (TypeError, ValueError):
        raise UserError(trouble) from None
    if array.shape != spec.shape or not np.isfinite(array).all():
        raise UserError(trouble)
    if spec.kind == "box":
        return np.clip(array, spec.low, spec.high).astype(np.float32)
    choices = np.array(spec.nvec).reshape(spec.shape or (1,))
    if (array != array.round()).any() or (array < 0).any() or (array >= choices).any():
        raise UserError(f"{trouble}: there are {list(spec.nvec)} choices")
    return array.astype(np.int64)
