"""Image encoders and decoders of the four papers.

`StridedEncoder` and `TransposedDecoder` are those of the 2018 World Models, which PlaNet and
Dreamers V1 and V2 kept; `PooledEncoder` and `BlockDecoder` are DreamerV3's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.nets.distributions import MSE, CenteredImage
from zoo.nets.layers import (
    BlockLinear,
    Conv2d,
    Dense,
    GlorotLinear,
    ImageNormSiLU,
    Linear,
    RMSNormSiLU,
)

MULTIPLIERS = (2, 3, 4, 4)


def image_shape(spec: Spec) -> tuple[int, int, int]:
    """Height, width and joint number of channels of the images.

    Raises:
        UserError: images of different sizes.
    """
    sizes = {spec.obs[key].shape[:2] for key in spec.images}
    if len(sizes) > 1:
        raise UserError(f"images of different sizes {sorted(sizes)}: resize them to one size")
    height, width = sizes.pop()
    return height, width, sum(spec.obs[key].shape[2] for key in spec.images)


class PooledEncoder(nn.Module):
    """Four times convolution k5, 2x2 max-pooling, RMSNorm over channels, SiLU (DreamerV3).

    Args:
        shape: height, width, channels.
        depth: channels are depth * (2, 3, 4, 4).
    """

    def __init__(self, shape: tuple[int, int, int], depth: int) -> None:
        super().__init__()
        height, width = _grid(shape)
        stages = pairwise([shape[2], *(depth * m for m in MULTIPLIERS)])
        self.convs = nn.Sequential(
            *(nn.Sequential(Conv2d(a, b), nn.MaxPool2d(2), ImageNormSiLU(b)) for a, b in stages)
        )
        self.size = height * width * depth * MULTIPLIERS[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps pixels (N, C, H, W) around zero to tokens (N, size)."""
        return self.convs(x).movedim(1, -1).flatten(1)


class BlockDecoder(nn.Module):
    """From a spatial map to a sigmoid by nearest up-sampling and convolutions (DreamerV3).

    The map is the sum of a block-linear map of h and an MLP of z.

    Args:
        shape: height, width, channels.
        deter, latent: widths of h and of flattened z.
        depth: as for the encoder.
        units: half of the width of the MLP of z.
        blocks: blocks of the block-linear map.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        deter: int,
        latent: int,
        depth: int,
        units: int,
        blocks: int,
    ) -> None:
        super().__init__()
        if depth * MULTIPLIERS[-1] % blocks:
            raise UserError(f"depth {depth}: 4 * depth must be divisible by {blocks} blocks")
        self.deter, self.blocks = deter, blocks
        self.grid = (*_grid(shape), depth * MULTIPLIERS[-1])
        cells = self.grid[0] * self.grid[1] * self.grid[2]
        self.deter_map = BlockLinear(deter, cells, blocks)
        self.stoch_map = nn.Sequential(Dense(latent, 2 * units), Linear(2 * units, cells))
        self.grid_norm = RMSNormSiLU(self.grid[2])
        channels = [depth * m for m in reversed(MULTIPLIERS)]
        self.convs = nn.ModuleList(Conv2d(a, b) for a, b in pairwise(channels))
        self.norms = nn.ModuleList(ImageNormSiLU(c) for c in channels[1:])
        self.image_out = Conv2d(channels[-1], shape[2])

    def forward(self, features: Tensor) -> Tensor:
        """Maps features [h, z] (N, F) to pixels (N, C, H, W) in [0, 1]."""
        height, width, channels = self.grid
        deter, stoch = features.split([self.deter, features.shape[-1] - self.deter], -1)
        # Each block of h paints its own group of channels.
        x = self.deter_map(deter).view(-1, self.blocks, height, width, channels // self.blocks)
        x = x.permute(0, 2, 3, 1, 4).reshape(-1, height, width, channels)
        x = x + self.stoch_map(stoch).view(-1, height, width, channels)
        x = self.grid_norm(x).movedim(-1, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(F.interpolate(x, scale_factor=2.0)))
        return torch.sigmoid(self.image_out(F.interpolate(x, scale_factor=2.0)).float())

    output = MSE


class StridedEncoder(nn.Module):
    """Four convolutions k4 s2 without padding: depth * (1, 2, 4, 8) channels, 64x64 to 2x2.

    Args:
        shape: height, width, channels; 64 x 64.
        depth: channels of the first layer (32; Dreamer V2: 48).
        activation: after each convolution.
    """

    def __init__(
        self, shape: tuple[int, int, int], depth: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        _require_64(shape)
        stages = pairwise([shape[2], *(depth * m for m in (1, 2, 4, 8))])
        layers = ((_glorot(nn.Conv2d(a, b, 4, 2)), activation()) for a, b in stages)
        self.convs = nn.Sequential(*(module for pair in layers for module in pair))
        self.size = 32 * depth

    def forward(self, x: Tensor) -> Tensor:
        """Maps pixels (N, C, 64, 64) around zero to tokens (N, size)."""
        return self.convs(x).flatten(1)


class TransposedDecoder(nn.Module):
    """A dense layer, then transposed convolutions k 5, 5, 6, 6 with stride 2, 1x1 to 64x64.

    Args:
        shape: height, width, channels; 64 x 64.
        features: width of [h, z].
        depth: channels are depth * (32, 4, 2, 1).
        activation: after each transposed convolution but the last; there is none after the
            dense layer.
    """

    def __init__(
        self, shape: tuple[int, int, int], features: int, depth: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        _require_64(shape)
        self.dense = GlorotLinear(features, 32 * depth)
        channels = [32 * depth, 4 * depth, 2 * depth, depth, shape[2]]
        layers: list[nn.Module] = []
        for (a, b), kernel in zip(pairwise(channels), (5, 5, 6, 6), strict=True):
            layers += [_glorot(nn.ConvTranspose2d(a, b, kernel, 2)), activation()]
        self.convs = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (N, F) to pixels (N, C, 64, 64) around zero."""
        out: Tensor = self.convs(self.dense(features)[:, :, None, None])
        return out

    output = CenteredImage


def _grid(shape: tuple[int, int, int]) -> tuple[int, int]:
    """The image size, halved four times."""
    height, width, _ = shape
    factor = 2 ** len(MULTIPLIERS)
    for side in (height, width):
        if side % factor or not 3 <= side // factor <= 16:
            raise UserError(
                f"image size {height}x{width}: sides must be multiples of {factor} from "
                f"{3 * factor} to {16 * factor}; set size=64 on the datamodule"
            )
    return height // factor, width // factor


def _require_64(shape: tuple[int, int, int]) -> None:
    if shape[:2] != (64, 64):
        raise UserError(
            f"image size {shape[0]}x{shape[1]}: this model reads 64x64; set size=64 on the "
            "datamodule"
        )


def _glorot(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
