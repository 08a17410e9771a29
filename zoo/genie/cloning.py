"""Acting by what was seen: behaviour cloned from video, and what latent actions are in reality.

So Genie trains agents: the latent action model labels expert video, a policy learns to say the
latent action from pixels, and a dictionary from few labelled steps translates it. D[a] are the real
actions that were seen with latent action a, and one of them is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.base import State
from zoo.genie.patches import Patches
from zoo.genie.tokenizer import GREY
from zoo.nets.st_transformer import OUT_SCALE, Shape, STTransformer, draw_weights

MOST_FRAMES = 4  # that the policy sees
MOST_ACTIONS = 64  # real ones


class Clone(nn.Module):
    """Which latent action comes next, from the last frames.

    A frame is read by as many weighted means over its patches as the transformer has heads; by what
    weights is learnt. The paper does not say how: in a plain mean the few patches that matter fade.

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
        self.transformer = STTransformer(shape, patches.grid, frames)
        self.look = nn.Linear(shape.width, shape.heads)
        self.out = nn.Linear(shape.heads * shape.width, actions)
        for linear in (self.embed, self.look):
            draw_weights(linear)
        draw_weights(self.out, OUT_SCALE)

    def forward(self, frames: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits (B, T, actions) at each of up to `frames` frames (B, T, H, W, C) in [0, 1]."""
        x = self.embed(self.patches.cut(frames) - GREY)
        hidden = self.transformer(x, valid)
        weights = self.look(hidden).softmax(2)
        out: Tensor = self.out(torch.einsum("btph,btpd->bthd", weights, hidden).flatten(2))
        return out

    def initial_state(self, batch_size: int) -> State:
        """Nothing seen yet: "video" (B, frames, H, W, C) uint8, and "seen" (B,) frames of it."""
        device = self.embed.weight.device
        video = (batch_size, self.frames, *self.patches.image)
        return {
            "video": torch.zeros(video, dtype=torch.uint8, device=device),
            "seen": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }

    def see(self, image: Tensor, state: State) -> State:
        """The state after a further image (B, H, W, C) uint8."""
        video = torch.cat([state["video"][:, 1:], image[:, None]], 1)
        return {"video": video, "seen": (state["seen"] + 1).clamp(max=self.frames)}

    def choose(self, frames: Tensor, seen: Tensor, draw: bool) -> Tensor:
        """Latent actions (N,) after the last `seen` (N,) of frames (N, F, H, W, C) in [0, 1].

        With `draw` by their probabilities, otherwise the likeliest.
        """
        places = torch.arange(frames.shape[1], device=seen.device)
        logits = self(frames, places >= frames.shape[1] - seen[:, None])[:, -1].float()
        if draw:
            return torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return logits.argmax(-1)


def spans(values: Tensor, length: int) -> Tensor:
    """All overlapping spans (B (T - length + 1), length, ...) of sequences (B, T, ...)."""
    length = min(length, values.shape[1])
    begin = torch.arange(values.shape[1] - length + 1, device=values.device)
    places = begin[:, None] + torch.arange(length, device=values.device)
    return values[:, places].flatten(0, 1)


def real_actions(spec: Spec) -> int:
    """How many actions latent ones can stand for: 0 if there are none, too many, or other ones."""
    action = spec.action
    fit = action is not None and action.kind == "discrete" and action.n <= MOST_ACTIONS
    return action.n if fit else 0


def require_translatable(spec: Spec) -> None:
    """Refuses data whose actions cannot be told by latent ones.

    Raises:
        UserError: `real_actions` is 0.
    """
    if not real_actions(spec):
        raise UserError(
            f"Genie translates its latent actions into up to {MOST_ACTIONS} discrete ones, and "
            f"was made for {spec}: to act, train it on recordings with such actions"
        )


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

    def require_labels(self) -> None:
        """Refuses to translate before any labelled step was seen.

        Raises:
            UserError: it is empty.
        """
        if not self.steps:
            raise UserError(
                "this Genie has not cloned a policy from steps with actions: train it with "
                "policy_updates and labelled_steps above 0 on recordings that have actions, from "
                "these weights (--from)"
            )

    @torch.no_grad()
    def add(self, latent: Tensor, real: Tensor, most: float = torch.inf) -> None:
        """Counts pairs (N,) of actions, as long as there are fewer than `most` in all.

        Raises:
            UserError: real actions that there are not.
        """
        wrong = real[(real < 0) | (real >= self.real)]
        if len(wrong):
            raise UserError(
                f"there is no action {int(wrong[0])}: the data's are from 0 to {self.real - 1}"
            )
        room = most - float(self.steps)
        if room < len(latent):
            latent, real = latent[: int(room)], real[: int(room)]
        ones = torch.ones(len(latent), device=self.counts.device)
        self.counts.index_put_((latent, real), ones, accumulate=True)

    def translate(self, latent: Tensor, draw: bool) -> Tensor:
        """Real actions (N,) for latent ones (N,).

        A latent action that was never seen may be any: it has the frequencies of all together, and
        before the first label every real action is as likely (without `draw`, it is action 0).

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
