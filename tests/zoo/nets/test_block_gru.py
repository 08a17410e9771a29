"""The block-diagonal GRU against a dense GRU that is written from the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.nets.block_gru import BlockGRU


def dense_reference(gru: BlockGRU, inputs: Tensor, state: Tensor) -> Tensor:
    """The same step with full matrices, zero outside the blocks."""
    blocks, size = gru.blocks, gru.deter // gru.blocks
    width = size + gru.inputs
    hidden = torch.zeros(gru.deter + gru.inputs, gru.deter, dtype=state.dtype)
    gates = [torch.zeros(gru.deter, gru.deter, dtype=state.dtype) for _ in range(3)]
    biases = [torch.zeros(gru.deter, dtype=state.dtype) for _ in range(3)]
    for b in range(blocks):
        own = slice(b * size, (b + 1) * size)
        assert gru.hidden.weight[b].shape == (width, size)
        hidden[own, own] = gru.hidden.weight[b, :size]
        hidden[gru.deter :, own] = gru.hidden.weight[b, size:]
        for g in range(3):  # reset, candidate, update of each block lie side by side
            part = slice(g * size, (g + 1) * size)
            gates[g][own, own] = gru.gates.weight[b, :, part]
            start = b * 3 * size + g * size
            biases[g][own] = gru.gates.bias[start : start + size]
    x = torch.cat([state, inputs], -1) @ hidden + gru.hidden.bias
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * gru.norm.weight
    x = x * torch.sigmoid(x)
    reset, candidate, update = (x @ w + c for w, c in zip(gates, biases, strict=True))
    update = torch.sigmoid(update - 1)
    candidate = torch.tanh(torch.sigmoid(reset) * candidate)
    return update * candidate + (1 - update) * state


@pytest.fixture(params=[(8, 4), (64, 4), (96, 4), (24, 1)], ids=str)
def gru(request: pytest.FixtureRequest) -> BlockGRU:
    """Blocks of 2 and 16 (one dense product) and of 24 (batched products)."""
    torch.manual_seed(0)
    deter, blocks = request.param
    gru = BlockGRU(6, deter, blocks)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gru


def test_step_and_gradients_equal_the_dense_reference(gru: BlockGRU) -> None:
    inputs = torch.randn(5, 6, requires_grad=True)
    state = torch.randn(5, gru.deter, requires_grad=True)
    upstream = torch.randn(5, gru.deter)
    found, expected = gru(inputs, state), dense_reference(gru, inputs, state)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wrt = [inputs, state, *gru.parameters()]
    ours = torch.autograd.grad((found * upstream).sum(), wrt)
    theirs = torch.autograd.grad((expected * upstream).sum(), wrt)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_block_reads_no_other_block_directly() -> None:
    torch.manual_seed(0)
    gru = BlockGRU(3, 40, 2)
    state = torch.randn(1, 40)
    jacobian = torch.autograd.functional.jacobian(
        lambda s: gru.hidden(
            torch.cat([s[:, :20], torch.ones(1, 3), s[:, 20:], torch.ones(1, 3)], 1)
        ),
        state,
    )[0, :, 0]
    assert (jacobian[:20, 20:] == 0).all()
    assert (jacobian[20:, :20] == 0).all()
    assert (jacobian[:20, :20] != 0).all()


def test_weights_made_once_give_the_same_steps(gru: BlockGRU) -> None:
    inputs, state = torch.randn(3, 6), torch.randn(3, gru.deter)
    weights = gru.weights()
    torch.testing.assert_close(gru.step(inputs, state, weights), gru(inputs, state))


def test_keeps_a_float32_state_under_autocast(gru: BlockGRU) -> None:
    inputs, state = torch.randn(3, 6), torch.randn(3, gru.deter)
    with torch.autocast("cpu", torch.bfloat16):
        found = gru(inputs, state)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gru(inputs, state), atol=0.1, rtol=0.1)
