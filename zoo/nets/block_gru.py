"""The recurrent core of DreamerV3: a GRU whose recurrent weights are block-diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.nets.layers import BlockLinear, RMSNormSiLU


class BlockGRU(nn.Module):
    """One step of a block-diagonal GRU with one hidden layer.

    Every block sees its own slice of the state and all inputs:
    h = SiLU(RMSNorm(BlockLinear([state_block, inputs] per block))), then per block the gates
    reset, candidate, update = BlockLinear(h), and
    state' = sigmoid(update - 1) tanh(sigmoid(reset) candidate) + (1 - sigmoid(update - 1)) state.

    Args:
        inputs: width of the inputs, shared by all blocks.
        deter: width of the state.
        blocks: number of blocks; divides `deter`.
    """

    def __init__(self, inputs: int, deter: int, blocks: int = 8) -> None:
        super().__init__()
        self.inputs, self.deter, self.blocks = inputs, deter, blocks
        self.hidden = BlockLinear(deter + blocks * inputs, deter, blocks)
        self.norm = RMSNormSiLU(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Maps inputs (N, inputs) and state (N, deter) to the next state (N, deter)."""
        return self.step(inputs, state, self.weights())

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Dense forms of the weights, made once for a whole rollout.

        The inputs are the same for all blocks, so their part of the first layer is one dense
        product. Narrow blocks (up to 16) are multiplied as one dense matrix with zeros, which
        beats many tiny products.
        """
        size = self.deter // self.blocks
        recurrent, shared = self.hidden.weight.split([size, self.inputs], 1)
        shared = shared.permute(1, 0, 2).reshape(self.inputs, self.deter)
        if size > 16:
            return recurrent, shared, self.gates.weight, self.gates.bias.view(self.blocks, 1, -1)
        # Gate-major columns: all reset gates, all candidates, all updates.
        gates = self.gates.weight.view(self.blocks, size, 3, size)
        gate_bias = self.gates.bias.view(self.blocks, 3, size).transpose(0, 1).reshape(-1)
        recurrent = torch.block_diag(*recurrent)
        gates = torch.cat([torch.block_diag(*gates[:, :, i]) for i in range(3)], 1)
        return torch.cat([recurrent, shared]), shared, gates, gate_bias

    def step(self, inputs: Tensor, state: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """`forward` with the result of `weights()`."""
        recurrent, shared, gates, gate_bias = weights
        if recurrent.dim() == 2:
            x = torch.addmm(self.hidden.bias, torch.cat([state, inputs], -1), recurrent)
            x = self.norm(x)
            return _gated(state, torch.addmm(gate_bias, x, gates))
        blocks = self._split(state)
        x = torch.addmm(self.hidden.bias, inputs, shared)
        x = self.norm(x + torch.bmm(blocks, recurrent).transpose(0, 1).flatten(1))
        out = _gated(blocks, torch.baddbmm(gate_bias, self._split(x), gates))
        return out.transpose(0, 1).flatten(1)

    def _split(self, x: Tensor) -> Tensor:
        """(N, width) as (blocks, N, width / blocks)."""
        return x.view(x.shape[0], self.blocks, -1).transpose(0, 1)


def _gated(state: Tensor, gates: Tensor) -> Tensor:
    """The next state (..., D) of gates (..., 3 * D)."""
    reset, candidate, update = gates.chunk(3, -1)
    candidate = torch.tanh(torch.sigmoid(reset) * candidate).to(state.dtype)
    return torch.lerp(state, candidate, torch.sigmoid(update - 1).to(state.dtype))
