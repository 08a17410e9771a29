"""Image encoders: a picture to one vector that still knows where things are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError

CHANNELS = (16, 32, 32)
ENCODERS = ("conv", "impala", "keypoints")
SHARPNESS = 5.0  # of keypoints at first: outputs of fresh convolutions differ by tenths
LEAST_SIDE = 8  # three times halved, one pixel is left


class Encoder(nn.Module):
    """Standardised pixels through convolutions, flattened, to a linear map.

    Features are not averaged over places, for a latent has to tell where the agent is.

    Args:
        kind: one of `ENCODERS`.
        shape: height, width and channels of an image.
        latent: D.
        mean, std: by which pixels in [0, 1] are standardised, one for each channel.

    Raises:
        UserError: images that are too small, or not one mean and std for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int, int],
        latent: int,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        height, width, channels = shape
        if min(height, width) < LEAST_SIDE:
            raise UserError(
                f"image size {height}x{width}: sides must be at least {LEAST_SIDE} pixels; set "
                "size on the datamodule"
            )
        for name, given in (("pixel_mean", mean), ("pixel_std", std)):
            if len(given) not in (0, channels):
                raise UserError(
                    f"{name} has {len(given)} numbers, but images have {channels} channels: give "
                    "one for each"
                )
        if any(value <= 0 for value in std):
            raise UserError(f"pixel_std must be above 0, got {list(std)}")
        scale = tuple(mean) or (0.0,) * channels, tuple(std) or (1.0,) * channels
        self.register_buffer("mean", torch.tensor(scale[0]), persistent=False)
        self.register_buffer("std", torch.tensor(scale[1]), persistent=False)
        stacks = {"conv": conv_stack, "impala": impala_stack, "keypoints": keypoint_stack}
        self.convs = stacks[kind](channels)
        with torch.no_grad():
            size = self.convs(torch.zeros(1, channels, height, width)).numel()
        self.linear = nn.Linear(size, latent)

    def forward(self, image: Tensor) -> Tensor:
        """Maps uint8 images (..., H, W, C), or floats in [0, 1], to vectors (..., D)."""
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image
        pixels = (pixels - self.mean) / self.std
        flat = pixels.reshape(-1, *image.shape[-3:]).movedim(-1, 1)
        out: Tensor = self.linear(self.convs(flat).flatten(1))
        return out.reshape(*image.shape[:-3], -1)


def conv_stack(channels: int) -> nn.Sequential:
    """Three convolutions of stride 2, with ReLU."""
    layers: list[nn.Module] = []
    for kernel, (a, b) in zip((5, 3, 3), pairwise([channels, *CHANNELS]), strict=True):
        layers += [nn.Conv2d(a, b, kernel, 2, kernel // 2), nn.ReLU()]
    return nn.Sequential(*layers)


def impala_stack(channels: int) -> nn.Sequential:
    """IMPALA's network (Espeholt et al., 2018, figure 3) with EB-JEPA's residual blocks.

    Each of three stages is a convolution, max-pooling by two, and two residual blocks.
    """
    layers: list[nn.Module] = []
    for a, b in pairwise([channels, *CHANNELS]):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
        layers += [ResidualBlock(b), ResidualBlock(b)]
    return nn.Sequential(*layers)


def keypoint_stack(channels: int) -> nn.Sequential:
    """Two convolutions of stride 2, and where each of their channels looks."""
    first, second = CHANNELS[:2]
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, 2, 1),
        SpatialSoftmax(second),
    )


class SpatialSoftmax(nn.Module):
    """Keypoints: each channel's place, as the mean under the softmax of its values (Levine et al.,
    2016; Finn et al., 2016), and the mean of its values there (ours): a door is also a contrast.

    Args:
        channels: C; each has a temperature that is learnt.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.full((channels, 1, 1), SHARPNESS).log())

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, 3 C): columns, rows (each in [-1, 1]) and values."""
        seen = (x * self.sharpness.exp()).flatten(2).softmax(-1).unflatten(2, x.shape[2:])
        across, down = (torch.linspace(-1, 1, side, device=x.device) for side in x.shape[:1:-1])
        columns, rows = seen.sum(2) @ across, seen.sum(3) @ down
        return torch.cat([columns, rows, (seen * x).sum((2, 3))], 1)


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))) of 3 x 3 convolutions (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return F.relu(x + self.second(F.relu(self.first(x))))
