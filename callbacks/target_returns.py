"""`TargetReturns`: does the policy get what it is asked for?"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torchmetrics.functional.regression import spearman_corrcoef

from callbacks.schedule import EveryEnvSteps
from datamodules.errors import UserError
from zoo.base import capabilities
from zoo.evaluate import evaluate


class TargetReturns(EveryEnvSteps):
    """Asks for returns from the worst to the best of the data, and plays greedy episodes for each.

    - `eval/achieved@R`: mean return where R was asked for;
    - `eval/target_spearman`: rank correlation of asked and achieved returns;
    - `eval/best_target_return`: the best of the achieved means;
    - `eval/data_top10_return`: mean return of the best tenth of the data's episodes;
    - `eval/beyond_return`: achieved where more is asked for than the data has: half of its range
      above its best.

    A model that happens not to follow any return (behaviour cloning) is asked for none.

    Args:
        every_env_steps: how often, in frames.
        targets: number of returns asked for, evenly spaced.
        episodes: how many for each.
        seed: of the environments; every target has the same.
        at_start: measure the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        targets: int = 8,
        episodes: int = 20,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        for name, value, least in (("targets", targets, 2), ("episodes", episodes, 1)):
            if value < least:
                raise UserError(f"TargetReturns: {name} is {value}, must be at least {least}")
        self.targets, self.episodes = targets, episodes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models that cannot be asked for a return."""
        model: Any = pl_module
        if "ReturnConditioned" not in capabilities(model):
            raise UserError(
                f"TargetReturns needs a model that can be asked for a return, and this "
                f"{type(model).__name__} cannot: leave the callback out"
            )

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """The metrics of the class's description, and `time/target_returns_s`."""
        if model.target_return is None:
            return {}
        started = time.perf_counter()
        returns = trainer.datamodule.returns
        low, high = float(returns.min()), float(returns.max())
        asked = np.linspace(low, high, self.targets)
        asked_before = model.target_return
        number = int(seed.generate_state(1)[0])
        achieved = []
        try:
            for target in (*asked, high + 0.5 * (high - low)):
                model.target_return = float(target)
                make_env = trainer.datamodule.make_env
                achieved.append(evaluate(model, make_env, self.episodes, number).return_mean)
        finally:
            model.target_return = asked_before
        *inside, beyond = achieved
        rank = spearman_corrcoef(torch.tensor(inside), torch.tensor(asked, dtype=torch.float32))
        best = returns.sort().values[-max(1, len(returns) // 10) :]
        metrics = {
            "eval/target_spearman": float(rank.nan_to_num()),  # all achieved the same
            "eval/best_target_return": max(inside),
            "eval/data_top10_return": float(best.mean()),
            "eval/beyond_return": beyond,
            "time/target_returns_s": time.perf_counter() - started,
        }
        pairs = zip(asked, inside, strict=True)
        return metrics | {f"eval/achieved@{target:.4g}": value for target, value in pairs}
