"""The agent of DIAMOND: a convolutional LSTM with a policy and a value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.spec import ActionSpec
from zoo.diamond.lstm import LSTM, Memory
from zoo.diamond.unet import GroupNorm, cast, conv3x3, cut
from zoo.nets.distributions import BoundedNormal, Categorical, Policy


class SmallResBlock(nn.Module):
    """Norm, SiLU and convolution, added to the (projected) input."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.conv = conv3x3(channels, out)
        self.project = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, out, H, W)."""
        out: Tensor = self.project(x) + self.conv(F.silu(self.norm(x)))
        return out


class ActorCritic(nn.Module):
    """Sees a frame, remembers, says what to do and what to expect.

    Args:
        image: height, width and channels of a frame.
        action: the action space.
        channels: of the residual blocks, each of which halves height and width.
        hidden: units of the LSTM.
        patch: of the `FrameNetwork`.
        normalize: black is 0, and a LayerNorm stands before the LSTM (ours). Where most of a frame
            is black, its -1 is most of the features, and a small agent hardly sees the rest.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        action: ActionSpec,
        channels: Sequence[int],
        hidden: int,
        patch: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        (height, width), colours = (-(-side // patch) for side in image[:2]), image[2]
        self.action, self.patch = action, patch
        self.black = -1.0 if normalize else 0.0
        layers: list[nn.Module] = [conv3x3(colours * patch**2, channels[0])]
        for before, here in pairwise([channels[0], *channels]):
            layers += [SmallResBlock(before, here), nn.MaxPool2d(2)]
            height, width = height // 2, width // 2
        features = channels[-1] * height * width
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        self.norm = nn.LayerNorm(features) if normalize else nn.Identity()
        self.lstm = LSTM(features, hidden)
        self.actor = nn.Linear(hidden, action.encoded_size * (2 if action.kind == "box" else 1))
        self.critic = nn.Linear(hidden, 1)
        for layer in (self.actor, self.critic):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, frame: Tensor, memory: Memory) -> tuple[Policy, Tensor, Memory]:
        """The policy over encoded actions (N, A) and value (N,) of frames (N, C, H, W)."""
        memory = self.lstm(self._seen(frame), memory)
        h = cast(memory.h, self.actor)
        return self._policy(h), self.critic(h).float().squeeze(-1), memory

    def burn_in(self, frames: Tensor, first: Tensor) -> Memory:
        """The memories (N, T, hidden) with which each of frames (N, T, C, H, W) is met."""
        count, steps = first.shape
        seen = self._seen(frames[:, :-1].flatten(0, 1))
        return self.lstm.steps(seen.unflatten(0, (count, steps - 1)), first)

    def _seen(self, frame: Tensor) -> Tensor:
        seen = cut(frame - self.black if self.black else frame, self.patch)
        out: Tensor = self.norm(self.encoder(cast(seen, self.encoder[0])))
        return out

    def _policy(self, h: Tensor) -> Policy:
        out = self.actor(h)
        if self.action.kind == "box":
            return BoundedNormal(*out.chunk(2, -1))
        return Categorical(out, self.action.nvec)


def actor_critic_losses(
    log_prob: Tensor, entropy: Tensor, value: Tensor, returns: Tensor
) -> dict[str, Tensor]:
    """REINFORCE with the value as baseline, means over all.

    actor: -log pi (R - V), in which the advantage has no gradient; critic: (V - R)^2;
    entropy: its negative, to be weighted.

    Args:
        log_prob: (N, H) of the actions taken.
        entropy: (N, H) of the policies, in nats.
        value: (N, H) V of the states acted in.
        returns: (N, H) lambda-returns R from there.
    """
    returns = returns.detach()
    advantage = (returns - value).detach()
    return {
        "actor": -(log_prob * advantage).mean(),
        "critic": F.mse_loss(value, returns),
        "entropy": -entropy.mean(),
    }
