"""Image encoders: their sizes, standardised pixels, and that they know where things are."""

from __future__ import annotations

import pytest
import torch

from datamodules.errors import UserError
from zoo.jepa_wm.encoder import Encoder, SpatialSoftmax


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_encoder() -> None:
    # Stages of a convolution and two blocks of two; 65 -> 33 -> 17 -> 9 pixels; then 512 features.
    stages = sum((9 * a * b + b) + 4 * (9 * b * b + b) for a, b in ((2, 16), (16, 32), (32, 32)))
    linear = 9 * 9 * 32 * 512 + 512
    assert parameters(Encoder("impala", (65, 65, 2), 512)) == stages + linear == 1_425_072


def test_the_small_encoder() -> None:
    convs = (25 * 2 * 16 + 16) + (9 * 16 * 32 + 32) + (9 * 32 * 32 + 32)
    assert parameters(Encoder("conv", (33, 33, 2), 64)) == convs + 800 * 64 + 64


@pytest.mark.parametrize("kind", ["conv", "impala", "keypoints"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (33, 40, 2), (64, 64, 3)])
def test_any_size_and_any_leading_axes(kind: str, shape: tuple[int, int, int]) -> None:
    encoder = Encoder(kind, shape, 5)
    image = torch.randint(256, (2, 3, *shape), dtype=torch.uint8)
    out = encoder(image)
    assert out.shape == (2, 3, 5)
    torch.testing.assert_close(encoder(image[1, 2]), out[1, 2], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(image.float() / 255), out)


def test_pixels_are_standardised_channel_by_channel() -> None:
    torch.manual_seed(0)
    encoder = Encoder("conv", (9, 9, 2), 4, mean=(0.2, 0.5), std=(0.1, 2.0))
    plain = Encoder("conv", (9, 9, 2), 4)
    plain.load_state_dict(encoder.state_dict())
    image = torch.rand(3, 9, 9, 2)
    expected = plain((image - torch.tensor([0.2, 0.5])) / torch.tensor([0.1, 2.0]))
    torch.testing.assert_close(encoder(image), expected)


@pytest.mark.parametrize("kind", ["conv", "impala", "keypoints"])
def test_a_moved_dot_is_another_latent(kind: str) -> None:
    torch.manual_seed(0)
    image = torch.zeros(2, 33, 33, 1, dtype=torch.uint8)
    image[0, 8, 8] = image[1, 24, 24] = 255  # pooling over places would not see it
    here, there = Encoder(kind, (33, 33, 1), 16)(image)
    assert (here - there).abs().max() > 1e-3


def test_keypoints_are_where_a_channel_is_largest() -> None:
    look = SpatialSoftmax(2)
    torch.nn.init.constant_(look.sharpness, 3.0)
    x = torch.zeros(1, 2, 5, 7)
    x[0, 0, 4, 0], x[0, 1, 2, 6] = 9.0, 5.0
    column, row, value = look(x).unflatten(1, (3, 2)).unbind(1)
    torch.testing.assert_close(column, torch.tensor([[-1.0, 1.0]]))
    torch.testing.assert_close(row, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(value, torch.tensor([[9.0, 5.0]]))
    torch.testing.assert_close(look(torch.zeros(1, 2, 5, 7)), torch.zeros(1, 6))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="image size 7x64: sides must be at least 8"):
        Encoder("conv", (7, 64, 3), 4)
    with pytest.raises(UserError, match="pixel_std has 3 numbers, but images have 2 channels"):
        Encoder("conv", (33, 33, 2), 4, std=(1.0, 1.0, 1.0))
