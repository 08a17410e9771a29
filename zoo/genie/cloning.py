"""Acting by what was seen: behaviour cloned from video, and what latent actions are in reality.

So Genie trains agents: the latent action model labels expert video, a policy learns to say the
latent action from pixels, and a dictionary from few labelled steps translates it. D[a] are the real
actions that were seen with latent action a, and one of them is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.genie.patches import Patches
from zoo.genie.tokenizer import GREY
from zoo.nets.st_transformer import OUT_SCALE, Shape, STTransformer, draw_weights

MOST_FRAMES = 4  # that the policy sees
MOST_ACTIONS = 64  # real ones


class Clone(nn.Module):
    """Which latent action comes next, from the last frames.

    Args:
        patches: how frames are cut.
        shape: sizes of the transformer.
        actions: number of latent actions.
        frames: most frames it sees.
    """

    def __init__(self, patches: Patches, shape: Shape, actions: int, frames: int) -> None:
        super().__init__()
        self.patches, self.frames = patches, frames
        self.embed = nn.Linear(patches.values, shape.width)
        self.transformer = STTransformer(shape, patches.count, frames)
        self.out = nn.Linear(shape.width, actions)
        draw_weights(self.embed)
        draw_weights(self.out, OUT_SCALE)

    def forward(self, frames: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits (B, T, actions) at each of up to `frames` frames (B, T, H, W, C) in [0, 1]."""
        x = self.embed(self.patches.cut(frames) - GREY)
        out: Tensor = self.out(self.transformer(x, valid).mean(2))
        return out


def spans(values: Tensor, length: int) -> Tensor:
    """All overlapping spans (B (T - length + 1), length, ...) of sequences (B, T, ...)."""
    length = min(length, values.shape[1])
    begin = torch.arange(values.shape[1] - length + 1, device=values.device)
    places = begin[:, None] + torch.arange(length, device=values.device)
    return values[:, places].flatten(0, 1)


class ActionMap(nn.Module):
    """How often each real action was seen with each latent one.

    Attributes:
        counts: (latent, MOST_ACTIONS) float; as wide whatever the real actions are, so that weights
            learnt from silent video fit a model of a game.

    Args:
        latent: number of latent actions.
        real: number of real actions, at most `MOST_ACTIONS`.
    """

    counts: Tensor

    def __init__(self, latent: int, real: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(latent, MOST_ACTIONS))
        self.real = real

    def forget(self) -> None:
        """Empties it: what latent actions stand for changes as their model learns."""
        self.counts.zero_()

    @property
    def steps(self) -> Tensor:
        """How many labelled steps were seen, a scalar."""
        return self.counts.sum()

    @torch.no_grad()
    def add(self, latent: Tensor, real: Tensor, most: float = torch.inf) -> None:
        """Counts pairs (N,) of actions, as long as there are fewer than `most` in all."""
        room = most - float(self.steps)
        if room < len(latent):
            latent, real = latent[: int(room)], real[: int(room)]
        ones = torch.ones(len(latent), device=self.counts.device)
        self.counts.index_put_((latent, real), ones, accumulate=True)

    def translate(self, latent: Tensor, draw: bool) -> Tensor:
        """Real actions (N,) for latent ones (N,).

        A latent action that was never seen may be any: it has the frequencies of all together, and
        before the first label every real action is as likely.

        Args:
            latent: codes.
            draw: draw by frequency, as published; otherwise take the most frequent.
        """
        table = self.counts[:, : self.real]
        counts = table[latent]
        counts = torch.where(counts.sum(-1, keepdim=True) > 0, counts, table.sum(0))
        if not draw:
            return counts.argmax(-1)
        even = torch.ones_like(counts)
        return torch.multinomial(torch.where(counts.sum(-1, keepdim=True) > 0, counts, even), 1)[
            :, 0
        ]
