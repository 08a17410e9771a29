"""The convolutional bricks of DIAMOND, and the U-Net of its denoiser.

Residual blocks are conditioned by adaptive group normalisation: scale and shift of each
normalisation are linear in an embedding of noise level and actions. All these maps of a network are
one matrix product here (`Conditioning`), of which each block takes its part.

Letters of shapes: N batch, C channels, H, W height and width, E width of the conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_SIZE = 32  # channels that are normalised together
HEAD_SIZE = 8  # channels of an attention head


class GroupNorm(nn.GroupNorm):
    """Group normalisation with groups of 32 channels, or a single smaller one."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(1, channels // GROUP_SIZE), channels, eps=1e-5)


class ActionEmbedding(nn.Linear):
    """A linear map of encoded actions; of one-hot vectors it is `nn.Embedding`, and starts so."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__(actions, width, bias=False)

    def reset_parameters(self) -> None:
        """Draws new weights."""
        nn.init.normal_(self.weight)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with weights and biases of zero, so that what it is part of starts without it."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it (rounded up) with stride 2."""
    return nn.Conv2d(channels, out, 3, stride, padding=1)


def cast(x: Tensor, layer: nn.Module) -> Tensor:
    """x in the precision of the layer's weights, which differs where a model is all bfloat16."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return x.to(weight.dtype)


def modulate(x: Tensor, film: Tensor) -> Tensor:
    """Group-normalises x (N, C, H, W), then x * (1 + scale) + shift with film (N, 2C, 1, 1)."""
    channels = x.shape[1]
    scale, shift = film.chunk(2, 1)
    return torch.addcmul(shift, F.group_norm(x, max(1, channels // GROUP_SIZE)), 1 + scale)


def cut(x: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) with patches of side x side pixels as channels, (N, C side^2, ...).

    They are filled up with zeros at the right and bottom.
    """
    if side == 1:
        return x
    height, width = x.shape[-2:]
    return F.pixel_unshuffle(F.pad(x, (0, -width % side, 0, -height % side)), side)


class SelfAttention(nn.Module):
    """Attention of every pixel to every pixel, added to the input; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // HEAD_SIZE)
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).view(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(mixed.reshape(n, c, h, w))


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input; perhaps with attention behind.

    Its second convolution starts at zero, so that the block starts as its (projected) input.
    """

    def __init__(self, channels: int, out: int, attention: bool = False) -> None:
        super().__init__()
        self.film_sizes = (2 * channels, 2 * out)
        self.project = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.conv1 = conv3x3(channels, out)
        self.conv2 = zero_init(conv3x3(out, out))
        self.attention = SelfAttention(out) if attention else nn.Identity()

    def forward(self, x: Tensor, films: Iterator[Tensor]) -> Tensor:
        """Maps (N, C, H, W) to (N, out, H, W); takes two scales-and-shifts from `films`."""
        hidden = self.conv1(F.silu(modulate(x, next(films))))
        hidden = self.conv2(F.silu(modulate(hidden, next(films))))
        attended: Tensor = self.attention(self.project(x) + hidden)
        return attended


class Conditioning(nn.Module):
    """Scales and shifts of all blocks of a network as one linear map of the embedding.

    Args:
        width: of the embedding, E.
        blocks: in the order in which the network runs them.
    """

    def __init__(self, width: int, blocks: Iterable[ResBlock]) -> None:
        super().__init__()
        self.sizes = [size for block in blocks for size in block.film_sizes]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, embedding: Tensor) -> Iterator[Tensor]:
        """The parts (N, 2C, 1, 1) for embedding (N, E), in order."""
        films: Tensor = self.linear(embedding)
        return iter(films[:, :, None, None].split(self.sizes, 1))


def downsample(channels: int, out: int) -> nn.Conv2d:
    """Halves height and width."""
    layer = conv3x3(channels, out, stride=2)
    nn.init.orthogonal_(layer.weight)
    return layer


