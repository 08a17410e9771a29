"""`Evaluation`: how well the policy does in fresh environments."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from callbacks.schedule import EveryEnvSteps
from datamodules.errors import UserError
from zoo.evaluate import evaluate


class Evaluation(EveryEnvSteps):
    """Plays greedy episodes in fresh environments of `trainer.datamodule.make_env()`.

    Logs `eval/return_mean`, `eval/return_std`, `eval/length_mean` and `time/eval_s`. Training is
    not disturbed: its numbers are the same with and without evaluation. Recorded data may name an
    environment for it; without one nothing is measured.

    Args:
        every_env_steps: how often, in frames.
        episodes: how many episodes each time.
        seed: of the environments; every evaluation has others.
        at_start: evaluate the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 1000,
        episodes: int = 10,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        if episodes < 1:
            raise UserError(f"Evaluation: episodes is {episodes}, must be at least 1")
        self.episodes = episodes

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """Mean and spread of the episodes' undiscounted returns."""
        start = time.perf_counter()
        result = evaluate(
            model,
            trainer.datamodule.make_env,
            episodes=self.episodes,
            seed=int(seed.generate_state(1)[0]),
            explore=False,
        )
        return {
            "eval/return_mean": float(np.mean(result.returns)),
            "eval/return_std": float(np.std(result.returns)),
            "eval/length_mean": float(np.mean(result.lengths)),
            "time/eval_s": time.perf_counter() - start,
        }
