"""`ModelError`: how the error of open-loop rollouts grows with the horizon."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from callbacks.counters import counters
from callbacks.episodes import (
    Recording,
    as_float,
    following,
    gather,
    lacks_episodes,
    require_dreamer,
)
from callbacks.files import atomic_file
from callbacks.logger import RunLogger
from callbacks.pictures import Panel, line_panels
from callbacks.schedule import EveryEnvSteps
from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.nets.actions import ActionCodec

STEPS_AHEAD = (1, 5, 15, 50)
RIDGE = 1e-6  # small: it decides only where the data do not
COMPONENTS = 32
POOLED_SIDE = 32
DECODED_TOGETHER = 16  # dreams; bounds the memory of decoded images
LEAST_STD = 1e-3  # a component that moves less keeps its own unit


class ModelError(EveryEnvSteps):
    """Measures open-loop rollouts 1, 2, ..., `horizon` steps ahead, beside simple predictors.

    Fresh episodes are recorded with the exploring policy (or held-out ones are taken, where the
    data is recorded and there is no environment). The first half of them fits a
    `LinearModel`; from starts spread evenly over the other half the model dreams on with the
    recorded actions. A start whose episode ends within the horizon counts only for the steps that
    were recorded, so large k are those of long episodes. Three spaces:

    - `obs`: mean squared error of each observation key that the model decodes. Images are in
      [0, 1]; each component of a vector is divided by its standard deviation over the recorded
      steps, so that the mean of what was recorded would have an error of about 1.
    - `latent`: squared distance between the dreamed state and the one filtered from the real
      sequence up to there, over the variance of filtered states (both summed over the features of a
      state key): guessing the mean has 1, an independent sample of the same distribution 2. Keys of
      integers are left out.
    - `reward`: mean absolute error.

    Predictors: `model`; `copy` (nothing changes: the last observation, the last reward); `linear`.
    The last two have no latents.

    Metrics, for k = 1, 5, 15, 50 up to the horizon, means over keys: `eval/model_error_obs@k`,
    `eval/model_error_latent@k`, `eval/model_error_reward@k`, `eval/copy_error_obs@k`,
    `eval/linear_error_obs@k`; and `eval/model_error_horizon`: the model beats `copy` in observation
    space at each of so many steps ahead (0: not even at the first).

    All curves are in `model_error/<env_steps>.csv` of the run with the columns `horizon`, `space`,
    `key`, `predictor`, `value`, `n` (starts), drawn in `model_error/<env_steps>.png` and in
    TensorBoard as `model_error`.

    Args:
        every_env_steps: how often, in frames.
        episodes: episodes recorded, at least 2.
        starts: number of dreams.
        horizon: most steps dreamed.
        context: fewest steps filtered before a dream starts.
        max_steps: most actions recorded of an episode.
        seed: of environments and policy noise.
        at_start: measure the untrained model, too.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        episodes: int = 8,
        starts: int = 64,
        horizon: int = 50,
        context: int = 5,
        max_steps: int = 200,
        seed: int = 0,
        at_start: bool = False,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start)
        for name, value in (("starts", starts), ("horizon", horizon), ("context", context)):
            if value < 1:
                raise UserError(f"ModelError: {name} is {value}, must be at least 1")
        if episodes < 2:
            raise UserError(
                f"ModelError: episodes is {episodes}, must be at least 2: some fit the linear "
                "model, the others measure"
            )
        if max_steps < context + horizon:
            raise UserError(
                f"ModelError: max_steps is {max_steps}, must be at least context + horizon = "
                f"{context + horizon}"
            )
        self.episodes, self.max_steps = episodes, max_steps
        self.starts, self.horizon, self.context = starts, horizon, context

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models that do not dream, and runs without a `RunLogger`."""
        require_dreamer(pl_module, "ModelError")
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not fast_dev_run and not any(isinstance(x, RunLogger) for x in trainer.loggers):
            raise UserError("ModelError needs a RunLogger: Trainer(logger=RunLogger(...), ...)")

    def lacks(self, data: Any) -> str:
        """Held-out episodes will do, too: some fit the linear model, the others measure."""
        return lacks_episodes(data, 2)

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """Writes the curves; the metrics of the class's description, and `time/model_error_s`."""
        started = time.perf_counter()
        recording = gather(
            trainer.datamodule,
            model,
            episodes=self.episodes,
            max_steps=self.max_steps,
            seed=seed,
            explore=True,
        )
        curves = error_curves(model, recording, self.starts, self.horizon, self.context)
        if curves:
            step = counters(model).axis
            picture = line_panels(_panels(curves))
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    write_curves(curves, logger.directory / "model_error" / f"{step}.csv")
                    path = logger.directory / "model_error" / f"{step}.png"
                    with atomic_file(path) as file:
                        Image.fromarray(picture).save(file, "PNG")
                    logger.log_gif("model_error", picture[None], step)
        else:
            rank_zero_info(
                "no model error: every measured episode ended within the "
                f"{self.context} steps of context"
            )
        return {**summary(curves), "time/model_error_s": time.perf_counter() - started}


