"""What is achieved follows what is asked for."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from offline_standin import CartPoleContexts
from torchmetrics.functional.regression import spearman_corrcoef

from datamodules.envs.factory import make_env
from zoo.decision_transformer.module import DecisionTransformer
from zoo.evaluate import evaluate

TARGETS = (20.0, 50.0, 80.0, 110.0, 140.0, 170.0, 200.0)


@pytest.mark.slow
def test_the_achieved_return_follows_the_target() -> None:
    data = CartPoleContexts(count=200, batch_size=64, sequence_length=10)
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
    make = partial(make_env, "CartPole-v1", time_limit=200)
    achieved = []
    for target in TARGETS:
        model.target_return = target
        achieved.append(evaluate(model, make, episodes=20, seed=1).return_mean)
    rank = float(spearman_corrcoef(torch.tensor(achieved), torch.tensor(TARGETS)))
    print(dict(zip(TARGETS, np.round(achieved, 1), strict=True)), "Spearman", rank)
    assert rank >= 0.9
    assert achieved[-1] >= 0.9 * data.returns.quantile(0.9).item()
