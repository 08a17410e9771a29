"""A transformer over video with attention along space and along time in turn (ST-transformer).

A block is spatial attention among the tokens of each frame, temporal attention of each token to
those at the same place in earlier frames, and one MLP after both, each behind a LayerNorm (Genie,
Bruce et al., 2024, section 2). Its cost grows linearly with the frames but for the temporal part.
Queries and keys are normalised (Dehghani et al., 2023). In shapes, B is the number of clips, T of
their frames, P of the tokens of a frame, D the width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.transformer import causal_mask
from zoo.nets.vit import Grid, coordinates

OUT_SCALE = 0.1  # of the first outputs of a whole network
POSITION_STD = 0.3  # of positions in time, beside tokens of about unit variance
SPACE_STD = 0.7  # of positions in space
OFFSET_SCALE = 5.0  # offsets are learnt so many times as fast as other weights


class Shape(NamedTuple):
    """How large a transformer is.

    Attributes:
        layers: number of blocks.
        width: D.
        heads: of each attention.
        head: features of a head; heads need not share the width.
        hidden: width of the MLP's hidden layer.
    """

    layers: int
    width: int
    heads: int
    head: int
    hidden: int


class Memory(NamedTuple):
    """What later frames see of earlier ones.

    Attributes:
        keys, values: of each block's temporal attention, (B P, heads, T, head).
        offsets: what each block's `Offsets` say, or None.
        valid: (B, T) bool, which frames are no padding.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    offsets: tuple[Tensor | None, ...]
    valid: Tensor


class Attention(nn.Module):
    """Self-attention of sequences (N, L, D) behind a LayerNorm, without the residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, inner = shape.heads, shape.heads * shape.head
        self.norm = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * inner)
        self.query_norm = nn.LayerNorm(shape.head, bias=False)
        self.key_norm = nn.LayerNorm(shape.head, bias=False)
        self.project = nn.Linear(inner, shape.width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (N, L, D), and the keys and values (N, heads, past + L, head).

        Args:
            x: tokens.
            mask: (N, 1, L, past + L), or what broadcasts with the heads to it, added to the logits.
            causal: without a mask, whether tokens see only themselves and those before.
            past: keys and values of tokens before these.
        """
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.query_norm(query), self.key_norm(key).to(value.dtype)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        if mask is not None:
            mask = mask.to(value.dtype)
        seen = F.scaled_dot_product_attention(
            query.to(value.dtype), key, value, mask, is_causal=causal and mask is None
        )
        return self.project(seen.transpose(1, 2).flatten(2)), key, value


class Offsets(nn.Module):
    """What attention adds to the logits of two places for how far apart they are (ours).

    One learned number for each head and each offset in rows and columns, at first 0, as in Liu et
    al., "Swin Transformer", 2021, equation 4.
    """

    numbers: Tensor

    def __init__(self, grid: Grid, heads: int) -> None:
        super().__init__()
        rows, columns = grid
        self.table = nn.Parameter(torch.zeros(heads, (2 * rows - 1) * (2 * columns - 1)))
        place = coordinates(grid, 1)[:, 1:]
        apart = place[:, None] - place + torch.tensor([rows - 1, columns - 1])
        numbers = apart[..., 0] * (2 * columns - 1) + apart[..., 1]
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self) -> Tensor:
        """(1, heads, P, P)."""
        return OFFSET_SCALE * self.table[None, :, self.numbers]