class Curve(NamedTuple):
    """The error of one predictor over the horizon.

    Attributes:
        space: "obs", "latent" or "reward".
        key: observation key, state key, or "reward".
        predictor: "model", "copy" or "linear".
        value: (H,) float64, errors 1, ..., H steps ahead.
        n: (H,) int64, how many starts each is a mean of.
    """

    space: str
    key: str
    predictor: str
    value: np.ndarray
    n: np.ndarray


def error_curves(
    model: Any, recording: Recording, starts: int, horizon: int, context: int
) -> list[Curve]:
    """The curves of `ModelError` for recorded episodes; none if no episode outlasts the context.

    Args:
        model: an Imaginer with a `spec`.
        recording: the episodes; the first half fits the linear model, the others measure.
        starts: most dreams.
        horizon: most steps dreamed; fewer, if nothing was recorded so far ahead of any start.
        context: fewest steps filtered before a dream.
    """
    half = len(recording.length) // 2
    fitted, measured = recording.select(slice(half)), recording.select(slice(half, None))
    row, step = measured.starts(context, starts)
    if not len(row):
        return []
    horizon = min(horizon, int((measured.length[row] - 1 - step).max()))
    counts = measured.recorded(row, step, horizon).cpu()

    filtered = model.observe(recording.batch)
    actions = measured.after("action", row, step - 1, horizon)
    dream = model.imagine({k: v[half:][row, step] for k, v in filtered.items()}, actions, horizon)
    linear = LinearModel(fitted, model.spec.action)
    obs_scale = {
        key: torch.ones(()) if value.dtype == torch.uint8 else _std(value[recording.valid].cpu())
        for key, value in recording.batch["obs"].items()
    }
    latent_scale = {
        key: _total_std(value[recording.valid].cpu())
        for key, value in filtered.items()
        if key in dream.state and value.is_floating_point()
    }

    errors = defaultdict[tuple[str, str, str], list[Tensor]](list)
    for part in torch.arange(len(row), device=row.device).split(DECODED_TOGETHER):
        r, s = row[part], step[part]
        decoded = model.decode({key: value[part] for key, value in dream.state.items()})
        last = {key: value[r, s] for key, value in measured.batch["obs"].items()}
        linear_obs, linear_reward = linear.rollout(last, actions[part])
        for key in (key for key in last if key in decoded):
            real, scale = as_float(measured.after(key, r, s, horizon)), obs_scale[key]
            copied = as_float(last[key])[:, None]
            errors["obs", key, "model"].append(_squared_error(decoded[key], real, scale))
            errors["obs", key, "copy"].append(_squared_error(copied, real, scale))
            errors["obs", key, "linear"].append(_squared_error(linear_obs[key], real, scale))
        for key, scale in latent_scale.items():
            real = following(filtered[key][half:], r, s, horizon)
            error = _squared_error(dream.state[key][part], real, scale)
            errors["latent", key, "model"].append(error)
        reward = measured.after("reward", r, s, horizon).cpu().double()
        copied = measured.batch["reward"][r, s, None].cpu()
        errors["reward", "reward", "model"].append((dream.reward[part].cpu() - reward).abs())
        errors["reward", "reward", "copy"].append((copied - reward).abs())
        errors["reward", "reward", "linear"].append((linear_reward - reward).abs())

    n = counts.sum(0)
    return [
        Curve(*name, (torch.where(counts, torch.cat(parts), 0).sum(0) / n).numpy(), n.numpy())
        for name, parts in errors.items()
    ]


