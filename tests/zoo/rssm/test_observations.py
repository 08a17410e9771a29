"""Encoder and decoder for every mix of images and vectors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.nets.distributions import UnitNormal, symexp, symlog
from zoo.nets.layers import ELU
from zoo.rssm.observations import Decoder, Encoder, pixels, same
from zoo.rssm.vision import BlockDecoder, PooledEncoder, StridedEncoder, TransposedDecoder

ACTION = ActionSpec("discrete", nvec=(2,))
ARRAYS = {
    "vectors": {"position": ArraySpec((3,), "float32"), "height": ArraySpec((), "float32")},
    "matrix": {"points": ArraySpec((2, 3), "float32")},
    "image": {"image": ArraySpec((64, 64, 3), "uint8")},
    "wide": {"image": ArraySpec((48, 64, 1), "uint8")},
    "mixed": {
        "vector": ArraySpec((5,), "float32"),
        "front": ArraySpec((64, 64, 3), "uint8"),
        "depth": ArraySpec((64, 64, 1), "uint8"),
    },
}
SIZES = {"vectors": 6, "matrix": 6, "image": 8 * 16, "wide": 8 * 12, "mixed": 6 + 8 * 16}


def make_encoder(spec: Spec, depth: int = 2, layers: int = 2, units: int = 6) -> Encoder:
    return Encoder(spec, partial(PooledEncoder, depth=depth), layers, units)


def make_decoder(spec: Spec, latent: int = 12, depth: int = 2, layers: int = 2) -> Decoder:
    """DreamerV3's, for h of width 16."""
    vision = partial(BlockDecoder, deter=16, latent=latent, depth=depth, units=6, blocks=8)
    return Decoder(spec, 16 + latent, vision, layers, 6)


def observations(spec: Spec, *batch: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        key: torch.randint(0, 256, (*batch, *array.shape), dtype=torch.uint8)
        if array.is_image
        else torch.randn(*batch, *array.shape) * 10
        for key, array in spec.obs.items()
    }


@pytest.fixture(params=ARRAYS)
def case(request: pytest.FixtureRequest) -> tuple[str, Spec]:
    return request.param, Spec(ARRAYS[request.param], ACTION)


def test_encoder_gives_one_token_vector_per_step(case: tuple[str, Spec]) -> None:
    name, spec = case
    encoder = make_encoder(spec)
    assert encoder.size == SIZES[name]
    assert encoder(observations(spec, 2, 3)).shape == (2, 3, SIZES[name])


def test_decoder_predicts_what_came_in(case: tuple[str, Spec]) -> None:
    _, spec = case
    decoder = make_decoder(spec)
    obs = observations(spec, 2, 3)
    outputs = decoder(torch.randn(2, 3, 28))
    assert outputs.keys() == obs.keys()
    for key, output in outputs.items():
        assert output.pred().shape == obs[key].shape
    losses = decoder.losses(outputs, obs)
    for key, loss in losses.items():
        assert loss.shape == (2, 3)
        error = (
            outputs[key].pred() - obs[key].double() / 255
            if spec.obs[key].is_image
            else symlog(outputs[key].pred()) - symlog(obs[key])
        )
        torch.testing.assert_close(
            loss, error.square().reshape(2, 3, -1).sum(-1).float(), rtol=1e-3, atol=1e-3
        )


def test_every_parameter_takes_part(case: tuple[str, Spec]) -> None:
    _, spec = case
    obs = observations(spec, 1, 2)
    encoder = make_encoder(spec)
    decoder = make_decoder(spec)
    outputs = decoder(torch.randn(1, 2, 28))
    loss = encoder(obs).square().sum() + sum(decoder.losses(outputs, obs).values()).sum()
    loss.backward()
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_encoder_reads_pixels_around_zero_and_vectors_in_symlog() -> None:
    spec = Spec(ARRAYS["mixed"], ACTION)
    encoder = make_encoder(spec, layers=1)
    obs = observations(spec, 1, 1)
    pixels = torch.cat([obs["depth"], obs["front"]], -1)  # keys in alphabetical order
    x = pixels[:, 0].permute(0, 3, 1, 2) / 255 - 0.5
    for conv, pool, norm in encoder.vision.convs:
        x = norm(pool(conv(x)))
    expected = torch.cat([encoder.mlp(symlog(obs["vector"][:, 0])), x.movedim(1, -1).flatten(1)], 1)
    torch.testing.assert_close(encoder(obs)[:, 0], expected)


