"""A long training does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

import zoo
from datamodules import EnvDataModule

UPDATES = 50_000


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class _Watch(pl.Callback):
    """Resident memory every 5,000 updates."""

    def __init__(self) -> None:
        self.sizes: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.updates % 5000 == 0:
            self.sizes.append(_resident_mb())


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    from callbacks.checkpoint import RunCheckpoint
    from callbacks.evaluation import Evaluation
    from callbacks.logger import RunLogger
    from callbacks.run_metrics import RunMetrics

    data = EnvDataModule(
        "CartPole-v1",
        num_envs=2,
        batch_size=2,
        sequence_length=4,
        replay_ratio=8,
        prefill=50,
        capacity=4000,
    )
    sizes = {"size": "nano", "deter": 8, "hidden": 8, "stoch": 2, "classes": 4, "units": 8}
    model = zoo.create("dreamer-v3", spec=data.spec, **sizes, imagine_length=2, bins=21)
    watch = _Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=UPDATES,
        max_epochs=-1,
        default_root_dir=tmp_path,
        logger=RunLogger(),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Evaluation(every_env_steps=5000, episodes=2),
            RunMetrics(),
            RunCheckpoint(every_updates=2000),
            watch,
        ],
    )
    trainer.fit(model, datamodule=data)
    assert len(watch.sizes) == UPDATES // 5000
    # The first 10,000 updates fill the replay, import what is imported late, and warm allocators.
    grown = max(watch.sizes[2:]) - watch.sizes[1]
    assert grown < 15, f"resident memory in MB every 5,000 updates: {watch.sizes}"
