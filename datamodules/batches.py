"""What datamodules share: nested batches, epochs of an endless stream, torch's generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ReplayLoader:
    """The batches of one epoch of an endless stream.

    It has a length because Lightning prefetches a batch from loaders without one, which would then
    be older than the update before it.
    """

    def __init__(self, length: int, next_batch: Callable[[], dict[str, Any]]) -> None:
        self._length, self._next_batch = length, next_batch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(len(self)):
            yield self._next_batch()


def nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"obs/image": array} to {"obs": {"image": tensor}}."""
    nested: dict[str, Any] = {"obs": {}}
    for name, array in flat.items():
        group, _, key = name.rpartition("/")
        target = nested.setdefault(group, {}) if group else nested
        target[key] = torch.from_numpy(array)
    return nested


def rng_state() -> dict[str, Tensor]:
    """The states of torch's global generators."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
