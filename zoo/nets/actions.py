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

        Clipping before storing changes nothing for the world model: it divides actions by
        max(1, |a|), which is the same.
        """
        if self.spec.kind == "discrete":
            return encoded.argmax(-1)
        if self.spec.kind == "box":
            return self.low + (encoded.clamp(-1, 1) + 1) / 2 * (self.high - self.low)
        return torch.stack([part.argmax(-1) for part in encoded.split(self.spec.nvec, -1)], -1)
