"""Predictors: the latent that an action leads to.

A predictor sees a window of h frames, of which the newest is the last: latents (N, h, D), the
encoded actions (N, h, A) chosen at them, and which frames are valid (N, h); the first ones of a
window are not, where an episode is younger. It gives the vector (N, D) that becomes the next latent
once the model has normed it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.transformer import causal_mask

PREDICTORS = ("recurrent", "mlp", "transformer")


class RecurrentPredictor(nn.Module):
    """A GRU whose hidden state is the latent, and whose input is the action (EB-JEPA).

    Args:
        latent: D.
        action: A.
    """

    history = 1

    def __init__(self, latent: int, action: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(action, latent)

    def forward(self, latents: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """See the module."""
        out: Tensor = self.cell(actions[:, -1], latents[:, -1])
        return out


class ResidualPredictor(nn.Module):
    """The latent plus an MLP of latent and action.

    Its hidden layers are normalised: without that, and with two of them, an MLP that was given
    places of dot, wall and door let the dot through closed walls (see README.md).

    Args:
        latent: D.
        action: A.
        hidden: width of its three hidden layers.
    """

    history = 1

    def __init__(self, latent: int, action: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, latent)
        nn.init.zeros_(last.weight)  # it begins by copying
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(
            nn.Linear(latent + action, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            last,
        )

    def forward(self, latents: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """See the module."""
        latent = latents[:, -1]
        return latent + self.mlp(torch.cat([latent, actions[:, -1]], -1))


class TransformerPredictor(nn.Module):
    """A transformer over frames, in which actions condition each block (LeWM).

    A token is a latent with a learned embedding of its place, counted from the newest frame.

    Args:
        latent: D, which is also the width.
        action: A.
        layers, heads: of the transformer.
        history: most frames that it sees.
    """

    def __init__(self, latent: int, action: int, layers: int, heads: int, history: int) -> None:
        super().__init__()
        self.history = history
        self.place = nn.Parameter(0.02 * torch.randn(history, latent))
        self.action = nn.Sequential(nn.Linear(action, latent), nn.SiLU(), nn.Linear(latent, latent))
        self.blocks = nn.ModuleList(ConditionedBlock(latent, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(latent)
        self.out = nn.Linear(latent, latent)

    def forward(self, latents: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """See the module."""
        x = latents + self.place[-latents.shape[1] :]
        condition, mask = self.action(actions), causal_mask(valid)
        for block in self.blocks:
            x = block(x, condition, mask)
        out: Tensor = self.out(self.norm(x[:, -1]))
        return out


class ConditionedBlock(nn.Module):
    """A transformer block with AdaLN-zero (Peebles and Xie, 2023): it begins as the identity.

    Shift, scale and gate of its attention and of its MLP are linear in SiLU(condition), at first
    zero.

    Args:
        width: of the tokens and of the condition.
        heads: of the attention; they share the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """Maps tokens (N, T, D) under conditions (N, T, D) and a `causal_mask` to (N, T, D)."""
        parts = self.modulation(F.silu(condition)).chunk(6, -1)
        shift, scale, gate = parts[:3]
        x = x + gate * self._attend(self.norm(x) * (1 + scale) + shift, mask)
        shift, scale, gate = parts[3:]
        out: Tensor = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return out

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, mask.to(query.dtype))
        out: Tensor = self.project(seen.transpose(1, 2).flatten(2))
        return out
