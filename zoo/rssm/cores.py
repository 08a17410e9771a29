"""The deterministic path h_t = f(h_{t-1}, z_{t-1}, a_{t-1}) of each paper.

A core says what can be computed outside of a time loop (`embed_actions` for all steps at once,
`weights` once for a rollout) and what is left for the loop (`step`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from zoo.nets.block_gru import BlockGRU
from zoo.nets.layers import ELU, Dense, Style, norm_silu
from zoo.nets.one_hot import one_hot_linear


class Core(Protocol):
    """A recurrent cell over h (N, deter)."""

    deter: int

    def embed_actions(self, actions: Tensor) -> Tensor:
        """What the cell sees of encoded actions (..., A)."""

    def weights(self) -> Any:
        """What is derived from the weights once for a whole rollout."""

    def step(self, deter: Tensor, stoch: Tensor, action: Tensor, weights: Any) -> Tensor:
        """The next h of h (N, deter), flattened z (N, S * C) and embedded actions (N, ...)."""


class BlockCore(nn.Module):
    """DreamerV3: three normalised inputs into a GRU with block-diagonal recurrent weights.

    Args:
        action_size, latent_size, deter, hidden: widths of a, flattened z, h and the inputs.
        blocks: number of blocks.
    """

    def __init__(
        self, action_size: int, latent_size: int, deter: int, hidden: int, blocks: int = 8
    ) -> None:
        super().__init__()
        if deter % blocks:
            raise UserError(f"deter is {deter}: it must be divisible by blocks, {blocks}")
        self.deter = deter
        sizes = (deter, latent_size, action_size)
        self.deter_in, self.stoch_in, self.action_in = (Dense(size, hidden) for size in sizes)
        self.gru = BlockGRU(3 * hidden, deter, blocks)

    def embed_actions(self, actions: Tensor) -> Tensor:
        """Large actions are divided by their size, max(1, |a|)."""
        return self.action_in.linear(actions / actions.abs().clamp(min=1.0).detach())

    def weights(self) -> _BlockWeights:
        """Scales of the norms, and dense forms of the block weights."""
        denses = (self.deter_in, self.stoch_in, self.action_in)
        norms = torch.stack([dense.activation.weight for dense in denses])  # type: ignore[misc]
        return _BlockWeights(norms, self.gru.weights())

    def step(self, deter: Tensor, stoch: Tensor, action: Tensor, weights: _BlockWeights) -> Tensor:
        """The next h."""
        parts = [self.deter_in.linear(deter), self.stoch_in.linear(stoch), action]
        # The three inputs are normalised apart, but in one call.
        inputs = norm_silu(torch.stack(parts, 1), weights.norms).flatten(1)
        return self.gru.step(inputs, deter, weights.gru)


class _BlockWeights(NamedTuple):
    norms: Tensor
    gru: tuple[Tensor, ...]


class GRUCore(nn.Module):
    """PlaNet and Dreamers V1, V2: one dense layer on [z, a], then a GRU.

    Args:
        action_size, latent_size, deter, hidden: widths of a, flattened z, h and the dense layer.
        style: of the dense layer.
        layer_norm: the GRU of Dreamer V2 instead of a plain one.
        gate_bias: first value of the plain GRU's gate biases (PlaNet: 1, to remember).
        classes: C where z consists of one-hot vectors; 0 where it does not.
    """

    def __init__(
        self,
        action_size: int,
        latent_size: int,
        deter: int,
        hidden: int,
        style: Style = ELU,
        layer_norm: bool = False,
        gate_bias: float = 0.0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.deter, self.latent_size, self.classes = deter, latent_size, classes
        self.inputs = Dense(latent_size + action_size, hidden, style)
        if layer_norm:
            self.cell: nn.Module = LayerNormGRU(hidden, deter)
        else:
            self.cell = _keras_gru(hidden, deter, gate_bias)

    def embed_actions(self, actions: Tensor) -> Tensor:
        """The action's share of the dense layer, bias included."""
        linear = self.inputs.linear
        return F.linear(actions, linear.weight[:, self.latent_size :], linear.bias)

    def weights(self) -> Tensor:
        """The latent's share of the dense layer's weight."""
        return self.inputs.linear.weight[:, : self.latent_size]

    def step(self, deter: Tensor, stoch: Tensor, action: Tensor, weights: Tensor) -> Tensor:
        """The next h."""
        if self.classes:
            inputs = action + one_hot_linear(stoch, weights, None, 0, self.classes)
        else:
            inputs = torch.addmm(action, stoch, weights.t())
        out: Tensor = self.cell(self.inputs.activation(inputs), deter)
        return out


class LayerNormGRU(nn.Module):
    """The GRU of Dreamer V2: one dense layer on [x, h], LayerNorm over all gates, update bias -1.

    reset, candidate, update = LayerNorm(W [x, h]); u = sigmoid(update - 1);
    h' = u tanh(sigmoid(reset) candidate) + (1 - u) h.
    """

    def __init__(self, inputs: int, deter: int) -> None:
        super().__init__()
        self.linear = ELU.linear(inputs + deter, 3 * deter)
        self.norm = nn.LayerNorm(3 * deter, eps=1e-3)  # Keras' epsilon

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """Maps inputs (N, inputs) and state (N, deter) to the next state (N, deter)."""
        gates = self.norm(self.linear(torch.cat([inputs, state], -1)).float())
        reset, candidate, update = gates.to(state.dtype).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(state, candidate, torch.sigmoid(update - 1))


def _keras_gru(inputs: int, deter: int, gate_bias: float) -> nn.GRUCell:
    """A GRU that starts as in Keras: Glorot-uniform inputs, orthogonal recurrence."""
    cell = nn.GRUCell(inputs, deter)
    nn.init.xavier_uniform_(cell.weight_ih)
    nn.init.orthogonal_(cell.weight_hh)
    nn.init.zeros_(cell.bias_ih)
    nn.init.constant_(cell.bias_ih[: 2 * deter], gate_bias)  # reset and update gate
    nn.init.zeros_(cell.bias_hh)
    return cell
