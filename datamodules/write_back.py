"""Fresh latents on their way back into the data."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor


class Keeper(Protocol):
    """What keeps latents beside its steps."""

    def write_back(self, step_id: np.ndarray, latents: dict[str, np.ndarray]) -> None:
        """Replaces the latents (B, T, ...) of steps (B, T)."""


class WriteBack:
    """For datamodules whose model hands latents back: they wait until the data is next looked at.

    Later, so that an update on a GPU is not held up in its middle.
    """

    _written_back: tuple[Tensor, dict[str, Tensor]] | None = None

    def write_back(self, step_id: Tensor, latents: dict[str, Tensor]) -> None:
        """Replaces the kept latents (B, T, ...) of steps (B, T)."""
        self._written_back = (step_id, latents)

    def take_over(self, keeper: Keeper | None) -> None:
        """Gives what waits to the keeper; without one it is dropped."""
        if self._written_back is not None and keeper is not None:
            step_id, latents = self._written_back
            arrays = {key: value.cpu().numpy() for key, value in latents.items()}
            keeper.write_back(step_id.cpu().numpy(), arrays)
        self._written_back = None
