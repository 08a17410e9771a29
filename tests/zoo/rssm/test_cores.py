"""The recurrent cores against their equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.nets.layers import ELU, RELU, Style
from zoo.rssm.cores import BlockCore, GRUCore, LayerNormGRU

ROWS, ACTIONS, LATENT, DETER, HIDDEN = 5, 2, 6, 7, 8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(ROWS, DETER), torch.randn(ROWS, LATENT), torch.randn(ROWS, ACTIONS)


def shaken(core: nn.Module) -> nn.Module:
    """Biases and norms that are not what they start as."""
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return core


def plain_gru(cell: nn.GRUCell, x: Tensor, state: Tensor) -> Tensor:
    """Cho et al. 2014, with the reset after the recurrent product."""
    of_x = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    of_h = (state @ cell.weight_hh.T + cell.bias_hh).chunk(3, -1)
    reset, update = (torch.sigmoid(a + b) for a, b in zip(of_x[:2], of_h[:2], strict=True))
    candidate = torch.tanh(of_x[2] + reset * of_h[2])
    return (1 - update) * candidate + update * state


def layer_norm_gru(cell: LayerNormGRU, x: Tensor, state: Tensor) -> Tensor:
    """Dreamer V2: LayerNorm over all gates together, update bias -1."""
    gates = torch.cat([x, state], -1) @ cell.linear.weight.T + cell.linear.bias
    centred = gates - gates.mean(-1, keepdim=True)
    gates = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    gates = gates * cell.norm.weight + cell.norm.bias
    reset, candidate, update = gates.chunk(3, -1)
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    update = torch.sigmoid(update - 1)
    return update * candidate + (1 - update) * state


@pytest.mark.parametrize(("style", "function"), [(ELU, nn.ELU()), (RELU, nn.ReLU())])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_gru_core_equals_the_equations(style: Style, function: nn.Module, layer_norm: bool) -> None:
    core = GRUCore(ACTIONS, LATENT, DETER, HIDDEN, style, layer_norm)
    shaken(core)
    deter, stoch, action = inputs()
    found = core.step(deter, stoch, core.embed_actions(action), core.weights())
    linear = core.inputs.linear
    x = function(torch.cat([stoch, action], -1) @ linear.weight.T + linear.bias)
    reference = layer_norm_gru if layer_norm else plain_gru
    expected = reference(core.cell, x, deter)
    torch.testing.assert_close(found, expected)
    wrt = list(core.parameters())
    ours = torch.autograd.grad(found.square().sum(), wrt)
    theirs = torch.autograd.grad(expected.square().sum(), wrt)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_embedded_actions_of_a_whole_sequence_equal_those_of_its_steps() -> None:
    for core in (
        GRUCore(ACTIONS, LATENT, DETER, HIDDEN),
        BlockCore(ACTIONS, LATENT, 8, HIDDEN, 4),
    ):
        actions = torch.randn(3, 4, ACTIONS)
        whole = core.embed_actions(actions)
        for t in range(4):
            torch.testing.assert_close(whole[:, t], core.embed_actions(actions[:, t]))


def test_layer_norm_gru_barely_updates_where_its_gates_are_zero() -> None:
    cell = LayerNormGRU(3, 4)
    with torch.no_grad():
        cell.linear.weight.zero_()
    state = torch.randn(2, 4)
    keep = 1 - torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(cell(torch.zeros(2, 3), state), keep * state)


def test_grus_start_as_in_keras() -> None:
    cell = GRUCore(ACTIONS, LATENT, 16, 32).cell
    assert isinstance(cell, nn.GRUCell)
    identity = cell.weight_hh.T @ cell.weight_hh
    torch.testing.assert_close(identity, torch.eye(16), atol=1e-5, rtol=0)
    limit = (6 / (32 + 3 * 16)) ** 0.5
    assert 0.95 * limit < cell.weight_ih.abs().max() <= limit
    assert (cell.bias_ih == 0).all()
    assert (cell.bias_hh == 0).all()
    opened = GRUCore(ACTIONS, LATENT, 16, 32, gate_bias=1.0).cell  # PlaNet's
    assert isinstance(opened, nn.GRUCell)
    assert (opened.bias_ih + opened.bias_hh).tolist() == [1.0] * 32 + [0.0] * 16
    normed = GRUCore(ACTIONS, LATENT, 16, 32, layer_norm=True).cell
    assert isinstance(normed, LayerNormGRU)
    assert (normed.linear.bias == 0).all()
    assert sum(p.numel() for p in normed.parameters()) == (16 + 32) * 48 + 48 + 2 * 48


def test_layer_norm_gru_keeps_a_float32_state_under_autocast() -> None:
    cell = LayerNormGRU(HIDDEN, DETER)
    x, state = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, DETER)
    with torch.autocast("cpu", torch.bfloat16):
        found = cell(x, state)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cell(x, state), atol=0.1, rtol=0.1)
