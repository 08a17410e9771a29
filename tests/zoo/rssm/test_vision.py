"""Image encoders and decoders: shapes, ranges and the layers of the papers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.nets.distributions import CenteredImage
from zoo.rssm.vision import StridedEncoder, TransposedDecoder, image_shape

SHAPE = (64, 64, 3)
ACTIVATIONS = (nn.ReLU, nn.ELU)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("depth", "tokens"), [(32, 1024), (48, 1536), (2, 64)])
def test_strided_encoder_ends_with_two_by_two_cells(depth: int, tokens: int) -> None:
    encoder = StridedEncoder(SHAPE, depth, nn.ReLU)
    assert encoder.size == tokens
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, tokens)
    channels = [conv.out_channels for conv in encoder.convs if isinstance(conv, nn.Conv2d)]
    assert channels == [depth, 2 * depth, 4 * depth, 8 * depth]


@pytest.mark.parametrize("channels", [1, 4])
def test_transposed_decoder_paints_64_by_64(channels: int) -> None:
    decoder = TransposedDecoder((64, 64, channels), 10, 2, nn.ELU)
    assert decoder(torch.randn(5, 10)).shape == (5, channels, 64, 64)
    convs = [conv for conv in decoder.convs if isinstance(conv, nn.ConvTranspose2d)]
    assert [conv.in_channels for conv in convs] == [64, 8, 4, 2]
    assert [conv.kernel_size[0] for conv in convs] == [5, 5, 6, 6]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encoder_activates_every_layer(activation: type[nn.Module]) -> None:
    encoder = StridedEncoder(SHAPE, 2, activation)
    x = torch.randn(2, 3, 64, 64)
    expected = x
    for conv in encoder.convs[::2]:
        expected = torch.nn.functional.conv2d(expected, conv.weight, conv.bias, stride=2)
        expected = activation()(expected)
    torch.testing.assert_close(encoder(x), expected.flatten(1))
    assert encoder(x).min() >= (0 if activation is nn.ReLU else -1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decoder_activates_neither_the_first_nor_the_last_layer(
    activation: type[nn.Module],
) -> None:
    decoder = TransposedDecoder(SHAPE, 10, 2, activation)
    features = torch.randn(2, 10)
    x = (features @ decoder.dense.weight.T + decoder.dense.bias).view(2, 64, 1, 1)
    assert x.min() < -1  # a first activation would change it
    convs = list(decoder.convs[::2])
    for conv in convs:
        x = torch.nn.functional.conv_transpose2d(x, conv.weight, conv.bias, stride=2)
        if conv is not convs[-1]:
            x = activation()(x)
    torch.testing.assert_close(decoder(features), x)
    assert decoder(10 * features).min() < 0 < decoder(10 * features).max()


def test_pictures_are_around_zero_inside_and_in_0_to_1_outside() -> None:
    decoder = TransposedDecoder(SHAPE, 10, 2, nn.ReLU)
    assert decoder.output is CenteredImage
    grey = decoder(torch.zeros(1, 10))
    assert (grey == 0).all()  # biases start at zero
    assert (CenteredImage(grey, 3).pred() == 0.5).all()


@pytest.mark.parametrize("shape", [(48, 64, 3), (128, 128, 3)])
def test_other_sizes_are_named(shape: tuple[int, int, int]) -> None:
    message = f"image size {shape[0]}x{shape[1]}: this model reads 64x64; set size=64"
    with pytest.raises(UserError, match=message):
        StridedEncoder(shape, 2, nn.ReLU)
    with pytest.raises(UserError, match=message):
        TransposedDecoder(shape, 10, 2, nn.ReLU)


def test_channels_of_all_images_are_joined() -> None:
    arrays = {"a": ArraySpec((64, 48, 3), "uint8"), "b": ArraySpec((64, 48, 1), "uint8")}
    spec = Spec(arrays | {"v": ArraySpec((2,), "float32")}, ActionSpec("discrete", nvec=(2,)))
    assert image_shape(spec) == (64, 48, 4)
