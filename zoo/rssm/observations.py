"""Encoder and decoder of DreamerV3 for any mix of images and vectors."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.nets.distributions import MSE, SymlogMSE, symlog
from zoo.nets.layers import MLP, BlockLinear, Conv2d, Dense, ImageNormSiLU, Linear, RMSNormSiLU

MULTIPLIERS = (2, 3, 4, 4)


def _image_size(spec: Spec) -> tuple[int, int]:
    """Height and width of the images, which must agree and shrink to 3..16 by four halvings."""
    sizes = {spec.obs[key].shape[:2] for key in spec.images}
    if len(sizes) > 1:
        raise UserError(f"images of different sizes {sorted(sizes)}: resize them to one size")
    height, width = sizes.pop()
    factor = 2 ** len(MULTIPLIERS)
    for side in (height, width):
        if side % factor or not 3 <= side // factor <= 16:
            raise UserError(
                f"image size {height}x{width}: sides must be multiples of {factor} from "
                f"{3 * factor} to {16 * factor}; set size=64 on the datamodule"
            )
    return height, width


class Encoder(nn.Module):
    """Observations to tokens: symlog and an MLP for vectors, convolutions for images.

    Images / 255 - 0.5 pass four times convolution k5, 2x2 max-pooling, RMSNorm over channels, SiLU.

    Args:
        spec: what the observations look like.
        depth: channels are depth * (2, 3, 4, 4).
        layers, units: the MLP of the vectors.
    """

    def __init__(self, spec: Spec, depth: int, layers: int, units: int) -> None:
        super().__init__()
        self.images, self.vectors = spec.images, spec.vectors
        self.size = 0
        if self.vectors:
            self.mlp = MLP(sum(spec.obs[k].size for k in self.vectors), layers, units)
            self.size += units
        if self.images:
            height, width = _image_size(spec)
            channels = [sum(spec.obs[k].shape[-1] for k in self.images)]
            channels += [depth * m for m in MULTIPLIERS]
            stages = pairwise(channels)
            self.convs = nn.Sequential(
                *(nn.Sequential(Conv2d(a, b), nn.MaxPool2d(2), ImageNormSiLU(b)) for a, b in stages)
            )
            self.size += channels[-1] * (height // 16) * (width // 16)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Maps {key: (B, T, ...)} to tokens (B, T, E)."""
        tokens = []
        if self.vectors:
            flat = [obs[k].float().reshape(*obs[k].shape[:2], -1) for k in self.vectors]
            tokens.append(self.mlp(symlog(torch.cat(flat, -1))))
        if self.images:
            pixels = torch.cat([obs[k] for k in self.images], -1)
            x = pixels.flatten(0, 1).movedim(-1, 1).float() / 255 - 0.5
            x = self.convs(x).movedim(1, -1).flatten(1)
            tokens.append(x.unflatten(0, pixels.shape[:2]))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Latent states to predicted observations.

    Images grow from a spatial map, which is the sum of a block-linear map of h and an MLP of z,
    by nearest up-sampling and convolutions, to a sigmoid; vectors come from an MLP in symlog space.

    Args:
        spec: what the observations look like.
        deter: width of h.
        stoch: width of flattened z.
        depth, layers, units: as for the encoder.
        blocks: blocks of the block-linear map.
    """

    def __init__(
        self,
        spec: Spec,
        deter: int,
        stoch: int,
        depth: int,
        layers: int,
        units: int,
        blocks: int = 8,
    ) -> None:
        super().__init__()
        self.spec, self.images, self.vectors = spec, spec.images, spec.vectors
        self.deter = deter
        if self.vectors:
            self.mlp = MLP(deter + stoch, layers, units)
            self.vector_out = nn.ModuleDict(
                {key: Linear(units, spec.obs[key].size) for key in self.vectors}
            )
        if self.images:
            height, width = _image_size(spec)
            self.blocks = blocks
            self.grid = (height // 16, width // 16, depth * MULTIPLIERS[-1])
            cells = self.grid[0] * self.grid[1] * self.grid[2]
            self.deter_map = BlockLinear(deter, cells, blocks)
            self.stoch_map = nn.Sequential(Dense(stoch, 2 * units), Linear(2 * units, cells))
            self.grid_norm = RMSNormSiLU(self.grid[2])
            channels = [depth * m for m in reversed(MULTIPLIERS)]
            self.convs = nn.ModuleList(Conv2d(a, b) for a, b in pairwise(channels))
            self.norms = nn.ModuleList(ImageNormSiLU(c) for c in channels[1:])
            self.image_out = Conv2d(channels[-1], sum(spec.obs[k].shape[-1] for k in self.images))

    def forward(self, features: Tensor) -> dict[str, MSE]:
        """Maps features [h, z] (B, T, D + S * C) to one output object per observation key.

        Images are in [0, 1], their losses summed over H, W and C.
        """
        outputs: dict[str, MSE] = {}
        if self.vectors:
            x = self.mlp(features)
            for key in self.vectors:
                shape = self.spec.obs[key].shape
                mean = self.vector_out[key](x).unflatten(-1, shape or (1,))
                outputs[key] = SymlogMSE(mean if shape else mean.squeeze(-1), len(shape))
        if self.images:
            image = self._draw(features.flatten(0, -2)).movedim(1, -1)
            image = torch.sigmoid(image.float()).unflatten(0, features.shape[:-1])
            sizes = [self.spec.obs[k].shape[-1] for k in self.images]
            for key, part in zip(self.images, image.split(sizes, -1), strict=True):
                outputs[key] = MSE(part, 3)
        return outputs

    def losses(self, outputs: Mapping[str, MSE], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruction loss (B, T) of each key; images of `obs` are uint8."""
        unit = {key: 255.0 if key in self.images else 1.0 for key in outputs}
        return {key: out.loss(obs[key].float() / unit[key]) for key, out in outputs.items()}

    def _draw(self, features: Tensor) -> Tensor:
        height, width, channels = self.grid
        deter, stoch = features.split([self.deter, features.shape[-1] - self.deter], -1)
        # Each block of h paints its own group of channels.
        x = self.deter_map(deter).view(-1, self.blocks, height, width, channels // self.blocks)
        x = x.permute(0, 2, 3, 1, 4).reshape(-1, height, width, channels)
        x = x + self.stoch_map(stoch).view(-1, height, width, channels)
        x = self.grid_norm(x).movedim(-1, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(F.interpolate(x, scale_factor=2.0)))
        return self.image_out(F.interpolate(x, scale_factor=2.0))
