"""An LSTM cell that forgets where an episode begins, and DIAMOND's way to start it.

Memories are float32, in autocast and in models that are all bfloat16, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Memory(NamedTuple):
    """Output h and cell c of an LSTM, each (..., hidden)."""

    h: Tensor
    c: Tensor


class LSTM(nn.LSTMCell):
    """`nn.LSTMCell` with Xavier input weights, orthogonal recurrent ones and forget bias 1."""

    def reset_parameters(self) -> None:
        """Draws new weights."""
        nn.init.xavier_uniform_(self.weight_ih)
        nn.init.orthogonal_(self.weight_hh)
        nn.init.zeros_(self.bias_ih)
        nn.init.zeros_(self.bias_hh)
        nn.init.ones_(self.bias_ih[self.hidden_size : 2 * self.hidden_size])

    def empty(self, count: int) -> Memory:
        """The memory (count, hidden) before an episode."""
        zeros = self.weight_hh.new_zeros(count, self.hidden_size, dtype=torch.float32)
        return Memory(zeros, zeros)

    def forward(self, x: Tensor, memory: Memory) -> Memory:  # type: ignore[override]
        """The memory (N, hidden) after inputs (N, F)."""
        return self._advance(F.linear(x, self.weight_ih, self.bias_ih), memory)

    def steps(self, x: Tensor, first: Tensor) -> Memory:
        """Runs over sequences, forgetting where `first`.

        Args:
            x: (N, T, F).
            first: (N, T + 1) bool, an episode begins at this step.

        Returns:
            The memories (N, T + 1, hidden) with which each step is met, the one behind the last
            input included; so where no episode begins, h at t + 1 is the output at t.
        """
        inputs = F.linear(x, self.weight_ih, self.bias_ih)  # of all steps at once
        memory = self.empty(len(x))
        met = [memory]
        for t in range(x.shape[1]):
            memory = self._advance(inputs[:, t], memory)
            keep = ~first[:, t + 1, None]
            memory = Memory(memory.h * keep, memory.c * keep)
            met.append(memory)
        return Memory(*(torch.stack(parts, 1) for parts in zip(*met, strict=True)))

    def _advance(self, inputs: Tensor, memory: Memory) -> Memory:
        """One step from the inputs' part of the gates (N, 4 * hidden)."""
        gates = inputs + F.linear(memory.h.to(inputs.dtype), self.weight_hh, self.bias_hh)
        let_in, forget, value, let_out = gates.float().chunk(4, 1)
        c = forget.sigmoid() * memory.c + let_in.sigmoid() * value.tanh()
        return Memory(let_out.sigmoid() * c.tanh(), c)
