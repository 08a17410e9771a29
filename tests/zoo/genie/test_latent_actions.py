"""The latent action model: causality, alignment, and what the decoder may see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.genie.latent_actions import (
    LatentActionModel,
    Reader,
    conv_action_model,
    st_action_model,
)
from zoo.genie.patches import Patches
from zoo.genie.quantizers import Continuous, FiniteScalarQuantizer, Quantizer
from zoo.nets.st_transformer import Shape

SHAPE, IMAGE, FRAMES = Shape(2, 16, 2, 8, 32), (16, 16, 3), 5
KINDS = ("st", "changes", "conv")
ALONE = ("alone", "conv-alone")


def build(kind: str, quantizer: Quantizer | None = None) -> LatentActionModel:
    torch.manual_seed(0)
    quantizer = quantizer or Continuous(3)
    alone = kind in ALONE
    if kind.startswith("conv"):
        return conv_action_model(IMAGE, 16, quantizer, alone=alone).eval()
    changes = kind != "st"
    return st_action_model(
        IMAGE, 8, SHAPE, SHAPE, FRAMES, quantizer, changes=changes, relative=changes, alone=alone
    ).eval()


def test_a_reader_of_changes_says_them_beside_each_patch() -> None:
    patches, frames = Patches(IMAGE, 8), torch.rand(2, 3, *IMAGE)
    plain, read = Reader(patches)(frames), Reader(patches, changes=True)
    assert read.values == read(frames).shape[-1] == 2 * plain.shape[-1]
    now, change = read(frames).chunk(2, -1)
    assert torch.equal(now, plain)
    assert not change[:, 0].any()
    torch.testing.assert_close(change[:, 1:], plain[:, 1:] - plain[:, :-1])


def changed(a: Tensor, b: Tensor) -> list[bool]:
    """Along the second axis."""
    return ((a - b).abs().flatten(2).amax(-1) > 1e-7).any(0).tolist()


@pytest.mark.parametrize("kind", KINDS + ALONE)
def test_an_action_lies_between_two_frames_and_sees_none_later(kind: str) -> None:
    model, frames = build(kind), torch.rand(2, FRAMES, *IMAGE)
    other = frames.clone()
    other[:, 3] = 1 - other[:, 3]
    with torch.no_grad():
        moved = changed(model.infer(frames).vectors, model.infer(other).vectors)
    assert moved == [False, False, True, True]  # action 2 leads from frame 2 to frame 3


@pytest.mark.parametrize("kind", ALONE)
def test_an_action_read_alone_is_the_same_wherever_its_two_frames_are(kind: str) -> None:
    model, frames = build(kind), torch.rand(2, FRAMES, *IMAGE)
    with torch.no_grad():
        in_clips = model.infer(frames).vectors
        pairs = torch.stack([frames[:, :-1], frames[:, 1:]], 2).flatten(0, 1)
        torch.testing.assert_close(model.infer(pairs).vectors.view_as(in_clips), in_clips)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_sees_the_past_and_its_action_only(kind: str) -> None:
    model, frames = build(kind), torch.rand(2, FRAMES, *IMAGE)
    actions = torch.randn(2, FRAMES, 3)
    with torch.no_grad():
        plain = model.decoder(frames, actions)
        other = actions.clone()
        other[:, 2] += 1
        moved = changed(plain, model.decoder(frames, other))
        assert moved[:3] == [False, False, True]
        later = frames.clone()
        later[:, 3:] = 1 - later[:, 3:]
        assert changed(plain, model.decoder(later, actions)) == [False, False, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_frame_is_known_by_its_code_alone(kind: str) -> None:
    """Predictions of two clips that differ in the last frame alone differ if their codes do."""
    model = build(kind, FiniteScalarQuantizer([256]))
    frames = torch.rand(8, 3, *IMAGE)
    frames[:, :2] = frames[:1, :2]
    frames[:, 2] *= torch.tensor([0.0, 0.0, 0.3, 0.3, 0.6, 0.6, 1.0, 1.0])[:, None, None, None]
    frames[1::2] = frames[::2]
    with torch.no_grad():
        made = model(frames)
    codes, last = made.actions.codes[:, 1], made.frames[:, 1].flatten(1)
    assert 1 < len(codes.unique()) < 8
    same = (last[:, None] - last).abs().amax(-1) < 1e-6
    assert torch.equal(same, codes[:, None] == codes)


def test_residual_outputs_are_added_and_others_squashed() -> None:
    model, frames = build("st"), torch.rand(1, 3, *IMAGE)
    model.decoder.out.weight.data.zero_()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        assert (model(frames).frames == 0.5).all()
        model.residual = True
        assert torch.equal(model(frames).frames, frames[:, :-1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_encoder_through_the_codes(kind: str) -> None:
    model = build(kind, FiniteScalarQuantizer([2, 2], normalize=True)).train()
    model(torch.rand(3, 4, *IMAGE)).frames.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any((p.grad != 0).any() for p in model.encoder.parameters() if p.grad is not None)
