"""The latent action model: what was done between two frames, found without labels (Genie, 2.1).

An encoder reads the frames up to the next one and says one vector for each step, which becomes one
of few codes. A decoder sees only the past frames and the codes, and has to predict the next frame:
so the codes carry what the past does not tell. At inference only the codebook is kept, and the
encoder to label video.

Action t of a clip lies between its frames t and t + 1: T frames have T - 1 of them. In shapes, B is
the number of clips, A the length of an action's vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.genie.patches import Patches
from zoo.genie.quantizers import Quantized, Quantizer
from zoo.genie.tokenizer import GREY
from zoo.nets.st_transformer import OUT_SCALE, Shape, STTransformer, draw_weights


class NextFrames(NamedTuple):
    """Predicted frames 2 to T, (B, T - 1, H, W, C), and the actions (B, T - 1) they were told."""

    frames: Tensor
    actions: Quantized


class Reader:
    """Frames (B, T, H, W, C) in [0, 1] as a transformer reads them: patches (B, T, P, values).

    Args:
        patches: how frames are cut.
        changes: beside each patch stands how it differs from the frame before (ours), 0 in the
            first. Small transformers take far longer to find out that they should subtract.
    """

    def __init__(self, patches: Patches, changes: bool = False) -> None:
        self.patches, self.changes = patches, changes
        self.values = patches.values * (1 + changes)

    def __call__(self, frames: Tensor) -> Tensor:
        """Patches of frames."""
        cut = self.patches.cut(frames) - GREY
        if not self.changes:
            return cut
        change = F.pad(cut[:, 1:] - cut[:, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat([cut, change], -1)


class ActionEncoder(nn.Module):
    """A causal ST-transformer over pixels; step t is read where frame t + 1 stands.

    The paper does not say how the patches of a frame become one vector: here it is their mean.

    Args:
        read: how it sees frames.
        shape: sizes of the transformer.
        frames: most frames of a clip.
        width: A.
        relative: as for `STTransformer`.
        alone: each step is read off frame t + 1 and its change alone (ours), so that the first step
            of a clip is read as all others are; and if `relative`, without positions in space, or
            an action would soon be told by where it leads (a place modulo three, say).
    """

    def __init__(
        self,
        read: Reader,
        shape: Shape,
        frames: int,
        width: int,
        relative: bool = False,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.read, self.alone = read, alone
        self.embed = nn.Linear(read.values, shape.width)
        self.transformer = STTransformer(
            shape, read.patches.grid, frames, relative=relative, placed=not (alone and relative)
        )
        self.out = nn.Linear(shape.width, width)
        for linear in (self.embed, self.out):
            draw_weights(linear)

    def forward(self, frames: Tensor) -> Tensor:
        """Vectors (B, T - 1, A) between frames (B, T, H, W, C)."""
        x = self.embed(self.read(frames))
        if self.alone:
            x = x[:, 1:]
            hidden = self.transformer(x.flatten(0, 1)[:, None]).view_as(x)
        else:
            hidden = self.transformer(x)[:, 1:]
        out: Tensor = self.out(hidden.mean(2))
        return out


class ActionDecoder(nn.Module):
    """A causal ST-transformer over the past frames; the action is added to all patches of one."""

    def __init__(
        self, read: Reader, shape: Shape, frames: int, width: int, relative: bool = False
    ) -> None:
        super().__init__()
        self.read, self.patches = read, read.patches
        self.embed = nn.Linear(read.values, shape.width)
        self.act = nn.Linear(width, shape.width)
        self.transformer = STTransformer(shape, self.patches.grid, frames, relative=relative)
        self.out = nn.Linear(shape.width, self.patches.values)
        for linear in (self.embed, self.act):
            draw_weights(linear)
        draw_weights(self.out, OUT_SCALE)

    def forward(self, frames: Tensor, actions: Tensor) -> Tensor:
        """What follows each of the frames (B, T, H, W, C) after the actions (B, T, A)."""
        x = self.embed(self.read(frames)) + self.act(actions)[:, :, None]
        return self.patches.join(self.out(self.transformer(x)))


class ConvActionEncoder(nn.Module):
    """The same from three frames at a time by convolutions (ours): learns within seconds on a CPU.

    It sees the frame before (not if `alone`), the frame, the next frame and how that differs.
    """

    def __init__(
        self, image: tuple[int, int, int], channels: int, width: int, alone: bool = False
    ) -> None:
        super().__init__()
        height, across, colours = image
        self.alone = alone
        self.body = nn.Sequential(
            nn.Conv2d((4 - alone) * colours, channels // 2, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        cells = -(-height // 8) * -(-across // 8)
        self.out = nn.Linear(channels * cells, width)
        _draw_convolutions(self)
        draw_weights(self.out)

    def forward(self, frames: Tensor) -> Tensor:
        """Vectors (B, T - 1, A) between frames (B, T, H, W, C)."""
        now, following = frames[:, :-1], frames[:, 1:]
        seen = [now, following, following - now]
        stack = torch.cat(seen if self.alone else [_before(now), *seen], -1)
        hidden = self.body(stack.flatten(0, 1).movedim(-1, 1))
        out: Tensor = self.out(hidden).unflatten(0, now.shape[:2])
        return out


class ConvActionDecoder(nn.Module):
    """What follows two frames, by convolutions (ours)."""

    def __init__(self, image: tuple[int, int, int], channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(2 * image[2], channels // 2, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, 2, 1),
        )
        self.act = nn.Linear(width, channels)
        self.up = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(channels, 16 * image[2], 3, 1, 1),
            nn.PixelShuffle(4),
        )
        _draw_convolutions(self)
        draw_weights(self.act)
        self.up[-2].weight.data.mul_(OUT_SCALE)  # type: ignore[operator]

    def forward(self, frames: Tensor, actions: Tensor) -> Tensor:
        """What follows each of the frames (B, T, H, W, C) after the actions (B, T, A)."""
        stack = torch.cat([_before(frames), frames], -1)
        hidden = self.down(stack.flatten(0, 1).movedim(-1, 1))
        hidden = hidden + self.act(actions).flatten(0, 1)[..., None, None]
        images = self.up(hidden)[..., : frames.shape[2], : frames.shape[3]]
        out: Tensor = images.movedim(1, -1).unflatten(0, frames.shape[:2])
        return out


class LatentActionModel(nn.Module):
    """Encoder, quantizer and decoder.

    Args:
        encoder: maps frames (B, T, H, W, C) to vectors (B, T - 1, A).
        quantizer: of these.
        decoder: maps frames (B, T, H, W, C) and vectors (B, T, A) to frames.
        residual: the decoder says how the frame changes (ours), rather than the next frame through
            a sigmoid.
    """

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.residual = residual

    def forward(self, frames: Tensor) -> NextFrames:
        """Predicts all next frames of clips (B, T, H, W, C) in [0, 1]."""
        actions = self.infer(frames)
        past = frames[:, :-1]
        out = self.decoder(past, actions.vectors)
        return NextFrames(past + out if self.residual else out.sigmoid(), actions)

    def infer(self, frames: Tensor) -> Quantized:
        """The actions (B, T - 1) between frames (B, T, H, W, C) in [0, 1]."""
        actions: Quantized = self.quantizer(self.encoder(frames))
        return actions

    def codes_to(self, frames: Tensor) -> Tensor:
        """The codes (B, T) that led to each of the frames; 0 for the first."""
        if frames.shape[1] == 1:
            return torch.zeros(frames.shape[:2], dtype=torch.int64, device=frames.device)
        return F.pad(self.infer(frames).codes, (1, 0))

    def vectors_to(self, frames: Tensor) -> Tensor:
        """The vectors (B, T, A) that led to each of the frames; zeros for the first."""
        if frames.shape[1] == 1:
            return frames.new_zeros(len(frames), 1, self.quantizer.width)
        return F.pad(self.infer(frames).vectors, (0, 0, 1, 0))


def st_action_model(
    image: tuple[int, int, int],
    patch: int,
    encoder: Shape,
    decoder: Shape,
    frames: int,
    quantizer: Quantizer,
    residual: bool = False,
    changes: bool = False,
    relative: bool = False,
    alone: bool = False,
) -> LatentActionModel:
    """The paper's, of ST-transformers; `frames` is the most a clip has."""
    read = Reader(Patches(image, patch), changes)
    return LatentActionModel(
        ActionEncoder(read, encoder, frames, quantizer.width, relative, alone),
        quantizer,
        ActionDecoder(read, decoder, frames, quantizer.width, relative),
        residual,
    )


def conv_action_model(
    image: tuple[int, int, int],
    channels: int,
    quantizer: Quantizer,
    residual: bool = True,
    alone: bool = False,
) -> LatentActionModel:
    """The same of convolutions (ours), the widest of which have so many channels."""
    return LatentActionModel(
        ConvActionEncoder(image, channels, quantizer.width, alone),
        quantizer,
        ConvActionDecoder(image, channels, quantizer.width),
        residual,
    )


def _draw_convolutions(module: nn.Module) -> None:
    """He et al., 2015: PyTorch's own start lets the difference of two frames fade out."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]


def _before(frames: Tensor) -> Tensor:
    """The frame before each; the first is its own."""
    return torch.cat([frames[:, :1], frames[:, :-1]], 1)
