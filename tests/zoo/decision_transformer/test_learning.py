"""What is achieved follows what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from datamodules import OfflineDataModule
from datamodules.envs.factory import make_env
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo import collecting
from zoo.base import State
from zoo.collecting import Amount, Part, collect
from zoo.decision_transformer.module import DecisionTransformer
from zoo.evaluate import evaluate

TARGETS = (20.0, 50.0, 80.0, 110.0, 140.0, 170.0, 200.0)


class Balance:
    """Leans into the fall of the pole."""

    spec = Spec({"vector": ArraySpec((4,), "float32")}, ActionSpec("discrete", nvec=(2,)))

    def initial_state(self, batch_size: int) -> State:
        return {"nothing": torch.zeros(batch_size)}

    def act(
        self, obs: Mapping[str, Tensor], state: State, *, explore: bool
    ) -> tuple[Tensor, State]:
        lean = obs["vector"] @ torch.tensor([0.05, 0.1, 1.0, 0.3])
        return (lean > 0).long(), state


@pytest.mark.slow
def test_the_achieved_return_follows_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(make_env, "CartPole-v1", time_limit=200)
    monkeypatch.setattr(collecting, "load", lambda source: Balance())
    errs = [Part("balance", epsilon=epsilon) for epsilon in np.linspace(0.025, 0.975, 20)]
    collect(make, "CartPole-v1", errs, Amount("episodes", 200), tmp_path / "data")
    data = OfflineDataModule(str(tmp_path / "data"), batch_size=64, sequence_length=10)
    pl.seed_everything(0)
    model = DecisionTransformer(
        data.spec,
        size="nano",
        context=10,
        return_scale=100.0,
        max_timestep=200,
        sample_actions=True,
        lr=1e-3,
        warmup=100,
    )
    trainer = pl.Trainer(
        max_steps=1000,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    achieved = []
    for target in TARGETS:
        model.target_return = target
        achieved.append(evaluate(model, make, episodes=20, seed=1).return_mean)
    rank = float(spearman_corrcoef(torch.tensor(achieved), torch.tensor(TARGETS)))
    print(dict(zip(TARGETS, np.round(achieved, 1), strict=True)), "Spearman", rank)
    assert rank >= 0.9
    assert achieved[-1] >= 0.9 * data.returns.quantile(0.9).item()
