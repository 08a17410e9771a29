"""A causal transformer in the manner of GPT-2, with a cache of keys and values for acting.

Blocks are x + attention(norm(x)), then x + mlp(norm(x)), with a norm after the last (Radford et
al., 2019). Tokens come embedded, positions included: the transformer adds none of its own. The
blocks are also those of vision transformers, where all tokens see each other (`vit.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.dropout import dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
INIT_STD = 0.02


class Block(nn.Module):
    """Attention and an MLP of four times the width, each behind a LayerNorm.

    Args:
        width: of the tokens.
        heads: of the attention; they share the width.
        dropout: of attention weights and of what is added to the tokens.
        activation: one of `ACTIVATIONS`.
        eps: of the LayerNorms.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, activation: str, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.activation = ACTIVATIONS[activation]
        self.attention_norm = nn.LayerNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        read: slice = slice(None),
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Maps tokens (B, T, D) to those at the positions `read`, (B, R, D).

        Args:
            x: tokens.
            mask: (..., T, T), added to the attention's logits: 0, or -inf where row may not see
                column. Without one all see all.
            read: the positions that are needed.
            rotation: (B or 1, T, D / heads) by which angle each pair of features of queries and
                keys is turned, as cosines and then sines; see `rotate`.
        """
        query, memory = self._query_and_memory(x, read)
        mask = None if mask is None else mask[..., read, :]
        return self._attend(x[:, read], query, memory, mask, rotation, read)

    def extend(
        self, x: Tensor, cache: Tensor, rows: Tensor, memory: Tensor, seen: Tensor, read: slice
    ) -> Tensor:
        """The same for tokens (B, N, D) that continue sequences.

        Args:
            x: the new tokens.
            cache: keys and values (., 2 D) of all slots; changed in place.
            rows: (B N) where those of the new tokens go in it.
            memory: the part (B, S, 2 D) of the cache that belongs to this block.
            seen: (B, 1, R, S) which slots each token may see.
            read: which of the new tokens are needed.
        """
        query, new = self._query_and_memory(x, read)
        cache.index_copy_(0, rows, new.flatten(0, 1).to(cache.dtype))
        return self._attend(x[:, read], query, memory.to(new.dtype), seen)

    def _query_and_memory(self, x: Tensor, read: slice) -> tuple[Tensor, Tensor]:
        x, sizes = self.attention_norm(x), (self.width, 2 * self.width)
        if read == slice(None):
            query, memory = self.qkv(x).split(sizes, -1)
            return query, memory
        # What the last block leaves out are queries.
        weights, biases = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
        query = F.linear(x[:, read], weights[0], biases[0])
        return query, F.linear(x, weights[1], biases[1])

    def _attend(
        self,
        x: Tensor,
        query: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        rotation: Tensor | None = None,
        read: slice = slice(None),
    ) -> Tensor:
        batch, places, size = x.shape[0], (self.heads, self.width // self.heads), self.width
        query = query.view(batch, -1, *places).transpose(1, 2)
        key = memory[..., :size].view(batch, -1, *places).transpose(1, 2)
        value = memory[..., size:].view(batch, -1, *places).transpose(1, 2)
        if rotation is not None:
            query, key = rotate(query, rotation[:, None, read]), rotate(key, rotation[:, None])
        seen = attention(query, key, value, mask, self.dropout if self.training else 0.0)
        x = x + self._drop(self.project(seen.transpose(1, 2).reshape(batch, -1, size)))
        hidden = self.activation(self.up(self.mlp_norm(x)))
        return x + self._drop(self.down(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, chance: float
) -> Tensor:
    """Softmax(query key' / sqrt(F) + mask) value, of (B, heads, R, F) and (B, heads, T, F).

    Args:
        query, key, value: R queries, T keys and values.
        mask: (..., R, T), added to the logits; boolean only if `chance` is 0. None: all see all.
        chance: of a weight to be dropped.
    """
    if chance == 0 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, chance)
    # What the line above does on a CPU, too, with our dropout.
    logits = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    weights = torch.softmax(logits if mask is None else logits + mask, -1)
    return dropout(weights, chance) @ value


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns pairs of neighbouring features (..., F) by angles (Su et al., 2021).

    Args:
        x: features, F even.
        rotation: (..., F) the cosines of the F / 2 angles, then their sines.
    """
    cos, sin = rotation.to(x.dtype).chunk(2, -1)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class CausalTransformer(nn.Module):
    """Blocks, and a LayerNorm at the end.

    Weights of linear maps start as normals of standard deviation 0.02, biases as zeros.

    Args:
        width, layers, heads: D, number of blocks, heads of each.
        dropout: of the embedded tokens and in the blocks.
        activation: of the MLPs, "relu" or "gelu".
    """

    def __init__(
        self, width: int, layers: int, heads: int, dropout: float = 0.1, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.width, self.dropout = width, dropout
        self.blocks = nn.ModuleList(Block(width, heads, dropout, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor, read: slice = slice(None)) -> Tensor:
        """Maps tokens (B, T, D) to outputs (B, R, D) at the positions `read`.

        The last block computes nothing else: what other tokens would become there, nobody sees.

        Args:
            x: tokens.
            mask: (..., T, T), added to the attention's logits; see `causal_mask`.
            read: the positions that are needed.
        """
        x = dropout(x, self.dropout, self.training)
        for block, positions in self._with_positions(read):
            x = block(x, mask, positions)
        out: Tensor = self.norm(x)
        return out

    def empty_cache(self, batch_size: int, slots: int, device: torch.device) -> Tensor:
        """Keys and values (B, layers, S, 2 D) of sequences of which nothing has been read."""
        return torch.zeros(batch_size, len(self.blocks), slots, 2 * self.width, device=device)

    def extend(
        self, x: Tensor, cache: Tensor, slots: Tensor, read: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Reads further tokens of sequences, each of which may stand somewhere else.

        Gives what `forward` gives for the whole sequences without dropout.

        Args:
            x: (B, N, D) the new tokens.
            cache: (B, layers, S, 2 D) keys and values of those before; is not changed.
            slots: (B, N) int64, the places of the new tokens among the S; a token sees the slots
                up to its own, so these must all be filled.
            read: which of the new tokens' outputs are needed.

        Returns:
            Outputs (B, R, D), and the cache with the new tokens.
        """
        cache = cache.clone()
        flat, (count, layers, places) = cache.flatten(0, 2), cache.shape[:3]
        first = torch.arange(0, count * layers * places, layers * places, device=x.device)
        rows = (first[:, None] + slots).flatten()
        filled = int(slots.max()) + 1  # nobody sees more
        seen = torch.arange(filled, device=x.device) <= slots[:, None, :, None]
        for layer, (block, positions) in enumerate(self._with_positions(read)):
            memory = cache[:, layer, :filled]
            x = block.extend(
                x, flat, rows + layer * places, memory, seen[:, :, positions], positions
            )
        return self.norm(x), cache

    def _with_positions(self, read: slice) -> list[tuple[Block, slice]]:
        """Each block with the positions that those after it need."""
        positions = [slice(None)] * (len(self.blocks) - 1) + [read]
        return list(zip(self.blocks, positions, strict=True))  # type: ignore[arg-type]


def causal_mask(valid: Tensor) -> Tensor:
    """Who sees whom, as what is added to attention logits (B, 1, T, T): 0 or -inf.

    A token sees itself and the valid tokens (B, T) before it. Itself also where it is not valid,
    for a softmax over nothing is NaN.
    """
    steps = valid.shape[1]
    before = torch.ones(steps, steps, dtype=torch.bool, device=valid.device).tril(-1)
    itself = torch.eye(steps, dtype=torch.bool, device=valid.device)
    seen = before & valid[:, None] | itself
    return torch.zeros(seen.shape, device=valid.device).masked_fill_(~seen, -torch.inf)[:, None]
