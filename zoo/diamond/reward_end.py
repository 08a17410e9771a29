"""What did that step earn, and did it end the task?

A convolutional network looks at two successive frames and the action between them, an LSTM
remembers, and a small MLP gives the probabilities of the reward's sign and of the end.

Letters of shapes: N batch, T steps, C channels, A length of an encoded action.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.diamond.lstm import LSTM, Memory
from zoo.diamond.unet import ActionEmbedding, Conditioning, ResBlock, cast, conv3x3, cut, downsample

REWARDS = (-1.0, 0.0, 1.0)


class Outcome(NamedTuple):
    """Logits of the sign of the reward (..., 3) and of going on or ending (..., 2), float32."""

    reward: Tensor
    end: Tensor

    def expected_reward(self) -> Tensor:
        """The expected sign (...)."""
        probs = self.reward.softmax(-1)
        return probs[..., 2] - probs[..., 0]

    def end_probability(self) -> Tensor:
        """The probability (...) that the task ended."""
        return self.end.softmax(-1)[..., 1]

    def sample(self) -> tuple[Tensor, Tensor]:
        """Rewards (N,) in {-1, 0, 1} and ends (N,) bool, of logits (N, ...)."""
        reward = torch.multinomial(self.reward.softmax(-1), 1).squeeze(1) - 1
        end = torch.multinomial(self.end.softmax(-1), 1).squeeze(1)
        return reward.float(), end.bool()

    @classmethod
    def nothing(cls, count: int, device: torch.device) -> Outcome:
        """That of `count` steps which surely earn 0 and go on."""
        reward = torch.full((count, len(REWARDS)), -torch.inf, device=device)
        end = torch.full((count, 2), -torch.inf, device=device)
        reward[:, REWARDS.index(0.0)] = end[:, 0] = 0.0
        return cls(reward, end)


class RewardEndModel(nn.Module):
    """Predicts the sign of the reward and the end of the task.

    Args:
        image: height, width and channels of a frame.
        actions: length A of an encoded action.
        channels, depths: of the residual blocks on each level, from the finest.
        width: of the conditioning on the action.
        hidden: units of the LSTM and of the head.
        attention: whether two blocks with attention follow the coarsest level.
        patch: of the `FrameNetwork`.
        normalize: a LayerNorm before the LSTM (ours). What is the same in all frames is most of the
            features, and saturates its gates: without, a small model learns several times slower.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        actions: int,
        channels: Sequence[int],
        depths: Sequence[int],
        width: int,
        hidden: int,
        attention: bool = True,
        patch: int = 1,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        (height, width_), colours = (-(-side // patch) for side in image[:2]), image[2]
        self.patch = patch
        self.action = ActionEmbedding(actions, width)
        self.conv_in = conv3x3(2 * colours * patch**2, channels[0])
        self.downsamples = nn.ModuleList(downsample(a, a) for a, _ in pairwise(channels))
        self.levels = nn.ModuleList()
        before = channels[0]
        for here, depth in zip(channels, depths, strict=True):
            blocks = [ResBlock(before if i == 0 else here, here) for i in range(depth)]
            self.levels.append(nn.ModuleList(blocks))
            before = here
        if attention:
            self.levels.append(nn.ModuleList(ResBlock(before, before, True) for _ in range(2)))
        self.conditioning = Conditioning(width, self._blocks())
        for _ in self.downsamples:
            height, width_ = (height + 1) // 2, (width_ + 1) // 2
        features = before * height * width_
        self.norm = nn.LayerNorm(features) if normalize else nn.Identity()
        self.lstm = LSTM(features, hidden)
        self.head = nn.Sequential(
            nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, len(REWARDS) + 2, bias=False)
        )

    def features(self, frame: Tensor, following: Tensor, action: Tensor) -> Tensor:
        """What is seen of steps from frames (N, C, H, W) by actions (N, A) to the next, (N, F)."""
        films = self.conditioning(self.action(cast(action, self.action)))
        x = cut(torch.cat([frame, following], 1), self.patch)
        x = self.conv_in(cast(x, self.conv_in))
        for level, blocks in enumerate(self.levels):
            if 0 < level <= len(self.downsamples):
                x = self.downsamples[level - 1](x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, films)
        out: Tensor = self.norm(x.flatten(1))
        return out

    def step(
        self, frame: Tensor, following: Tensor, action: Tensor, memory: Memory
    ) -> tuple[Outcome, Memory]:
        """The outcome of one step of each of N episodes, and the memory after it."""
        memory = self.lstm(self.features(frame, following, action), memory)
        return self._outcome(memory.h), memory

    def burn_in(self, frames: Tensor, action: Tensor, first: Tensor) -> Memory:
        """The memories (N, T, hidden) with which each step from frames (N, T, C, H, W) is met.

        Args:
            frames: in [-1, 1].
            action: (N, T, A) encoded, chosen at the frames.
            first: (N, T) bool, an episode begins at this frame.
        """
        n, t = action.shape[0], action.shape[1] - 1
        pairs = (frames[:, :-1], frames[:, 1:], action[:, :-1])
        seen = self.features(*(part.flatten(0, 1) for part in pairs))
        return self.lstm.steps(seen.unflatten(0, (n, t)), first)

    def forward(self, frames: Tensor, action: Tensor, first: Tensor) -> Outcome:
        """Outcomes (N, T - 1, ...) of the steps between frames; for the arguments see `burn_in`.

        What is said of steps from one episode into the next means nothing.
        """
        return self._outcome(self.burn_in(frames, action, first).h[:, 1:])

    def losses(
        self, frames: Tensor, action: Tensor, first: Tensor, reward: Tensor, terminal: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropies of the reward's sign and of the end, means over the steps of episodes.

        Args:
            frames, action, first: as of `burn_in`.
            reward: (N, T) earned on arriving.
            terminal: (N, T) bool, the task ended on arriving.
        """
        outcome: Outcome = self(frames, action, first)
        valid = ~first[:, 1:]
        count = valid.sum().clamp(min=1)
        wanted = {"reward": reward[:, 1:].sign().long() + 1, "end": terminal[:, 1:].long()}
        found = {}
        for key, logits in outcome._asdict().items():
            loss = F.cross_entropy(logits.movedim(-1, 1), wanted[key], reduction="none")
            found[key] = (loss * valid).sum() / count
        return found

    def _outcome(self, h: Tensor) -> Outcome:
        reward, end = self.head(cast(h, self.head[0])).float().split([len(REWARDS), 2], -1)
        return Outcome(reward, end)

    def _blocks(self) -> list[ResBlock]:
        return [block for blocks in self.levels for block in blocks]  # type: ignore[attr-defined]