def test_images_are_probabilities_and_vectors_have_units() -> None:
    spec = Spec(ARRAYS["mixed"], ACTION)
    decoder = make_decoder(spec, layers=1)
    outputs = decoder(100 * torch.randn(1, 2, 28))
    assert outputs["front"].pred().min() >= 0
    assert outputs["front"].pred().max() <= 1
    torch.testing.assert_close(outputs["vector"].pred(), symexp(outputs["vector"].mean))


def test_each_block_of_the_state_paints_its_own_channels() -> None:
    spec = Spec(ARRAYS["image"], ACTION)
    decoder = make_decoder(spec, latent=4, depth=4, layers=1)
    painted: list[Tensor] = []
    decoder.vision.grid_norm.register_forward_pre_hook(
        lambda _, args: painted.append(args[0].detach())
    )
    base = torch.zeros(1, 20)
    changed = base.clone()
    changed[0, 2] = 1.0  # the second block holds numbers 2 and 3
    decoder(base)
    decoder(changed)
    difference = (painted[1] - painted[0]).abs().amax((0, 1, 2))
    assert difference.shape == (16,)
    assert (difference > 0).nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("shape", [(60, 64, 3), (32, 32, 3), (272, 64, 3)])
def test_impossible_image_sizes_are_named(shape: tuple[int, ...]) -> None:
    spec = Spec({"image": ArraySpec(shape, "uint8")}, ACTION)
    with pytest.raises(UserError, match=f"image size {shape[0]}x{shape[1]}.*size=64"):
        make_encoder(spec)


def test_decoders_whose_channels_do_not_split_into_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"depth 3: 4 . depth must be divisible by 8 blocks"):
        make_decoder(Spec(ARRAYS["image"], ACTION), depth=3)


def test_images_of_different_sizes_are_refused() -> None:
    arrays = {"a": ArraySpec((64, 64, 3), "uint8"), "b": ArraySpec((48, 64, 3), "uint8")}
    with pytest.raises(UserError, match="different sizes"):
        make_encoder(Spec(arrays, ACTION))


class TestOlderPapers:
    """The same frames with the vision, layers and distributions of PlaNet, Dreamers V1 and V2."""

    def parts(self) -> tuple[Spec, Encoder, Decoder]:
        torch.manual_seed(0)
        spec = Spec(ARRAYS["mixed"], ACTION)
        eyes = partial(StridedEncoder, depth=2, activation=nn.ELU)
        hand = partial(TransposedDecoder, features=28, depth=2, activation=nn.ELU)
        encoder = Encoder(spec, eyes, 1, 6, ELU, squash=same)
        return spec, encoder, Decoder(spec, 28, hand, 1, 6, ELU, UnitNormal)

    def test_encoder_reads_pixels_around_zero_and_vectors_as_they_are(self) -> None:
        spec, encoder, _ = self.parts()
        obs = observations(spec, 2, 3)
        tokens = encoder(obs)
        assert tokens.shape == (2, 3, encoder.size) == (2, 3, 6 + 64)
        joined = torch.cat([obs["depth"], obs["front"]], -1).flatten(0, 1)
        image = encoder.vision(joined.permute(0, 3, 1, 2) / 255 - 0.5).view(2, 3, -1)
        vector = encoder.mlp(obs["vector"])
        torch.testing.assert_close(tokens, torch.cat([vector, image], -1))

    def test_losses_are_half_the_squared_errors(self) -> None:
        spec, _, decoder = self.parts()
        obs = observations(spec, 2, 3)
        outputs = decoder(torch.randn(2, 3, 28))
        losses = decoder.losses(outputs, obs)
        assert losses.keys() == obs.keys()
        for key, loss in losses.items():
            target = obs[key] / 255 - 0.5 if spec.obs[key].is_image else obs[key]
            error = (outputs[key].mean - target).square().flatten(2).sum(-1)
            torch.testing.assert_close(loss, 0.5 * error)

    def test_pictures_are_in_0_to_1(self) -> None:
        _, _, decoder = self.parts()
        outputs = decoder(100 * torch.randn(1, 2, 28))
        for key in ("front", "depth"):
            assert outputs[key].pred().min() == 0
            assert outputs[key].pred().max() == 1
            assert outputs[key].mean.min() < -0.5
        assert torch.equal(outputs["vector"].pred(), outputs["vector"].mean)


def test_pixels_are_scaled_once() -> None:
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(pixels(image), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(pixels(pixels(image)), pixels(image))
