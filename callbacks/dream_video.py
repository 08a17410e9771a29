"""`DreamVideo`: what the model dreams, beside what happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info

from callbacks.counters import counters
from callbacks.episodes import Recording, as_float, gather, lacks_episodes, record, require_dreamer
from callbacks.logger import RunLogger
from callbacks.pictures import dream_frames
from callbacks.schedule import EveryEnvSteps
from datamodules.errors import UserError


class DreamVideo(EveryEnvSteps):
    """Makes GIFs of open-loop predictions beside reality.

    Fresh greedy episodes are recorded (or held-out ones are taken, where the data is recorded and
    there is no environment); the model filters their first steps and then dreams on, told
    only the recorded actions. Rows: truth, dream (reconstruction, then prediction) and difference;
    one column per episode; the dream's border turns from green to red where it is on its own.
    Vectors (their first 8 numbers, standardised) are drawn as curves. Each observation key is one
    video: `dream/<key>` in TensorBoard and `videos/dream-<key>-<env_steps>.gif`.

    Args:
        every_env_steps: how often, in frames.
        context: steps the model sees.
        horizon: steps it dreams.
        episodes: columns.
        seed: of environments and noise.
        at_start: film the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        context: int = 5,
        horizon: int = 45,
        episodes: int = 4,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        for name, value in (("context", context), ("horizon", horizon), ("episodes", episodes)):
            if value < 1:
                raise UserError(f"DreamVideo: {name} is {value}, must be at least 1")
        self.context, self.horizon, self.episodes = context, horizon, episodes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models that do not dream, and runs without a `RunLogger`."""
        require_dreamer(pl_module, "DreamVideo")
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not fast_dev_run and not _run_loggers(trainer):
            raise UserError("DreamVideo needs a RunLogger: Trainer(logger=RunLogger(...), ...)")

    def lacks(self, data: Any) -> str:
        """Held-out episodes will do, too."""
        return lacks_episodes(data, 1)

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """Writes the videos; `time/dream_video_s`."""
        started = time.perf_counter()
        recording = gather(
            trainer.datamodule,
            model,
            episodes=self.episodes,
            max_steps=self.context + self.horizon - 1,
            seed=seed,
            explore=False,
        )
        videos = self.frames(model, recording)
        for key, frames in videos.items():
            for logger in _run_loggers(trainer):
                logger.log_gif(f"dream/{key}", frames, counters(model).axis)
        return {"time/dream_video_s": time.perf_counter() - started}

    def film(
        self, model: Any, make_env: Callable[[], gym.Env], seed: np.random.SeedSequence
    ) -> dict[str, np.ndarray]:
        """Frames uint8 (T, H, W, 3) of each observation key; none if every episode was too short.

        Episodes that end within the context cannot be dreamed on and are left out.
        """
        recording = record(
            model,
            make_env,
            episodes=self.episodes,
            max_steps=self.context + self.horizon - 1,
            seed=seed,
            explore=False,
        )
        return self.frames(model, recording)

    def frames(self, model: Any, recording: Recording) -> dict[str, np.ndarray]:
        """The same of recorded episodes."""
        rows = torch.nonzero(recording.length > self.context).flatten()
        if not len(rows):
            rank_zero_info(
                f"no dream video: every episode ended within the {self.context} steps of context"
            )
            return {}
        states = {key: value[rows] for key, value in model.observe(recording.batch).items()}
        seen = {key: value[:, : self.context] for key, value in states.items()}
        now = {key: value[:, -1] for key, value in seen.items()}
        horizon = int(recording.length.max()) - self.context
        actions = recording.batch["action"][rows, self.context - 1 :][:, :horizon]
        dream = model.imagine(now, actions, horizon)
        reconstructed, predicted = model.decode(seen), model.decode(dream.state)
        return {
            key: dream_frames(
                as_float(recording.batch["obs"][key][rows]).cpu().numpy(),
                torch.cat([reconstructed[key], predicted[key]], 1).float().cpu().numpy(),
                recording.length[rows].cpu().numpy(),
                self.context,
            )
            for key in predicted
        }


def _run_loggers(trainer: pl.Trainer) -> list[RunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]