class UNet(nn.Module):
    """Down over levels of halved size and up again, each level joined with what it was going down.

    Any height and width will do: images are padded at the right and bottom, and cropped again.

    Args:
        channels: of each level, from the finest.
        depths: residual blocks of each level; going up it is one more.
        width: of the conditioning, E.
        attention: whether the two blocks in the middle have attention.
    """

    def __init__(
        self, channels: Sequence[int], depths: Sequence[int], width: int, attention: bool = True
    ) -> None:
        super().__init__()
        if len(channels) != len(depths):
            raise ValueError(f"{len(channels)} levels of channels, {len(depths)} of depths")
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.downsamples, self.upsamples = nn.ModuleList(), nn.ModuleList()
        skips = []
        before = channels[0]
        for level, (here, depth) in enumerate(zip(channels, depths, strict=True)):
            if level:
                self.downsamples.append(downsample(before, before))
            blocks = nn.ModuleList()
            inputs = [before]
            for _ in range(depth):
                blocks.append(ResBlock(before, here))
                before = here
                inputs.append(here)
            self.down.append(blocks)
            skips.append(inputs)
        self.middle = nn.ModuleList(ResBlock(before, before, attention) for _ in range(2))
        for level in reversed(range(len(channels))):
            if level < len(channels) - 1:
                self.upsamples.append(conv3x3(before, before))
            blocks = nn.ModuleList()
            for skip in reversed(skips[level]):
                blocks.append(ResBlock(before + skip, channels[level]))
                before = channels[level]
            self.up.append(blocks)
        self.conditioning = Conditioning(width, self._blocks())

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps (N, C, H, W), given embeddings (N, E), to the same shape."""
        height, width = x.shape[-2:]
        multiple = 2 ** len(self.downsamples)
        below, right = -height % multiple, -width % multiple
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        films = self.conditioning(embedding)
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.downsamples[level - 1](x)
            skips.append(x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, films)
                skips.append(x)
        for block in self.middle:
            x = block(x, films)
        for level, blocks in enumerate(self.up):
            if level:
                x = self.upsamples[level - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            for block in blocks:  # type: ignore[attr-defined]
                x = block(torch.cat([x, skips.pop()], 1), films)
        return x[..., :height, :width]

    def _blocks(self) -> list[ResBlock]:
        groups: list[Iterable[nn.Module]] = [*self.down, self.middle, *self.up]
        return [block for blocks in groups for block in blocks if isinstance(block, ResBlock)]


class FourierFeatures(nn.Module):
    """Sines and cosines of fixed random frequencies of a number (Tancik et al. 2020)."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N,) to (N, width)."""
        angles = 2 * math.pi * x[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class FrameNetwork(nn.Module):
    """The raw network F: the noisy next frame and past frames in, a frame out.

    Args:
        image: channels of a frame.
        past: number of past frames and actions.
        actions: length of an encoded action.
        channels, depths, attention: of the `UNet`.
        width: of the conditioning, E.
        past_noise: whether past frames are noised, too, and their level is to be embedded.
        patch: side of the patches of pixels that the finest level has as channels (ours).
    """

    def __init__(
        self,
        image: int,
        past: int,
        actions: int,
        channels: Sequence[int],
        depths: Sequence[int],
        width: int,
        attention: bool = True,
        past_noise: bool = False,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.noise = FourierFeatures(width)
        self.past_noise = FourierFeatures(width) if past_noise else None
        self.action = ActionEmbedding(actions, width // past)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.conv_in = conv3x3((past + 1) * image * patch**2, channels[0])
        self.unet = UNet(channels, depths, width, attention)
        self.norm_out = GroupNorm(channels[0])
        self.conv_out = zero_init(conv3x3(channels[0], image * patch**2))

    def embed_past(self, action: Tensor, past_noise: Tensor | None = None) -> Tensor:
        """The part of the embedding (N, E) that is the same at all noise levels.

        Args:
            action: (N, L, A) encoded actions of the past frames.
            past_noise: (N,) c_noise of the past frames, where they are noised.
        """
        embedding: Tensor = self.action(cast(action, self.action)).flatten(1)
        if self.past_noise is not None:
            assert past_noise is not None
            embedding = embedding + self.past_noise(past_noise)
        return embedding

    def forward(self, noisy: Tensor, noise: Tensor, past: Tensor, past_embedding: Tensor) -> Tensor:
        """A frame (N, C, H, W).

        Args:
            noisy: (N, C, H, W) the scaled noisy frame.
            noise: (N,) c_noise of its noise level.
            past: (N, L * C, H, W) scaled past frames.
            past_embedding: (N, E), see `embed_past`.
        """
        embedding = self.embed(cast(self.noise(noise) + past_embedding, self.embed[0]))
        height, width = noisy.shape[-2:]
        x = self.conv_in(cast(cut(torch.cat([past, noisy], 1), self.patch), self.conv_in))
        x = self.unet(x, embedding)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(out, self.patch)[..., :height, :width] if self.patch > 1 else out
