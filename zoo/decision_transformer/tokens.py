"""How a trajectory becomes tokens: (return-to-go, state, action) of one step after the other.

The paper has two versions of this. For MuJoCo ("gym") a learned embedding of the episode's time
step is added to the three tokens of the step, and a LayerNorm follows. For Atari the tokens pass a
tanh, and get a learned embedding of their place in the context and one of the time step at which
the context begins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.base import Obs
from zoo.nets.transformer import INIT_STD
from zoo.rssm.observations import pixels
from zoo.rssm.vision import image_shape

STD_EPS = 1e-6  # added to the standard deviation of states (official code)


class Interleaver(nn.Module):
    """One token each for the return-to-go, the state and the action of a step.

    Args:
        spec: images (with the Atari CNN) and vectors (standardised, with one linear map) in any
            mix, whose tokens are added, and actions of any kind.
        width: D, of the tokens.
        returns: whether there are tokens of returns.
        squash: the tokens pass a tanh (Atari).
        frames: number of successive frames that the CNN sees, stacked along the channels.
    """

    obs_mean: Tensor
    obs_std: Tensor

    def __init__(self, spec: Spec, width: int, returns: bool, squash: bool, frames: int) -> None:
        super().__init__()
        self.images, self.vectors, self.frames = spec.images, spec.vectors, frames
        self.squash = torch.tanh if squash else nn.Identity()
        self.kinds = 3 if returns else 2
        if returns:
            self.return_ = nn.Linear(1, width)
        if self.vectors:
            size = sum(spec.obs[key].size for key in self.vectors)
            self.state = nn.Linear(size, width)
            self.register_buffer("obs_mean", torch.zeros(size))
            self.register_buffer("obs_std", torch.ones(size))
        if self.images:
            height, width_, channels = image_shape(spec)
            self.vision = atari_cnn((height, width_, channels * frames), width)
        # One-hot actions of the Atari version pick a row of an embedding: no bias.
        self.action = nn.Linear(spec.action.encoded_size, width, bias=not squash)
        if squash:  # the others keep PyTorch's start, officially, too
            nn.init.normal_(self.action.weight, std=INIT_STD)

    def forward(self, return_to_go: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """Interleaved tokens (B, kinds * K, D) of K steps.

        Args:
            return_to_go: (B, K), scaled; not looked at without tokens of returns.
            state: (B, K, D), from `read_state`.
            action: (B, K, A), encoded.
        """
        tokens = [*self.read_return(return_to_go), state, self.read_action(action)]
        return torch.stack(tokens, 2).flatten(1, 2)

    def read_return(self, return_to_go: Tensor) -> list[Tensor]:
        """Tokens (..., D) of scaled returns-to-go (...); an empty list if there are none."""
        return [self.squash(self.return_(return_to_go[..., None]))] if self.kinds == 3 else []

    def read_action(self, action: Tensor) -> Tensor:
        """Tokens (..., D) of encoded actions (..., A)."""
        token: Tensor = self.squash(self.action(action))
        return token

    def read_state(self, obs: Obs) -> Tensor:
        """Tokens of the states (B, K, D) of observations {key: (B, K, ...)}.

        Images have all the frames that the CNN sees: (B, K, frames, H, W, C).
        """
        tokens = []
        if self.vectors:
            flat = [obs[key].float().reshape(*obs[key].shape[:2], -1) for key in self.vectors]
            vector = (torch.cat(flat, -1) - self.obs_mean) / (self.obs_std + STD_EPS)
            tokens.append(self.state(vector))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            stacked = image.movedim(2, -2).flatten(-2)
            seen = self.vision(pixels(stacked.flatten(0, 1).movedim(-1, 1)))
            tokens.append(seen.unflatten(0, stacked.shape[:2]))
        state: Tensor = self.squash(sum(tokens[1:], tokens[0]))
        return state

    def standardize(self, statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Takes over mean and standard deviation of each vector key of the data."""
        for buffer, values in zip(
            (self.obs_mean, self.obs_std),
            zip(*(statistics[key] for key in self.vectors), strict=True),
            strict=True,
        ):
            buffer.copy_(torch.cat([value.flatten() for value in values]))


class EpisodeTime(nn.Module):
    """Adds an embedding of the episode's time step, then LayerNorm (gym)."""

    def __init__(self, width: int, max_timestep: int) -> None:
        super().__init__()
        self.step = nn.Embedding(max_timestep, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, timestep: Tensor, slots: Tensor) -> Tensor:
        """Embedded tokens (B, T, D); see `ContextTime` for the arguments."""
        embedded: Tensor = self.norm(
            tokens + self.step(timestep.clamp(0, self.step.num_embeddings - 1))
        )
        return embedded


class ContextTime(nn.Module):
    """Adds an embedding of the place in the context, and one of its first time step (Atari)."""

    def __init__(self, width: int, max_timestep: int, slots: int, kinds: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.start = nn.Embedding(max_timestep, width)
        self.slot = nn.Embedding(slots, width)
        nn.init.zeros_(self.start.weight)
        nn.init.zeros_(self.slot.weight)

    def forward(self, tokens: Tensor, timestep: Tensor, slots: Tensor) -> Tensor:
        """Embedded tokens (B, T, D).

        Args:
            tokens: (B, T, D).
            timestep: (B, T) of the steps that they belong to, from 0 at the start of the episode.
            slots: (B, T) their places among all tokens of the context.
        """
        start = (timestep - slots // self.kinds).clamp(0, self.start.num_embeddings - 1)
        return tokens + self.slot(slots) + self.start(start)


def atari_cnn(shape: tuple[int, int, int], width: int) -> nn.Sequential:
    """Three convolutions and a linear map (Mnih et al., 2015), to vectors of length `width`.

    Args:
        shape: height, width and channels of the images; at least 36 pixels a side.
    """
    *sides, channels = shape
    if min(sides) < 36:
        raise UserError(
            f"DecisionTransformer: images of {sides[0]}x{sides[1]} are too small for its three "
            "convolutions, which need 36x36: resize them"
        )
    for kernel, stride in ((8, 4), (4, 2), (3, 1)):
        sides = [(side - kernel) // stride + 1 for side in sides]
    return nn.Sequential(
        nn.Conv2d(channels, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(sides[0] * sides[1] * 64, width),
    )


def stack_frames(image: Tensor, first: Tensor, frames: int) -> Tensor:
    """Each image with those before it, oldest first: (B, K, ...) to (B, K, frames, ...).

    Args:
        image: (B, K, H, W, C).
        first: (B,) index of the first valid image, which stands for all before it.
        frames: number of images to stack.
    """
    steps = torch.arange(image.shape[1], device=image.device)
    back = torch.arange(frames - 1, -1, -1, device=image.device)
    index = (steps[:, None] - back).clamp(min=0).expand(len(image), -1, -1)
    index = torch.maximum(index, first[:, None, None])
    return image[torch.arange(len(image), device=image.device)[:, None, None], index]
