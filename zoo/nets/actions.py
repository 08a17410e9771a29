"""Actions as networks see them, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datamodules.spec import ActionSpec
from zoo.nets.distributions import one_hot


class ActionCodec(nn.Module):
    """Translates between the units of the environment and the encoded actions of networks.

    Discrete actions are one-hot vectors, multi-discrete ones concatenated one-hot vectors, box
    actions are scaled to [-1, 1].
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: ActionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)

    def encode(self, action: Tensor) -> Tensor:
        """Environment units (...,) or (..., A) to encoded float32 (..., encoded_size)."""
        if self.spec.kind == "discrete":
            return one_hot(action, self.spec.n)
        if self.spec.kind == "box":
            return (action - self.low) / (self.high - self.low) * 2 - 1
        parts = zip(action.unbind(-1), self.spec.nvec, strict=True)
        return torch.cat([one_hot(part, n) for part, n in parts], -1)

    def decode(self, encoded: Tensor) -> Tensor:
        """Encoded (..., encoded_size) to environment units; box actions are clipped to the bounds.

        For DreamerV3 clipping before storing changes nothing: it divides actions by max(1, |a|),
        which is the same.
        """
        if self.spec.kind == "discrete":
            return encoded.argmax(-1)
        if self.spec.kind == "box":
            action = self.low + (encoded.clamp(-1, 1) + 1) / 2 * (self.high - self.low)
            return action.clamp(self.low, self.high)  # rounding may have left the box
        return torch.stack([part.argmax(-1) for part in encoded.split(self.spec.nvec, -1)], -1)


def add_noise(encoded: Tensor, amount: float, spec: ActionSpec) -> Tensor:
    """Exploration noise on encoded actions (..., A).

    Box actions get normal noise of standard deviation `amount` in units of half the box, clipped
    to [-1, 1]; each discrete choice is replaced by a uniformly random one with probability
    `amount` (Dreamer V1, "additive_gaussian" and "epsilon_greedy").
    """
    if not amount:
        return encoded
    if spec.kind == "box":
        return (encoded + amount * torch.randn_like(encoded)).clamp(-1, 1)
    other = random_like(encoded, spec).split(spec.nvec, -1)
    parts = []
    for part, random in zip(encoded.split(spec.nvec, -1), other, strict=True):
        swap = torch.rand(*part.shape[:-1], 1, device=part.device) < amount
        parts.append(torch.where(swap, random, part))
    return torch.cat(parts, -1)


def random_like(encoded: Tensor, spec: ActionSpec) -> Tensor:
    """Uniformly random encoded actions of the shape (..., A) of `encoded`."""
    if spec.kind == "box":
        return torch.rand_like(encoded) * 2 - 1
    lead, device = encoded.shape[:-1], encoded.device
    return torch.cat([one_hot(torch.randint(n, lead, device=device), n) for n in spec.nvec], -1)
