"""The dynamics: the tokens of the next frame from past tokens and actions (Genie, section 2.1).

A decoder-only MaskGIT (Chang et al., 2022) over a causal ST-transformer. In training random tokens
are hidden and guessed; a frame is dreamed from nothing but hidden tokens, of which each pass
through the network keeps the ones it is surest of. Actions are added to the tokens of the frame
they led to, and no gradient goes back through them. In shapes, B is the number of clips, T of their
frames, P of the tokens of a frame, K of the codes, A the length of an action's vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.st_transformer import OUT_SCALE, Memory, Shape, STTransformer, draw_weights
from zoo.nets.vit import Grid

MASK_RATES = (0.5, 1.0)
COPY_BIAS = 4.0  # a copy gate starts by copying almost everything
NEVER = -30.0  # logit of a gate that is shut


class Dynamics(nn.Module):
    """Predicts hidden tokens.

    Args:
        codes: K.
        action_width: A.
        grid: rows and columns of the P tokens of a frame.
        shape: sizes of the transformer.
        frames: most frames of a clip.
        copy_gate: each place may copy its token of the frame before (ours): its prediction is a
            mixture of that token and the network's, and starts as the former.
        relative: as for `STTransformer`.
        code_width: length of the tokenizer's vectors, for `lookup`.
        lookup: gives the tokenizer's vectors (K, code_width) of codes (K,); a linear map of them is
            added to the learned embeddings (ours), so that codes of like patches begin alike.
    """

    def __init__(
        self,
        codes: int,
        action_width: int,
        grid: Grid,
        shape: Shape,
        frames: int,
        copy_gate: bool = False,
        relative: bool = False,
        code_width: int = 0,
        lookup: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.codes, self.places = codes, grid[0] * grid[1]
        self.embed = nn.Embedding(codes + 1, shape.width)  # the last stands for a hidden token
        self.lookup = lookup
        self.like = nn.Linear(code_width, shape.width, bias=False) if lookup else None
        self.act = nn.Linear(action_width, shape.width, bias=False)
        self.transformer = STTransformer(shape, grid, frames, relative=relative)
        self.out = nn.Linear(shape.width, codes)
        self.gate = nn.Linear(shape.width, 1) if copy_gate else None
        for linear in (self.act, self.like):
            if linear is not None:
                draw_weights(linear)
        draw_weights(self.out, OUT_SCALE)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, COPY_BIAS)

    @property
    def mask(self) -> int:
        """What stands for a hidden token."""
        return self.codes

    def forward(
        self,
        tokens: Tensor,
        actions: Tensor,
        valid: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities up to a constant (B, T, P, K) of the token at each place.

        Args:
            tokens: (B, T, P) int64, `mask` where hidden.
            actions: (B, T, A), that which led to each frame; the first frame's is not read.
            valid: (B, T) as for `STTransformer`.
            where: (B, T, P) bool, the N places to say them of, as (N, K); by default all.
        """
        hidden = self.transformer(self._embedded(tokens, actions, valid), valid)
        before = F.pad(tokens[:, :-1], (0, 0, 1, 0), value=self.mask)
        if where is not None:
            hidden, before = hidden[where], before[where]
        return self._scores(hidden, before)

    def loss(self, tokens: Tensor, actions: Tensor, seen: Tensor) -> Tensor:
        """Cross-entropy of hidden tokens, mean over these; a scalar.

        Args:
            tokens: (B, T, P) int64, the truth.
            actions: as for `forward`.
            seen: (B, T, P) int64, the same with some tokens hidden (and perhaps some wrong).
        """
        return self.loss_and_scores(tokens, actions, seen)[0]

    def loss_and_scores(
        self, tokens: Tensor, actions: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`loss`, and the scores (N, K) of the N hidden tokens."""
        hidden = seen == self.mask
        scores = self(seen, actions, where=hidden)
        error = F.cross_entropy(scores.float(), tokens[hidden], reduction="sum")
        return error / max(1, len(scores)), scores

    @torch.no_grad()
    def next_frame(
        self,
        tokens: Tensor,
        actions: Tensor,
        valid: Tensor,
        action: Tensor,
        steps: int,
        temperature: float,
    ) -> Tensor:
        """Dreams the tokens (B, P) of the frame that follows.

        The past is read once; each of the steps reads the new frame only.

        Args:
            tokens: (B, T, P) of past frames.
            actions: (B, T, A) that led to these.
            valid: (B, T) bool, which frames are no padding in front.
            action: (B, A) that leads to the new frame.
            steps: passes through the network.
            temperature: of the tokens' distribution; 0 takes the likeliest.
        """
        memory = self.transformer.remember(self._embedded(tokens, actions, valid), valid)
        guess = torch.full_like(tokens[:, -1], self.mask)
        for left in unmasking(self.places, steps):
            scores = self._extended(guess, action, memory, tokens[:, -1])
            guess = reveal(guess, scores, left, temperature, self.mask)
        return guess

    def _extended(self, guess: Tensor, action: Tensor, memory: Memory, before: Tensor) -> Tensor:
        """Scores (B, P, K) of the frame that follows what is remembered."""
        x = self._tokens(guess) + self.act(action)[:, None]
        return self._scores(self.transformer.extend(x[:, None], memory), before[:, None])[:, 0]

    def _embedded(self, tokens: Tensor, actions: Tensor, valid: Tensor | None) -> Tensor:
        actions = self.act(actions.detach())  # 2.1: the action model learns by its decoder alone
        if valid is None:
            actions = F.pad(actions[:, 1:], (0, 0, 1, 0))
        else:
            actions = actions.masked_fill((valid.cumsum(1) <= 1)[..., None], 0.0)
        return self._tokens(tokens) + actions[:, :, None]

    def _tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., D) of tokens (...)."""
        table = self.embed.weight
        if self.like is not None and self.lookup is not None:
            vectors = self.lookup(torch.arange(self.codes, device=tokens.device)).float()
            vectors = vectors / vectors.std().clamp(min=1e-6)
            table = table + F.pad(self.like(vectors), (0, 0, 0, 1))
        return F.embedding(tokens, table)

    def _scores(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Of outputs (..., D), and the tokens (...) one frame earlier."""
        scores: Tensor = self.out(hidden)
        if self.gate is None:
            return scores
        scores = scores.float().log_softmax(-1)
        unknown = (before == self.mask)[..., None]
        gate = self.gate(hidden).float().masked_fill(unknown, NEVER)
        scores = scores + F.logsigmoid(-gate)
        place = before.clamp(max=self.codes - 1)[..., None]
        return scores.scatter(
            -1, place, torch.logaddexp(scores.gather(-1, place), F.logsigmoid(gate))
        )


def hide(
    tokens: Tensor,
    mask: int,
    rates: tuple[float, float] = MASK_RATES,
    last_only: bool = False,
) -> Tensor:
    """Tokens (B, T, P) of which random ones are replaced by `mask`; never those of the first frame.

    Args:
        tokens: of clips.
        mask: what stands for a hidden token.
        rates: each clip's share of hidden tokens is uniform between these.
        last_only: hide only tokens of the last frame (ours): it is predicted from a past without
            gaps, as in dreams.
    """
    count, frames, _ = tokens.shape
    low, high = rates
    rate = low + (high - low) * torch.rand(count, 1, 1, device=tokens.device)
    hidden = torch.rand(tokens.shape, device=tokens.device) < rate
    time = torch.arange(frames, device=tokens.device)
    first = max(1, frames - 1) if last_only else 1
    return tokens.masked_fill(hidden & (time >= first)[:, None], mask)


def disturb(tokens: Tensor, codes: int, most: float) -> Tensor:
    """Tokens (B, T, P), a random share of which, up to `most` in each clip, are others."""
    if not most:
        return tokens
    rate = most * torch.rand(len(tokens), 1, 1, device=tokens.device)
    swap = torch.rand(tokens.shape, device=tokens.device) < rate
    return torch.where(swap, torch.randint_like(tokens, codes), tokens)


def unmasking(places: int, steps: int) -> list[int]:
    """How many of P tokens stay hidden after each step: floor(P cos(pi/2 s / S)), s = 1 to S.

    The cosine schedule of MaskGIT (Chang et al., 2022, section 3.3), where each step reveals at
    least one token: there are no more steps than tokens.

    Example:
        >>> unmasking(16, 4)
        [14, 11, 6, 0]
        >>> unmasking(3, 8)
        [2, 1, 0]
    """
    hidden, left = places, []
    for step in range(1, steps):
        if hidden == 1:
            break
        scheduled = math.floor(places * math.cos(math.pi / 2 * step / steps))
        hidden = max(1, min(hidden - 1, scheduled))
        left.append(hidden)
    return [*left, 0]


def reveal(guess: Tensor, scores: Tensor, left: int, temperature: float, mask: int) -> Tensor:
    """One step of MaskGIT: draws all hidden tokens, and hides the `left` unlikeliest of them again.

    Args:
        guess: (B, P) int64, `mask` where hidden.
        scores: (B, P, K) log-probabilities up to a constant.
        left: how many tokens of each row stay hidden.
        temperature: divides the scores before drawing; 0 takes the likeliest.
        mask: what stands for a hidden token.
    """
    scores = scores.float()
    if temperature:
        noise = -torch.empty_like(scores).exponential_().log()
        drawn = (scores / temperature + noise).argmax(-1)
    else:
        drawn = scores.argmax(-1)
    hidden = guess == mask
    sure = scores.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    sure = sure.masked_fill(~hidden, torch.inf)
    rank = sure.argsort(-1).argsort(-1)
    return torch.where(hidden, drawn, guess).masked_fill(hidden & (rank < left), mask)