def summary(curves: Sequence[Curve]) -> dict[str, float]:
    """The metrics of `ModelError` from its curves."""
    metrics = {}
    for predictor, space in (
        ("model", "obs"),
        ("model", "latent"),
        ("model", "reward"),
        ("copy", "obs"),
        ("linear", "obs"),
    ):
        curve = _mean(curves, space, predictor)
        for k in (k for k in STEPS_AHEAD if k <= len(curve)):
            metrics[f"eval/{predictor}_error_{space}@{k}"] = float(curve[k - 1])
    better = _mean(curves, "obs", "model") < _mean(curves, "obs", "copy")
    if len(better):
        metrics["eval/model_error_horizon"] = float(np.cumprod(better).sum())
    return metrics


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Writes curves as `horizon,space,key,predictor,value,n`, one row for each value."""
    rows = ["horizon,space,key,predictor,value,n"]
    for curve in curves:
        name = f"{curve.space},{curve.key},{curve.predictor}"
        for k, (value, n) in enumerate(zip(curve.value.tolist(), curve.n.tolist(), strict=True), 1):
            rows.append(f"{k},{name},{value!r},{n}")
    with atomic_file(path) as file:
        file.write("".join(f"{row}\n" for row in rows).encode())


class LinearModel:
    """A linear world model, fitted by ridge least squares: the least that a model should beat.

    x[t + 1] - x[t] = A [x[t], a[t], 1] and reward[t + 1] = b [x[t], a[t], 1], where `a` is the
    encoded action and `x` holds the standardised vectors and, for each image average-pooled to at
    most 32 x 32 pixels, its first 32 principal components. What these cannot show stays as it was
    at the start. The ridge pulls towards "nothing changes". Computed in float64 on the CPU.

    Args:
        recording: the episodes to fit.
        action: the action space.
    """

    def __init__(self, recording: Recording, action: ActionSpec) -> None:
        self._codec = ActionCodec(action)
        self._features = {
            key: _Features(value[recording.valid]) for key, value in recording.batch["obs"].items()
        }
        x = self._encode(recording.batch["obs"])
        inputs = self._inputs(x, self._codec.encode(recording.batch["action"].cpu()))
        reward = recording.batch["reward"].cpu().double()[..., None]
        targets = torch.cat([x[:, 1:] - x[:, :-1], reward[:, 1:]], -1)
        pairs = recording.valid[:, 1:].cpu()
        inputs, targets = inputs[:, :-1][pairs], targets[pairs]
        gram = inputs.T @ inputs / len(inputs) + RIDGE * torch.eye(inputs.shape[1]).double()
        self._weight = torch.linalg.solve(gram, inputs.T @ targets / len(inputs))

    def rollout(self, obs: dict[str, Tensor], actions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Observations {key: (N, H, ...)}, images in [0, 1], and rewards (N, H).

        Args:
            obs: {key: (N, ...)} as recorded.
            actions: (N, H) or (N, H, A) in the units of the environment.
        """
        start = x = self._encode(obs)
        changes, rewards = [], []
        for action in self._codec.encode(actions.cpu()).unbind(1):
            output = self._inputs(x, action) @ self._weight
            x = x + output[:, :-1]
            changes.append(x - start)
            rewards.append(output[:, -1])
        parts = torch.stack(changes, 1).split([f.size for f in self._features.values()], -1)
        predicted = {
            key: features.add(obs[key], part)
            for (key, features), part in zip(self._features.items(), parts, strict=True)
        }
        return predicted, torch.stack(rewards, 1)

    def _encode(self, obs: dict[str, Tensor]) -> Tensor:
        return torch.cat([f.encode(obs[key]) for key, f in self._features.items()], -1)

    @staticmethod
    def _inputs(x: Tensor, action: Tensor) -> Tensor:
        return torch.cat([x, action.double(), torch.ones_like(x[..., :1])], -1)


