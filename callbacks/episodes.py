"""Recorded episodes, and what a model dreams from the middle of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from datamodules.errors import UserError
from datamodules.workers import Action, EnvPool, Reset, Transition
from zoo.base import Imaginer, LatentActions, Policy


@dataclass(frozen=True)
class Recording:
    """B episodes of up to T steps, padded with zeros.

    Attributes:
        batch: the batch contract, (B, T, ...), on the model's device.
        length: (B,) int64, valid steps of each episode, the last observation included.
        terminal: (B,) bool, whether the task ended there rather than the recording.
    """

    batch: dict[str, Any]
    length: Tensor
    terminal: Tensor

    def after(self, key: str, row: Tensor, step: Tensor, horizon: int) -> Tensor:
        """Values (N, horizon, ...) at the steps that follow `step` (N,) in episode `row` (N,)."""
        values = self.batch["obs"][key] if key in self.batch["obs"] else self.batch[key]
        return following(values, row, step, horizon)

    @property
    def valid(self) -> Tensor:
        """(B, T) bool, the steps that are not padding."""
        time = torch.arange(self.batch["reward"].shape[1], device=self.length.device)
        return time < self.length[:, None]

    def select(self, rows: slice) -> Recording:
        """Some of the episodes."""
        batch = {key: value[rows] for key, value in self.batch.items() if key != "obs"}
        batch["obs"] = {key: value[rows] for key, value in self.batch["obs"].items()}
        return Recording(batch, self.length[rows], self.terminal[rows])

    def starts(self, context: int, count: int, follow: int = 1) -> tuple[Tensor, Tensor]:
        """Up to `count` places (episode, step), evenly spread, with `context` steps up to there.

        At least `follow` recorded steps come after each, or at least one and then the task's end.
        """
        time = torch.arange(int(self.length.max()), device=self.length.device)
        left = self.length[:, None] - 1 - time
        enough = torch.where(self.terminal, 1, follow)[:, None]
        row, step = torch.nonzero((time >= context - 1) & (left >= enough), as_tuple=True)
        picked = torch.linspace(0, len(row) - 1, min(count, len(row)), device=row.device).long()
        return row[picked], step[picked]

    def recorded(self, row: Tensor, step: Tensor, horizon: int) -> Tensor:
        """(N, horizon) bool, which of the steps that follow `step` are not padding."""
        later = step[:, None] + torch.arange(1, horizon + 1, device=step.device)
        return later < self.length[row][:, None]


def following(values: Tensor, row: Tensor, step: Tensor, horizon: int) -> Tensor:
    """Values (N, horizon, ...) of (B, T, ...) at the steps that follow `step` (N,) in `row` (N,).

    Beyond the last step, it is repeated.
    """
    later = step[:, None] + torch.arange(1, horizon + 1, device=step.device)
    return values[row[:, None], later.clamp(max=values.shape[1] - 1)]


def require_dreamer(model: object, callback: str) -> None:
    """Raises unless the model acts, and dreams of the same actions.

    Raises:
        UserError: which Protocol the model lacks, or that its dreams are of latent actions.
    """
    for protocol in (Policy, Imaginer):
        if not isinstance(model, protocol):
            raise UserError(
                f"{callback} needs a model that is a {protocol.__name__}, which "
                f"{type(model).__name__} is not: remove {callback} from the callbacks"
            )
    if isinstance(model, LatentActions):
        raise UserError(
            f"{callback} compares dreams with what real actions did, and those of "
            f"{type(model).__name__} are of latent ones: remove {callback} from the callbacks"
        )


def lacks_episodes(data: Any, least: int) -> str:
    """What the datamodule lacks to give `gather` at least so many episodes, or nothing."""
    if hasattr(data, "make_env") or len(getattr(data, "val_episodes", [])) >= least:
        return ""
    return f"an environment to play in (`env`), or {least} held-out episodes (`validation`)"


def gather(
    data: Any,
    model: Any,
    *,
    episodes: int,
    max_steps: int,
    seed: np.random.SeedSequence,
    explore: bool,
) -> Recording:
    """Episodes of at most `max_steps` actions to compare dreams with, see `lacks_episodes`.

    Played in the datamodule's environment if it has one, as `record` does; else those that recorded
    data holds out, in which somebody else acted.
    """
    make_env = getattr(data, "make_env", None)
    if make_env is None:
        held_out = data.validation_episodes(episodes, max_steps)
        return Recording(*(move_data_to_device(part, model.device) for part in held_out))
    return record(
        model, make_env, episodes=episodes, max_steps=max_steps, seed=seed, explore=explore
    )


def record(
    model: Any,
    make_env: Callable[[], gym.Env],
    *,
    episodes: int,
    max_steps: int,
    seed: np.random.SeedSequence,
    explore: bool,
) -> Recording:
    """Plays episodes side by side in fresh environments, each at most `max_steps` actions long."""
    with EnvPool([make_env] * episodes) as pool:
        seeds = [int(s) for s in seed.generate_state(episodes)]
        results: list[Any] = list(pool.step([Reset(s) for s in seeds]))
        state = model.initial_state(episodes)
        steps: list[dict[str, Any]] = []
        length = np.ones(episodes, np.int64)
        terminal = np.zeros(episodes, bool)
        running = np.ones(episodes, bool)
        while True:
            obs = {k: np.stack([r.obs[k] for r in results]) for k in results[0].obs}
            step = {f"obs/{key}": value for key, value in obs.items()}
            step["reward"] = np.array([r.reward for r in results], np.float32)
            tensors = {k: torch.as_tensor(v, device=model.device) for k, v in obs.items()}
            action, state = model.act(tensors, state, explore=explore)
            step["action"] = action.cpu().numpy()
            steps.append(step)
            if len(steps) > max_steps or not running.any():
                break
            commands = [
                Action(a) if go else None for a, go in zip(step["action"], running, strict=True)
            ]
            for i, result in enumerate(pool.step(commands)):
                if result is None:
                    continue
                if not isinstance(result, Transition):
                    raise UserError(
                        f"an environment failed while a dream was recorded: {result.message}; mend "
                        "it and resume the run"
                    )
                results[i] = result
                length[i] += 1
                terminal[i] = result.terminated
                running[i] = not (result.terminated or result.truncated)
    return _recording(steps, length, terminal, running, model.device)


def _recording(
    steps: list[dict[str, Any]],
    length: np.ndarray,
    terminal: np.ndarray,
    running: np.ndarray,
    device: torch.device,
) -> Recording:
    flat = {key: np.stack([step[key] for step in steps], 1) for key in steps[0]}
    time = np.arange(len(steps))
    last = time == length[:, None] - 1
    for key, value in flat.items():
        # what lies behind the end was never there; and no action is chosen at the last step
        end = length - 1 if key == "action" else length
        value[time >= end[:, None]] = 0
    flat["is_first"] = np.broadcast_to(time == 0, last.shape)
    flat["is_last"] = last & ~running[:, None]
    flat["is_terminal"] = last & terminal[:, None]
    tensors = {k: torch.as_tensor(np.ascontiguousarray(v), device=device) for k, v in flat.items()}
    batch: dict[str, Any] = {k: v for k, v in tensors.items() if not k.startswith("obs/")}
    batch["obs"] = {k[4:]: v for k, v in tensors.items() if k.startswith("obs/")}
    return Recording(
        batch, torch.as_tensor(length, device=device), torch.as_tensor(terminal, device=device)
    )


def as_float(obs: Tensor) -> Tensor:
    """Observations in the units of `decode`: uint8 images become [0, 1]."""
    return obs.float() / 255 if obs.dtype == torch.uint8 else obs.float()
