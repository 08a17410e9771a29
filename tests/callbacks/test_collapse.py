"""`CollapseMonitor` on features that are made up."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from callbacks.collapse import CollapseMonitor


def measure(spread: float, copy_ratio: float | None, clips: int = 8) -> dict[str, float]:
    """What the monitor finds in features 1 + spread * noise."""
    image = torch.zeros(clips, 4, 2)
    model: Any = SimpleNamespace(
        spec=SimpleNamespace(obs={"image": None}),
        device=torch.device("cpu"),
        encode=lambda obs: 1 + spread * torch.randn(*obs["image"].shape[:2], 16),
    )
    metrics = {} if copy_ratio is None else {"train/copy_ratio": torch.tensor(copy_ratio)}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(), callback_metrics=metrics)
    monitor = CollapseMonitor(every_updates=1)
    monitor._batch = {"obs": {"image": image}}
    return monitor.measure(trainer, model, np.random.SeedSequence(0))


@pytest.mark.parametrize(
    ("spread", "copy_ratio"), [(0.05, 0.95), (0.003, 0.2), (0.003, None), (0.0, None)]
)
def test_a_collapse_is_said(spread: float, copy_ratio: float | None) -> None:
    with pytest.warns(UserWarning, match="have collapsed: their standard deviation is 0.0"):
        measure(spread, copy_ratio)


@pytest.mark.parametrize(("spread", "copy_ratio"), [(0.05, 0.5), (0.05, None), (0.5, 1.0)])
def test_what_is_none_is_not(spread: float, copy_ratio: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure(spread, copy_ratio)
    assert found["eval/relative_std"] == pytest.approx(spread, rel=0.25)


def test_one_clip_has_finite_ranks() -> None:
    assert all(np.isfinite(value) for value in measure(0.5, None, clips=1).values())
