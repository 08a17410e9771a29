"""Small models and batches of DIAMOND."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.diamond.module import Diamond


@pytest.fixture
def spec() -> Spec:
    return Spec({"image": ArraySpec((16, 20, 3), "uint8")}, ActionSpec("discrete", nvec=(3,)))


@pytest.fixture
def model(spec: Spec) -> Diamond:
    torch.manual_seed(0)
    return Diamond(
        spec,
        size="nano",
        first_updates=[2, 3, 1],
        epoch_updates=[1, 0, 2],
        dreams=5,
        horizon=4,
    )


@pytest.fixture
def batch(spec: Spec) -> dict[str, Any]:
    """Three sequences of 7 steps; the first crosses into another episode at step 3."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 7)
    found: dict[str, Any] = {
        "obs": {
            "image": torch.randint(256, (*shape, 16, 20, 3), generator=generator).to(torch.uint8)
        },
        "action": torch.randint(3, shape, generator=generator),
        "reward": torch.randn(shape, generator=generator),
    }
    for key in ("is_first", "is_last", "is_terminal"):
        found[key] = torch.zeros(shape, dtype=torch.bool)
    found["is_last"][0, 2] = found["is_terminal"][0, 2] = found["is_first"][0, 3] = True
    return found
