"""The predictor: a narrow transformer that fills in features at places it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.nets.vit import INIT_STD, Grid, PatchTransformer, draw_weights


class Predictor(nn.Module):
    """Reads the features of visible patches and a mask token at each place that is asked for.

    Args:
        features: D, of the encoder.
        grid, width, layers, heads, axes, rope: of the `PatchTransformer`; width is W below.
        mask_tokens: how many kinds of masks there are, each with a token of its own.
        zero_tokens: mask tokens start as zeros (V-JEPA), else as small normals (I-JEPA).
    """

    def __init__(
        self,
        features: int,
        grid: Grid,
        width: int,
        layers: int,
        heads: int,
        axes: int = 2,
        rope: bool = False,
        mask_tokens: int = 1,
        zero_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.cells = grid[0] * grid[1]
        self.embed = nn.Linear(features, width)
        self.mask_tokens = nn.Parameter(torch.zeros(mask_tokens, width))
        self.transformer = PatchTransformer(grid, width, layers, heads, axes, rope)
        self.project = nn.Linear(width, features)
        draw_weights(self, self.transformer)
        if not zero_tokens:
            nn.init.trunc_normal_(self.mask_tokens, std=INIT_STD)

    def forward(
        self, context: Tensor, seen: Tensor, wanted: Tensor, times: int, kind: int = 0
    ) -> Tensor:
        """Predicted features (N, M, K, D); each of the M target sets is predicted by itself.

        Args:
            context: (N, C, D) features of the visible patches.
            seen: (N, C) their places.
            wanted: (N, M, K) places to predict.
            times: how many patches long the clips are.
            kind: of the mask, below `mask_tokens`.
        """
        sets, visible = wanted.shape[1], seen.shape[1]
        x = self.embed(context).repeat_interleave(sets, 0)
        tokens = self.mask_tokens[kind].to(x.dtype).expand(len(x), wanted.shape[2], -1)
        places = torch.cat([seen.repeat_interleave(sets, 0), wanted.flatten(0, 1)], 1)
        x = torch.cat([x, tokens], 1)
        x = self.transformer(x, places, times, read=slice(visible, None))
        out: Tensor = self.project(x)
        return out.unflatten(0, wanted.shape[:2])
