"""The causal transformer: nobody sees the future, and the cache gives what the whole gives."""

from __future__ import annotations

import pytest
import torch

from zoo.nets.transformer import CausalTransformer, causal_mask

BATCH, STEPS, WIDTH = 3, 7, 16


def build(heads: int = 2, activation: str = "gelu") -> CausalTransformer:
    torch.manual_seed(0)
    model = CausalTransformer(WIDTH, 3, heads, dropout=0.5, activation=activation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, STEPS, WIDTH, generator=torch.Generator().manual_seed(seed))


def everything() -> torch.Tensor:
    return causal_mask(torch.ones(BATCH, STEPS, dtype=torch.bool))


def test_no_token_sees_a_later_one() -> None:
    model, x = build(), tokens().requires_grad_()
    for position in range(STEPS):
        (grad,) = torch.autograd.grad(model(x, everything())[:, position].sum(), x)
        assert (grad[:, position + 1 :] == 0).all()
        assert (grad[:, : position + 1].abs().sum((0, 2)) > 0).all()


def test_the_mask_hides_padding_and_nothing_becomes_nan() -> None:
    model, x = build(), tokens()
    valid = torch.ones(BATCH, STEPS, dtype=torch.bool)
    valid[0, :4] = False
    other = x.clone()
    other[0, :4] = 100.0
    mask = causal_mask(valid)
    assert mask.shape == (BATCH, 1, STEPS, STEPS)
    out, changed = model(x, mask), model(other, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[valid], changed[valid])
    alone = model(x[:1, 4:], causal_mask(torch.ones(1, 3, dtype=torch.bool)))
    torch.testing.assert_close(out[:1, 4:], alone)


@pytest.mark.parametrize("read", [slice(None), slice(1, None, 3), slice(-1, None)])
def test_reading_some_positions_gives_what_all_have_there(read: slice) -> None:
    model, x = build(), tokens()
    torch.testing.assert_close(model(x, everything(), read), model(x, everything())[:, read])


def test_reading_some_positions_has_the_same_gradients() -> None:
    model, x, read = build(), tokens(), slice(1, None, 3)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(x, everything())[:, read].square().sum(), parameters)
    given = torch.autograd.grad(model(x, everything(), read).square().sum(), parameters)
    for ours, theirs in zip(given, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_extending_gives_what_the_whole_sequence_gives(heads: int) -> None:
    model, x = build(heads), tokens()
    wanted = model(x, everything())
    cache = model.empty_cache(BATCH, STEPS + 2, x.device)
    first = torch.arange(4).expand(BATCH, -1)
    out, cache = model.extend(x[:, :4], cache, first)
    torch.testing.assert_close(out, wanted[:, :4])
    before = cache.clone()
    out, _ = model.extend(
        x[:, 4:], cache, torch.arange(4, STEPS).expand(BATCH, -1), slice(-1, None)
    )
    torch.testing.assert_close(out, wanted[:, -1:])
    assert torch.equal(cache, before)  # the state of a policy is not changed behind its back


def test_sequences_in_a_batch_may_stand_in_different_places() -> None:
    model, x = build(), tokens()
    wanted = model(x, everything())
    cache = model.empty_cache(BATCH, STEPS, x.device)
    _, cache = model.extend(x[:, :5], cache, torch.arange(5).expand(BATCH, -1))
    where = torch.tensor([3, 4, 5])
    rows = torch.arange(BATCH)
    out, _ = model.extend(x[rows, where][:, None], cache, where[:, None])
    torch.testing.assert_close(out[:, 0], wanted[rows, where])


def test_without_a_mask_all_see_all() -> None:
    block, x = build().blocks[0], tokens()
    out = block(x)
    torch.testing.assert_close(out, block(x, torch.zeros(STEPS, STEPS)))
    assert not torch.isclose(out, block(x, everything()))[:, 0].any()
    torch.testing.assert_close(block(x, read=slice(2, 4)), out[:, 2:4])


def test_rotations_belong_to_tokens_also_where_only_some_are_read() -> None:
    block, x = build().blocks[0], tokens()
    angle = torch.arange(STEPS)[None, :, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    rotation = torch.cat([angle.cos(), angle.sin()], -1)
    out = block(x, rotation=rotation)
    torch.testing.assert_close(block(x, read=slice(3, None), rotation=rotation), out[:, 3:])
    torch.testing.assert_close(block(x, rotation=rotate_by(rotation, 2.0)), out)
    assert not torch.isclose(out, block(x)).any(-1).all()


def rotate_by(rotation: torch.Tensor, steps: float) -> torch.Tensor:
    """The rotations of tokens that all stand `steps` further on."""
    cos, sin = rotation.chunk(2, -1)
    angle = torch.atan2(sin, cos) + steps * torch.tensor([1.0, 0.5, 0.2, 0.1])
    return torch.cat([angle.cos(), angle.sin()], -1)


def test_weights_start_as_in_gpt2() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(128, 2, 1)
    for block in model.blocks:
        for linear in (block.qkv, block.project, block.up, block.down):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert (linear.bias == 0).all()


def test_dropout_is_for_training_only() -> None:
    model, x = build(), tokens()
    assert torch.equal(model(x, everything()), model(x, everything()))
    model.train()
    assert not torch.equal(model(x, everything()), model(x, everything()))
