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

OUT_SCALE = 0.1  # of the first outputs of a whole network
POSITION_STD = 0.3  # beside tokens of about unit variance


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
        valid: (B, T) bool, which frames are no padding.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
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
            mask: (N, 1, L, past + L) added to the logits.
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


class STBlock(nn.Module):
    """Spatial attention, temporal attention, then one MLP.

    Args:
        shape: its sizes.
        causal: whether frames see only earlier ones and themselves.
    """

    def __init__(self, shape: Shape, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.spatial, self.temporal = Attention(shape), Attention(shape)
        self.norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.hidden)
        self.down = nn.Linear(shape.hidden, shape.width)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps tokens (B, T, P, D); also gives the temporal keys and values."""
        lead = x.shape[:2]
        x = x + self.spatial(x.flatten(0, 1))[0].unflatten(0, lead)
        along = x.transpose(1, 2)
        seen, key, value = self.temporal(along.flatten(0, 1), mask, self.causal, past)
        x = x + seen.unflatten(0, along.shape[:2]).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(x)))), key, value


class STTransformer(nn.Module):
    """Learned positions in space and time, blocks, and a LayerNorm.

    Linear maps start with deviation 1 / sqrt(fan_in); what blocks add starts smaller by the square
    root of the number of summands.

    Args:
        shape: sizes of the blocks.
        places: P.
        frames: most frames of a clip.
        causal: whether frames see only earlier ones and themselves.
    """

    def __init__(self, shape: Shape, places: int, frames: int, causal: bool = True) -> None:
        super().__init__()
        self.shape, self.places, self.frames, self.causal = shape, places, frames, causal
        self.space = nn.Parameter(POSITION_STD * torch.randn(places, shape.width))
        self.time = nn.Parameter(POSITION_STD * torch.randn(frames, shape.width))
        self.blocks = nn.ModuleList(STBlock(shape, causal) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        draw_weights(self)
        for block in self.blocks:
            for linear in (block.spatial.project, block.temporal.project, block.down):  # type: ignore[union-attr]
                linear.weight.data.div_(math.sqrt(3 * shape.layers))  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Maps tokens (B, T, P, D) to outputs of the same shape.

        Args:
            x: tokens, T at most `frames`.
            valid: (B, T) bool, where padding in front of the clips is not; it changes nothing about
                the others' outputs. Without it all frames are valid.
        """
        return self._run(x, valid)[0]

    def remember(self, x: Tensor, valid: Tensor | None = None) -> Memory:
        """What frames that follow the tokens (B, T, P, D) will see of them."""
        _, keys, values = self._run(x, valid)
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return Memory(keys, values, valid)

    def extend(self, x: Tensor, memory: Memory) -> Tensor:
        """Outputs (B, 1, P, D) of the tokens (B, 1, P, D) of the frame that follows.

        Gives what `forward` gives for the last frame of the whole clips.
        """
        valid = F.pad(memory.valid, (0, 1), value=True)
        x = x + self.space + self.time[valid.sum(1) - 1][:, None, None]
        mask = torch.zeros(valid.shape, device=x.device).masked_fill_(~valid, -torch.inf)
        mask = mask[:, None, None].repeat_interleave(self.places, 0)
        for block, *past in zip(self.blocks, memory.keys, memory.values, strict=True):
            x, _, _ = block(x, mask, tuple(past))
        out: Tensor = self.norm(x)
        return out

    def _run(
        self, x: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        mask = None
        if valid is None:
            x = x + self.space + self.time[: x.shape[1], None]
        else:
            x = x + self.space + self.time[(valid.cumsum(1) - 1).clamp(min=0)][:, :, None]
            mask = self._mask(valid).repeat_interleave(self.places, 0)
        keys, values = [], []
        for block in self.blocks:
            x, key, value = block(x, mask)
            keys.append(key)
            values.append(value)
        return self.norm(x), tuple(keys), tuple(values)

    def _mask(self, valid: Tensor) -> Tensor:
        if self.causal:
            return causal_mask(valid)
        hidden = ~valid[:, None, None] & ~torch.eye(
            valid.shape[1], dtype=torch.bool, device=valid.device
        )
        return torch.zeros(hidden.shape, device=valid.device).masked_fill_(hidden, -torch.inf)


def draw_weights(module: nn.Module, scale: float = 1.0) -> None:
    """Truncated normals of deviation scale / sqrt(fan_in) for linear maps, zeros for biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=scale * part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
