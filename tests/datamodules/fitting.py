"""A model that keeps what it is given, and trainings of it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch

from datamodules.spec import Spec

D = TypeVar("D", bound=pl.LightningDataModule)


class Model(pl.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self, sampling: str = "contexts", spec: Spec | None = None) -> None:
        super().__init__()
        self.replay_sampling = sampling
        if spec is not None:
            self.spec = spec
        self.layer = torch.nn.Linear(1, 1)
        self.batches: list[dict[str, Any]] = []
        self.noise: list[float] = []
        self.validated: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        self.noise.append(float(torch.rand(1)))
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Validated(Model):
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append(batch)


def fit(model: Model, data: pl.LightningDataModule, updates: int, **options: Any) -> pl.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = options.pop("ckpt_path", None)
        trainer = pl.Trainer(
            max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def as_rank(data: D, rank: int, ranks: int) -> D:
    """What the rank's Trainer would tell the datamodule."""
    module = SimpleNamespace(replay_sampling="windows")
    trainer = SimpleNamespace(global_rank=rank, world_size=ranks, lightning_module=module)
    data.trainer = trainer  # type: ignore[assignment]
    return data