class _Features:
    """A linear code of about unit size for the observations of one key."""

    def __init__(self, values: Tensor) -> None:
        self._shape = values.shape[1:]
        self._is_image = values.dtype == torch.uint8 and values.ndim == 4
        flat = self._flatten(values)
        self._mean = flat.mean(0)
        if self._is_image:
            components = min(COMPONENTS, *flat.shape)
            _, size, self._directions = torch.pca_lowrank(flat, components, niter=4)
            self._scale = (size[:1] / len(flat) ** 0.5).clamp(min=LEAST_STD)
        else:
            self._directions = torch.eye(flat.shape[1], dtype=torch.float64)
            self._scale = _std(flat)
        self.size = self._directions.shape[1]

    def encode(self, values: Tensor) -> Tensor:
        """Codes (..., F) of observations (..., *shape) as recorded."""
        lead = values.shape[: values.ndim - len(self._shape)]
        flat = self._flatten(values.reshape(-1, *self._shape))
        return ((flat - self._mean) @ self._directions / self._scale).reshape(*lead, self.size)

    def add(self, values: Tensor, change: Tensor) -> Tensor:
        """Observations (N, H, *shape) of (N, *shape) whose codes change by (N, H, F)."""
        start, flat = as_float(values).cpu()[:, None], (change * self._scale) @ self._directions.T
        if not self._is_image:
            return start + flat.reshape(*flat.shape[:2], *self._shape)
        small = flat.float().reshape(-1, self._shape[-1], *self._pooled)
        image = F.interpolate(small, self._shape[:2]).movedim(1, -1)
        return (start + image.unflatten(0, flat.shape[:2])).clamp(0, 1)

    @property
    def _pooled(self) -> tuple[int, int]:
        return min(self._shape[0], POOLED_SIDE), min(self._shape[1], POOLED_SIDE)

    def _flatten(self, values: Tensor) -> Tensor:
        values = as_float(values).cpu()
        if self._is_image:
            values = F.adaptive_avg_pool2d(values.movedim(-1, 1), self._pooled)
        return values.reshape(len(values), -1).double()


def _std(values: Tensor) -> Tensor:
    """Standard deviations over the first axis; 1 for what does not move."""
    std = values.double().std(0, correction=0)
    return torch.where(std < LEAST_STD, 1.0, std)


def _total_std(values: Tensor) -> Tensor:
    """Root of the mean variance over the first axis; 1 if nothing moves."""
    std = values.double().var(0, correction=0).mean().sqrt()
    return torch.where(std > 0, std, 1.0)


def _squared_error(prediction: Tensor, real: Tensor, scale: Tensor) -> Tensor:
    """(N, H) float64 mean squares of the elements of (prediction - real) / scale (N, H, ...)."""
    error = ((prediction.cpu() - real.cpu()) / scale).square()
    return error.reshape(*error.shape[:2], -1).mean(2).double()


def _mean(curves: Sequence[Curve], space: str, predictor: str) -> np.ndarray:
    """The mean over keys (H,); empty if there are no such curves."""
    values = [c.value for c in curves if (c.space, c.predictor) == (space, predictor)]
    return np.mean(values, 0) if values else np.zeros(0)


def _panels(curves: Sequence[Curve]) -> list[Panel]:
    """Errors of observations, latents and rewards; what is thrice as bad as copying leaves them."""
    panels = []
    for space, title in (("obs", "observation error"), ("reward", "reward error")):
        lines = {p: _mean(curves, space, p) for p in ("model", "copy", "linear")}
        copied = 3 * float(max(lines["copy"], default=0.0))
        lines = {p: line for p, line in lines.items() if len(line)}
        panels.append(Panel(title, lines, top=copied or float("inf")))
    latents = {c.key: c.value for c in curves if c.space == "latent"}
    panels.insert(1, Panel("latent error (1: the mean)", latents, top=3.0))
    return panels
