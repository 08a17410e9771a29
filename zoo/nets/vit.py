"""A vision transformer that reads any subset of the patches of images and clips.

An image is a clip of one frame. Places of patches are counted along the rows, then frame by frame:
place (t, y, x) is number (t * rows + y) * columns + x. In shapes, N is the number of clips, P that
of their places, V that of those which are read, and D the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zoo.nets.transformer import Block

# Dosovitskiy et al., 2021, table 1; tiny and small are Touvron et al., 2021, table 1; nano is ours.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 96, "layers": 4, "heads": 3},
    "tiny": {"width": 192, "layers": 12, "heads": 3},
    "small": {"width": 384, "layers": 12, "heads": 6},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
    "huge": {"width": 1280, "layers": 32, "heads": 16},
}
INIT_STD = 0.02
NORM_EPS = 1e-6
LONGEST_WAVE = 10_000.0

Grid = tuple[int, int]


def patchify(clips: Tensor, patch: int, tubelet: int = 1) -> Tensor:
    """Cuts clips (N, T, H, W, C) into patches (N, P, tubelet * patch * patch * C).

    Args:
        clips: H and W are multiples of `patch`; frames that do not fill a tubelet are left out.
        patch: side in pixels.
        tubelet: frames of a patch.
    """
    count, frames, height, width, channels = clips.shape
    times, rows, columns = frames // tubelet, height // patch, width // patch
    parts = clips[:, : times * tubelet].reshape(
        count, times, tubelet, rows, patch, columns, patch, channels
    )
    return parts.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens (N, ..., D) of tokens (N, P, D) at places (N, ...)."""
    rows = places.flatten(1)
    taken = tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))
    return taken.unflatten(1, places.shape[1:])


def coordinates(grid: Grid, times: int) -> Tensor:
    """Where the places of a clip are: (P, 3) integers t, y, x.

    Example:
        >>> coordinates((2, 2), 1).tolist()
        [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    """
    return torch.cartesian_prod(*(torch.arange(size) for size in (times, *grid)))


def sincos(where: Tensor, width: int) -> Tensor:
    """Fixed positions (P, D): for each axis of `where` (P, A) an equal share of sines and cosines.

    Wavelengths go from 2 pi to 10,000 * 2 pi in geometric steps. Where D is not divisible by 2 A,
    the last axis has the fewer.
    """
    share = math.ceil(width / (2 * where.shape[1]))
    rate = LONGEST_WAVE ** -(torch.arange(share, dtype=torch.float64) / share)
    angle = where[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].float()


def rotations(where: Tensor, head: int) -> Tensor:
    """Rotary positions (P, head), as `rotate` takes them: a third of the features for each axis.

    Pairs that are left over are not turned (V-JEPA 2, section 2.1).
    """
    share = head // 3 // 2
    rate = LONGEST_WAVE ** -(torch.arange(share, dtype=torch.float64) / max(share, 1))
    angle = (where[..., None] * rate).flatten(1)
    angle = nn.functional.pad(angle, (0, head // 2 - angle.shape[1]))
    return torch.cat([angle.cos(), angle.sin()], -1).float()


class Positions(nn.Module):
    """A fixed row for each place, made for as many frames as are asked for.

    Args:
        grid: rows and columns of patches.
        make: from coordinates (P, 3) to rows (P, F).
    """

    table: Tensor

    def __init__(self, grid: Grid, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.grid, self.make = grid, make
        self.register_buffer("table", make(coordinates(grid, 1)), persistent=False)

    def forward(self, places: Tensor, times: int) -> Tensor:
        """Rows (..., F) of places (...) of clips that are `times` patches long."""
        if len(self.table) < times * self.grid[0] * self.grid[1]:
            table = self.make(coordinates(self.grid, times))
            self.table = table.to(self.table.device)
        return self.table[places]


class PatchTransformer(nn.Module):
    """Blocks over the tokens of patches, and a LayerNorm.

    Positions are added to the tokens, or with `rope` turn queries and keys.

    Args:
        grid: rows and columns of patches.
        width, layers, heads: D, number of blocks, heads of each.
        axes: 2 for images, 3 for clips.
        rope: rotary positions.
    """

    def __init__(
        self, grid: Grid, width: int, layers: int, heads: int, axes: int = 2, rope: bool = False
    ) -> None:
        super().__init__()
        self.rope = rope
        make = partial(rotations, head=width // heads) if rope else partial(sincos, width=width)
        self.positions = Positions(grid, lambda where: make(where[:, 3 - axes :]))
        self.blocks = nn.ModuleList(
            Block(width, heads, 0.0, "gelu", NORM_EPS) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, x: Tensor, places: Tensor, times: int, read: slice = slice(None)) -> Tensor:
        """Maps tokens (N, V, D) to outputs (N, R, D).

        Args:
            x: tokens.
            places: (N or 1, V) where their patches are.
            times: how many patches long the clips are.
            read: the tokens whose outputs are needed.
        """
        rows, rotation = self.positions(places, times), None
        if self.rope:
            rotation = rows
        else:
            x = x + rows
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, rotation=rotation)
        out: Tensor = self.norm(last(x, read=read, rotation=rotation))
        return out


class ViT(nn.Module):
    """A vision transformer without a class token.

    Args:
        values: numbers in a patch.
        grid, width, layers, heads, axes, rope: of the `PatchTransformer`.
    """

    def __init__(
        self,
        values: int,
        grid: Grid,
        width: int,
        layers: int,
        heads: int,
        axes: int = 2,
        rope: bool = False,
    ) -> None:
        super().__init__()
        self.cells = grid[0] * grid[1]
        self.embed = nn.Linear(values, width)
        self.transformer = PatchTransformer(grid, width, layers, heads, axes, rope)
        draw_weights(self, self.transformer)

    def forward(self, patches: Tensor, places: Tensor | None = None) -> Tensor:
        """Features (N, V, D) of the patches (N, P, values) at `places` (N, V); of all without.

        Patches elsewhere are dropped first, so a step costs what the visible ones cost.
        """
        times = patches.shape[1] // self.cells
        if places is None:
            places = torch.arange(patches.shape[1], device=patches.device)[None]
        else:
            patches = take(patches, places)
        out: Tensor = self.transformer(self.embed(patches), places, times)
        return out


def draw_weights(module: nn.Module, transformer: PatchTransformer) -> None:
    """Truncated normals of deviation 0.02; what block n adds starts smaller by sqrt(2 n)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=INIT_STD)
            nn.init.zeros_(part.bias)
    for depth, block in enumerate(transformer.blocks, 1):
        for linear in (block.project, block.down):
            linear.weight.data.div_(math.sqrt(2 * depth))  # type: ignore[union-attr, operator]
