"""The kinds of stochastic states: categoricals (Dreamer V2, V3) and Gaussians (PlaNet, Dreamer V1).

A stochastic state z is (..., S, C): S variables of C numbers, one-hot vectors for categoricals and
C = 1 for Gaussians.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.errors import UserError
from zoo.nets.distributions import DiagonalNormal, Latent, OneHot, one_hot, unimix


class LatentKind(Protocol):
    """How raw network outputs become a distribution over z, and how z is stored.

    Attributes:
        shape: (S, C).
        outputs: width of the raw outputs.
        field: shape and dtype of a stored z.
    """

    shape: tuple[int, int]
    outputs: int
    field: tuple[tuple[int, ...], str]

    def __call__(self, raw: Tensor) -> Latent:
        """The distribution of raw outputs (..., outputs)."""

    def noise(self, *size: int, device: torch.device) -> Tensor:
        """Noise (*size, S, 1) for samples."""

    def pack(self, stoch: Tensor) -> Tensor:
        """What to store of z (..., S, C)."""

    def unpack(self, stored: Tensor) -> Tensor:
        """z (..., S, C) of what was stored."""


class Categoricals:
    """S categoricals of C classes.

    Args:
        stoch: S.
        classes: C.
        mixture: share of the uniform distribution (DreamerV3: 0.01).
    """

    def __init__(self, stoch: int, classes: int, mixture: float = 0.0) -> None:
        if classes > 256:
            raise UserError(f"classes is {classes}: the replay keeps a class in one byte, 256")
        self.shape, self.mixture = (stoch, classes), mixture
        self.outputs = stoch * classes
        self.field: tuple[tuple[int, ...], str] = ((stoch,), "uint8")

    def __call__(self, raw: Tensor) -> OneHot:
        """The distribution of logits (..., S * C)."""
        logits = raw.view(*raw.shape[:-1], *self.shape)
        if self.mixture:
            return OneHot(unimix(logits, self.mixture))
        log_probs = F.log_softmax(logits.float(), -1)  # without a mixture they may underflow
        return OneHot(log_probs.exp(), log_probs)

    def noise(self, *size: int, device: torch.device) -> Tensor:
        """Uniform noise (*size, S, 1)."""
        return torch.rand(*size, self.shape[0], 1, device=device)

    def pack(self, stoch: Tensor) -> Tensor:
        """The class of each variable, uint8 (..., S)."""
        return stoch.argmax(-1).to(torch.uint8)

    def unpack(self, stored: Tensor) -> Tensor:
        """One-hot vectors (..., S, C)."""
        return one_hot(stored.long(), self.shape[1])


class Gaussians:
    """S independent normals.

    Args:
        stoch: S.
        std: standard deviation of raw outputs x: softplus(x) (PlaNet, Dreamer V1) or
            2 sigmoid(x / 2) (Dreamer V2), both plus `min_std`.
        min_std: smallest standard deviation.
    """

    def __init__(
        self, stoch: int, std: Literal["softplus", "sigmoid2"] = "softplus", min_std: float = 0.1
    ) -> None:
        self.shape, self.std, self.min_std = (stoch, 1), std, min_std
        self.outputs = 2 * stoch
        self.field: tuple[tuple[int, ...], str] = ((stoch,), "float32")

    def __call__(self, raw: Tensor) -> DiagonalNormal:
        """The distribution of means and raw deviations (..., 2 * S)."""
        mean, std = raw.float().unsqueeze(-1).chunk(2, -2)
        std = F.softplus(std) if self.std == "softplus" else 2 * torch.sigmoid(std / 2)
        return DiagonalNormal(mean, std + self.min_std)

    def noise(self, *size: int, device: torch.device) -> Tensor:
        """Standard normal noise (*size, S, 1)."""
        return torch.randn(*size, *self.shape, device=device)

    def pack(self, stoch: Tensor) -> Tensor:
        """z as float32 (..., S)."""
        return stoch.squeeze(-1).float()

    def unpack(self, stored: Tensor) -> Tensor:
        """z (..., S, 1)."""
        return stored.unsqueeze(-1)
