"""`DreamRealityGap`: how much of what the model promises comes true."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.episodes import Recording, as_float, record, require_dreamer
from callbacks.schedule import EveryEnvSteps
from datamodules.errors import UserError

STEPS_AHEAD = (1, 5, 15)


class DreamRealityGap(EveryEnvSteps):
    """Compares dreams with the real episodes from which they start.

    Some episodes are recorded with the exploring policy, which is the one that imagination follows.
    From starts spread evenly over them the model dreams `horizon` steps, and everything is compared
    with what really followed:

    - `eval/dream_return`: reward dreamed under its own policy, each weighted by the probability of
      getting there (the product of the predicted continues before it); `eval/real_return`: reward
      really earned in the same steps; both undiscounted means over the starts;
      `eval/dream_reality_gap`: their ratio (left out when the real return is zero).
    - With the recorded actions, k steps ahead: `eval/open_loop_mse@k` (mean over elements, then
      over observation keys; images in [0, 1]), beside `eval/copy_last_mse@k` (predicting that
      nothing changes), `eval/open_loop_psnr@k` (dB, images only) and `eval/reward_mae@k`.

    A start whose horizon is cut by a time limit counts only for the steps that were recorded; for
    the returns it does not count at all, as the dream goes on.

    Args:
        every_env_steps: how often, in frames.
        starts: number of dreams.
        horizon: steps dreamed.
        context: fewest steps filtered before a dream starts.
        episodes: episodes recorded.
        max_steps: most actions recorded of an episode.
        seed: of environments and policy noise.
        at_start: measure the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        starts: int = 64,
        horizon: int = 15,
        context: int = 5,
        episodes: int = 4,
        max_steps: int = 200,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        for name, value in (("starts", starts), ("horizon", horizon), ("context", context)):
            if value < 1:
                raise UserError(f"DreamRealityGap: {name} is {value}, must be at least 1")
        if max_steps < context + horizon:
            raise UserError(
                f"DreamRealityGap: max_steps is {max_steps}, must be at least context + horizon = "
                f"{context + horizon}"
            )
        self.starts, self.horizon, self.context = starts, horizon, context
        self.episodes, self.max_steps = episodes, max_steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models that do not dream."""
        require_dreamer(pl_module, "DreamRealityGap")

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """The metrics of the class's description, and `time/dream_gap_s`."""
        started = time.perf_counter()
        recording = record(
            model,
            trainer.datamodule.make_env,
            episodes=self.episodes,
            max_steps=self.max_steps,
            seed=seed,
            explore=True,
        )
        metrics = measure_gap(model, recording, self.starts, self.horizon, self.context)
        return {**metrics, "time/dream_gap_s": time.perf_counter() - started}


def measure_gap(
    model: Any, recording: Recording, starts: int, horizon: int, context: int
) -> dict[str, float]:
    """The metrics of `DreamRealityGap` for recorded episodes; those without a start are left out.

    Args:
        model: an Imaginer.
        recording: the episodes.
        starts: most dreams.
        horizon: steps dreamed.
        context: fewest steps filtered before a dream.
    """
    states = model.observe(recording.batch)
    metrics: dict[str, float] = {}

    row, step = recording.starts(context, starts)
    if len(row):
        state = {key: value[row, step] for key, value in states.items()}
        metrics |= _open_loop(model, recording, state, row, step, horizon)

    # a whole horizon must be on record, unless the task ended: then nothing more can be earned
    row, step = recording.starts(context, starts, horizon)
    if len(row):
        state = {key: value[row, step] for key, value in states.items()}
        dream = model.imagine(state, None, horizon)
        arrives = torch.cat([torch.ones_like(dream.cont[:, :1]), dream.cont[:, :-1]], 1).cumprod(1)
        dreamed = float((dream.reward * arrives).sum(1).mean())
        reward = recording.after("reward", row, step, horizon)
        earned = float((reward * recording.recorded(row, step, horizon)).sum(1).mean())
        metrics |= {"eval/dream_return": dreamed, "eval/real_return": earned}
        if earned != 0.0:
            metrics["eval/dream_reality_gap"] = dreamed / earned
    return metrics


def _open_loop(
    model: Any,
    recording: Recording,
    state: dict[str, Tensor],
    row: Tensor,
    step: Tensor,
    horizon: int,
) -> dict[str, float]:
    """Errors of predictions with the recorded actions, k steps ahead."""
    actions = recording.after("action", row, step - 1, horizon)
    dream = model.imagine(state, actions, horizon)
    decoded = model.decode(dream.state)
    recorded = recording.recorded(row, step, horizon)
    reward_error = (dream.reward - recording.after("reward", row, step, horizon)).abs()
    metrics = {}
    for k in (k for k in STEPS_AHEAD if k <= horizon):
        valid = recorded[:, k - 1]
        if not bool(valid.any()):
            continue
        errors, copy_errors, image_errors = [], [], []
        for key, prediction in decoded.items():
            real = as_float(recording.after(key, row, step, k)[:, -1])[valid].flatten(1)
            last = as_float(recording.batch["obs"][key][row, step])[valid].flatten(1)
            error = (prediction[:, k - 1][valid].flatten(1) - real).square().mean(1)
            errors.append(error.mean())
            copy_errors.append((last - real).square().mean())
            if recording.batch["obs"][key].dtype == torch.uint8:
                image_errors.append(error)
        metrics[f"eval/open_loop_mse@{k}"] = float(torch.stack(errors).mean())
        metrics[f"eval/copy_last_mse@{k}"] = float(torch.stack(copy_errors).mean())
        metrics[f"eval/reward_mae@{k}"] = float(reward_error[:, k - 1][valid].mean())
        if image_errors:
            decibel = -10 * torch.cat(image_errors).clamp(min=1e-10).log10()
            metrics[f"eval/open_loop_psnr@{k}"] = float(decibel.mean())
    return metrics