class STBlock(nn.Module):
    """Spatial attention, temporal attention, then one MLP.

    Args:
        shape: its sizes.
        grid: rows and columns of places whose `Offsets` count, or None.
        causal: whether frames see only earlier ones and themselves.
    """

    def __init__(self, shape: Shape, grid: Grid | None = None, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.offsets = Offsets(grid, shape.heads) if grid else None
        self.spatial, self.temporal = Attention(shape), Attention(shape)
        self.norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.hidden)
        self.down = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps tokens (B, T, P, D)."""
        return self.feed(self.attend(x, mask, self.apart())[0])

    def apart(self) -> Tensor | None:
        """What the offsets say, if they count."""
        return None if self.offsets is None else self.offsets()

    def attend(
        self,
        x: Tensor,
        mask: Tensor | None,
        apart: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens after both attentions; also gives the temporal keys and values."""
        lead = x.shape[:2]
        x = x + self.spatial(x.flatten(0, 1), apart)[0].unflatten(0, lead)
        along = x.transpose(1, 2)
        seen, key, value = self.temporal(along.flatten(0, 1), mask, self.causal, past)
        return x + seen.unflatten(0, along.shape[:2]).transpose(1, 2), key, value

    def feed(self, x: Tensor) -> Tensor:
        """Tokens after the MLP."""
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class STTransformer(nn.Module):
    """Learned positions in space and time, blocks, and a LayerNorm.

    Linear maps start with deviation 1 / sqrt(fan_in); what blocks add starts smaller by the square
    root of the number of summands.

    Args:
        shape: sizes of the blocks.
        grid: rows and columns of the P tokens of a frame.
        frames: most frames of a clip.
        causal: whether frames see only earlier ones and themselves.
        relative: spatial attention has `Offsets` beside (ours).
        placed: whether tokens are told where in the frame they are; `relative` offsets do not say.
    """

    space: Tensor

    def __init__(
        self,
        shape: Shape,
        grid: Grid,
        frames: int,
        causal: bool = True,
        relative: bool = False,
        placed: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.frames, self.causal = shape, frames, causal
        self.places = grid[0] * grid[1]
        if placed:
            self.space = nn.Parameter(SPACE_STD * math.sqrt(2) * _waves(grid, shape.width))
        else:
            self.register_buffer("space", torch.zeros(()), persistent=False)
        self.time = nn.Parameter(POSITION_STD * torch.randn(frames, shape.width))
        offsets = grid if relative else None
        self.blocks = nn.ModuleList(STBlock(shape, offsets, causal) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        draw_weights(self)
        for block in self._stack:
            for linear in (block.spatial.project, block.temporal.project, block.down):
                linear.weight.data.div_(math.sqrt(3 * shape.layers))

    @property
    def _stack(self) -> list[STBlock]:
        return list(self.blocks)  # type: ignore[arg-type]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Maps tokens (B, T, P, D) to outputs of the same shape.

        Args:
            x: tokens, T at most `frames`.
            valid: (B, T) bool, where padding in front of the clips is not; it changes nothing about
                the others' outputs. Without it all frames are valid.
        """
        x, mask = self._placed(x, valid)
        for block in self._stack:
            x = block(x, mask)
        out: Tensor = self.norm(x)
        return out

    def remember(self, x: Tensor, valid: Tensor | None = None) -> Memory:
        """What frames that follow the tokens (B, T, P, D) will see of them."""
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        x, mask = self._placed(x, valid)
        keys, values, offsets = [], [], []
        for block in self._stack:
            offsets.append(block.apart())
            x, key, value = block.attend(x, mask, offsets[-1])
            keys.append(key)
            values.append(value)
            if block is not self._stack[-1]:
                x = block.feed(x)
        return Memory(tuple(keys), tuple(values), tuple(offsets), valid)

    def extend(self, x: Tensor, memory: Memory) -> Tensor:
        """Outputs (B, 1, P, D) of the tokens (B, 1, P, D) of the frame that follows.

        Gives what `forward` gives for the last frame of the whole clips.
        """
        valid = F.pad(memory.valid, (0, 1), value=True)
        x = x + self.space + self.time[valid.sum(1) - 1][:, None, None]
        mask = torch.zeros(valid.shape, device=x.device).masked_fill_(~valid, -torch.inf)
        mask = mask[:, None, None].repeat_interleave(self.places, 0)
        kept = zip(memory.keys, memory.values, memory.offsets, strict=True)
        for block, (key, value, apart) in zip(self._stack, kept, strict=True):
            x = block.feed(block.attend(x, mask, apart, (key, value))[0])
        out: Tensor = self.norm(x)
        return out

    def _placed(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens with their positions, and the mask of the temporal attention."""
        if valid is None:
            return x + self.space + self.time[: x.shape[1], None], None
        time = self.time[(valid.cumsum(1) - 1).clamp(min=0)]
        mask = self._mask(valid).repeat_interleave(self.places, 0)
        return x + self.space + time[:, :, None], mask

    def _mask(self, valid: Tensor) -> Tensor:
        if self.causal:
            return causal_mask(valid)
        hidden = ~valid[:, None, None] & ~torch.eye(
            valid.shape[1], dtype=torch.bool, device=valid.device
        )
        return torch.zeros(hidden.shape, device=valid.device).masked_fill_(hidden, -torch.inf)


def _waves(grid: Grid, width: int) -> Tensor:
    """What positions in space begin as: (P, D) sines and cosines of rows and of columns.

    Wavelengths are from 4 places to four times the longer side, evenly in frequency, so that
    neighbours differ. From these small transformers soon learn where their tokens should look, from
    random positions hardly.
    """
    share = math.ceil(width / 4)
    rates = torch.linspace(math.pi / 2, math.pi / (2 * max(grid)), share)
    angles = coordinates(grid, 1)[:, 1:, None] * rates  # (P, 2, share)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def draw_weights(module: nn.Module, scale: float = 1.0) -> None:
    """Truncated normals of deviation scale / sqrt(fan_in) for linear maps, zeros for biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=scale * part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
