"""Encoder and decoder for any mix of images and vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from datamodules.spec import Spec
from zoo.nets.distributions import MSE, SymlogMSE, symlog
from zoo.nets.layers import MLP, RMS_SILU, Style
from zoo.rssm.vision import image_shape

ImageShape = tuple[int, int, int]


def pixels(image: Tensor) -> Tensor:
    """Images in [0, 1]: uint8 are divided by 255, floats are taken as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def same(x: Tensor) -> Tensor:
    """x itself: vectors that are read as they are."""
    return x


class Encoder(nn.Module):
    """Observations to tokens: an MLP for vectors, convolutions for images minus 0.5.

    Args:
        spec: what the observations look like.
        vision: makes the image encoder from height, width and channels.
        layers, units: the MLP of the vectors.
        style: of the MLP.
        squash: applied to vectors before the MLP.
    """

    def __init__(
        self,
        spec: Spec,
        vision: Callable[[ImageShape], nn.Module],
        layers: int,
        units: int,
        style: Style = RMS_SILU,
        squash: Callable[[Tensor], Tensor] = symlog,
    ) -> None:
        super().__init__()
        self.images, self.vectors, self.squash = spec.images, spec.vectors, squash
        self.size = 0
        if self.vectors:
            self.mlp = MLP(sum(spec.obs[k].size for k in self.vectors), layers, units, style)
            self.size += units
        if self.images:
            self.vision = vision(image_shape(spec))
            self.size += int(self.vision.size)  # type: ignore[arg-type]

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Maps {key: (B, T, ...)} to tokens (B, T, E)."""
        tokens = []
        if self.vectors:
            flat = [obs[k].float().reshape(*obs[k].shape[:2], -1) for k in self.vectors]
            tokens.append(self.mlp(self.squash(torch.cat(flat, -1))))
        if self.images:
            image = torch.cat([obs[k] for k in self.images], -1)
            x = self.vision(pixels(image.flatten(0, 1).movedim(-1, 1)) - 0.5)
            tokens.append(x.unflatten(0, image.shape[:2]))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Features to predicted observations: an MLP for vectors, a network for images.

    Args:
        spec: what the observations look like.
        features: width of [h, z].
        vision: makes the image decoder from height, width and channels; its attribute `output`
            is the distribution over an image.
        layers, units: the MLP of the vectors.
        style: of the MLP.
        output: distribution over a vector, from its mean and its number of axes.
    """

    def __init__(
        self,
        spec: Spec,
        features: int,
        vision: Callable[[ImageShape], nn.Module],
        layers: int,
        units: int,
        style: Style = RMS_SILU,
        output: type[MSE] = SymlogMSE,
    ) -> None:
        super().__init__()
        self.spec, self.images, self.vectors, self.output = spec, spec.images, spec.vectors, output
        if self.vectors:
            self.mlp = MLP(features, layers, units, style)
            self.vector_out = nn.ModuleDict(
                {key: style.linear(units, spec.obs[key].size) for key in self.vectors}
            )
        if self.images:
            self.vision = vision(image_shape(spec))

    def forward(self, features: Tensor) -> dict[str, MSE]:
        """Maps features [h, z] (B, T, F) to one output object per observation key.

        Image predictions are in [0, 1], their losses summed over H, W and C.
        """
        outputs: dict[str, MSE] = {}
        if self.vectors:
            x = self.mlp(features)
            for key in self.vectors:
                shape = self.spec.obs[key].shape
                mean = self.vector_out[key](x).unflatten(-1, shape or (1,))
                outputs[key] = self.output(mean if shape else mean.squeeze(-1), len(shape))
        if self.images:
            image = self.vision(features.flatten(0, -2)).movedim(1, -1)
            image = image.unflatten(0, features.shape[:-1])
            sizes = [self.spec.obs[k].shape[-1] for k in self.images]
            image_output: type[MSE] = self.vision.output  # type: ignore[assignment]
            for key, part in zip(self.images, image.split(sizes, -1), strict=True):
                outputs[key] = image_output(part, 3)
        return outputs

    def losses(self, outputs: Mapping[str, MSE], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruction loss (B, T) of each key; images of `obs` are uint8, or in [0, 1]."""
        return {
            key: out.loss(pixels(obs[key]) if key in self.images else obs[key].float())
            for key, out in outputs.items()
        }
