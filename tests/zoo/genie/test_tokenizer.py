"""The tokenizer: causality, tokens and back, patches that stay."""

from __future__ import annotations

import torch

from zoo.genie.patches import Patches
from zoo.genie.quantizers import FiniteScalarQuantizer
from zoo.genie.tokenizer import Tokenizer
from zoo.nets.st_transformer import Shape

SHAPE = Shape(2, 16, 2, 8, 32)


def build(encoder: Shape = SHAPE) -> Tokenizer:
    torch.manual_seed(0)
    quantizer = FiniteScalarQuantizer([8, 8, 8])
    return Tokenizer(Patches((16, 16, 3), 4), encoder, SHAPE, 4, quantizer).eval()


def test_no_future_frame_changes_the_past() -> None:
    model, frames = build(), torch.rand(1, 4, 16, 16, 3)
    other = frames.clone()
    other[:, 2] = 1 - other[:, 2]
    with torch.no_grad():
        a, b = model.features(frames), model.features(other)
        assert torch.allclose(a[:, :2], b[:, :2], atol=1e-6)
        assert not torch.isclose(a[:, 2:], b[:, 2:], atol=1e-6).flatten(2).all(-1).any()
        tokens = model.tokens(frames)
        changed = tokens.clone()
        changed[:, 2] = (tokens[:, 2] + 100) % 512
        moved = (model.decode(tokens) - model.decode(changed)).abs().flatten(2).amax(-1)
    assert (moved[:, :2] < 1e-6).all()
    assert (moved[:, 2:] > 1e-6).all()


def test_reconstructions_are_what_the_tokens_say() -> None:
    model, frames = build(), torch.rand(2, 3, 16, 16, 3)
    with torch.no_grad():
        made, tokens = model(frames), model.tokens(frames)
        assert tokens.shape == (2, 3, 16)
        assert torch.equal(tokens, made.quantized.codes)
        torch.testing.assert_close(model.decode(tokens), made.frames.clamp(0, 1))


def test_an_encoder_without_layers_keeps_the_codes_of_patches_that_do_not_change() -> None:
    frames = torch.rand(1, 3, 16, 16, 3)
    other = frames.clone()
    other[:, 1:, :4, :4] = 1 - other[:, 1:, :4, :4]
    tokens, changed = (build(SHAPE._replace(layers=0)).tokens(x) for x in (frames, other))
    assert torch.equal(tokens[:, :, 1:], changed[:, :, 1:])
    assert torch.equal(tokens[:, :1], changed[:, :1])
    through = build().tokens(frames) != build().tokens(other)
    assert through[:, :, 1:].any()
