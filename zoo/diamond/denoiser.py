"""The denoiser of DIAMOND: which next frame is behind this noisy one, given the past?

Preconditioning and loss of EDM (Karras et al. 2022, table 1 and section 5) with the settings of
DIAMOND, and three things that its paper does not or hardly mention: noise of whole channels beside
that of pixels, outputs rounded to what a uint8 image can hold, and in training a second frame that
is predicted from the first predicted one.

Letters of shapes: N batch, L past frames, C channels, A length of an encoded action. Frames are
in [-1, 1]; a frame that is not known is 0, as is its action.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.diamond.sampler import Sampler
from zoo.diamond.unet import FrameNetwork


class Preconditioners(NamedTuple):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise); each (N,)."""

    c_in: Tensor
    c_out: Tensor
    c_skip: Tensor
    c_noise: Tensor


def preconditioners(sigma: Tensor, sigma_data: float, sigma_offset: float) -> Preconditioners:
    """EDM's factors (table 1) of noise levels (N,), with s^2 = sigma^2 + sigma_offset^2.

    c_in = (s^2 + sigma_data^2)^(-1/2), c_skip = sigma_data^2 / (s^2 + sigma_data^2),
    c_out = s sigma_data (s^2 + sigma_data^2)^(-1/2), c_noise = ln(s) / 4.

    Args:
        sigma: noise levels, above 0.
        sigma_data: standard deviation of the data.
        sigma_offset: standard deviation of the noise of whole channels.
    """
    level = (sigma.square() + sigma_offset**2).sqrt()
    total = level.square() + sigma_data**2
    c_in = total.rsqrt()
    return Preconditioners(c_in, level * sigma_data * c_in, sigma_data**2 / total, level.log() / 4)


def draw_sigma(
    count: int,
    loc: float,
    scale: float,
    low: float,
    high: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise levels (count,) for training: exp(N(loc, scale^2)), clipped to [low, high]."""
    noise = torch.randn(count, device=device, dtype=torch.float32)
    return (loc + scale * noise).exp().clamp(low, high)


def add_noise(frame: Tensor, sigma: Tensor, sigma_offset: float) -> Tensor:
    """Frames (N, C, H, W) with pixel noise of sigma (N,) and channel noise of sigma_offset.

    Without the noise of whole channels a denoiser learns to read brightness off any noisy frame,
    for averaged over the pixels noise nearly vanishes; then it trusts what it should correct
    (eloialonso/diamond, issue 36).
    """
    channel = torch.randn_like(frame[:, :, :1, :1])
    pixel = torch.randn_like(frame)
    return frame + sigma_offset * channel + sigma[:, None, None, None] * pixel


def quantise(frame: Tensor) -> Tensor:
    """Clips to [-1, 1] and rounds down to one of the 256 values of a uint8 image."""
    levels = (frame.clamp(-1, 1) + 1) * 127.5
    return levels.floor() / 127.5 - 1


def to_float(image: Tensor, known: Tensor | None = None) -> Tensor:
    """uint8 images (..., H, W, C) as frames (..., C, H, W) in [-1, 1]; 0 where not known (...)."""
    frame = image.movedim(-1, -3).float() / 127.5 - 1
    return frame if known is None else frame * known[..., None, None, None]


def to_uint8(frame: Tensor) -> Tensor:
    """The inverse of `to_float` for quantised frames."""
    return ((frame + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


class Condition(NamedTuple):
    """The past as the network takes it: frames (N, L * C, H, W), and its embedding (N, E)."""

    past: Tensor
    embedding: Tensor


class Denoiser(nn.Module):
    """Predicts the next frame from a noisy one and the past.

    Args:
        network: the raw network F.
        past: number of past frames L.
        sigma_data: standard deviation of the frames.
        sigma_offset: standard deviation of the noise of whole channels.
        sigma_loc, sigma_scale, sigma_low, sigma_high: of the noise levels in training.
        past_sigma: standard deviation of the noise of pixels on the past frames when sampling;
            in training they have any level then, and noise of whole channels, too (as the variant
            for Counter-Strike). 0 leaves them as they are.
    """

    def __init__(
        self,
        network: FrameNetwork,
        past: int,
        sigma_data: float = 0.5,
        sigma_offset: float = 0.3,
        sigma_loc: float = -0.4,
        sigma_scale: float = 1.2,
        sigma_low: float = 2e-3,
        sigma_high: float = 20.0,
        past_sigma: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.past = network, past
        self.sigma_data, self.sigma_offset = sigma_data, sigma_offset
        self.draw_sigma = partial(
            draw_sigma, loc=sigma_loc, scale=sigma_scale, low=sigma_low, high=sigma_high
        )
        self.past_sigma = past_sigma

    def condition(
        self, past: Tensor, action: Tensor, past_sigma: Tensor | None = None
    ) -> Condition:
        """What the network is to see of the past.

        Args:
            past: (N, L, C, H, W) past frames, the latest last.
            action: (N, L, A) encoded actions chosen at them.
            past_sigma: (N,) level of the pixels' noise on the past frames, if they have any; the
                network hears of ln(past_sigma) / 4.
        """
        past_noise = None if past_sigma is None else past_sigma.log() / 4
        embedding = self.network.embed_past(action, past_noise)
        return Condition(past.flatten(1, 2) / self.sigma_data, embedding)

    def raw(
        self, noisy: Tensor, sigma: Tensor, condition: Condition
    ) -> tuple[Tensor, Preconditioners]:
        """What the network F says of noisy frames, (N, C, H, W) float32, and the factors.

        Args:
            noisy: (N, C, H, W).
            sigma: (N,) its noise level.
            condition: the past.
        """
        factors = preconditioners(sigma, self.sigma_data, self.sigma_offset)
        scaled = noisy * factors.c_in[:, None, None, None]
        return self.network(scaled, factors.c_noise, *condition).float(), factors

    def combine(self, noisy: Tensor, output: Tensor, factors: Preconditioners) -> Tensor:
        """The quantised denoised frames D (N, C, H, W) of noisy ones and F's outputs."""
        c_skip, c_out = factors.c_skip[:, None, None, None], factors.c_out[:, None, None, None]
        return quantise(c_skip * noisy + c_out * output)

    def forward(self, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The quantised denoised frames (N, C, H, W); for the arguments see `raw`."""
        return self.combine(noisy, *self.raw(noisy, sigma, condition))

    @torch.no_grad()
    def next_frame(self, past: Tensor, action: Tensor, sampler: Sampler) -> Tensor:
        """Samples the quantised frames (N, C, H, W) that follow past (N, L, C, H, W)."""
        past_sigma = None
        if self.past_sigma:
            past_sigma = past.new_full((len(past),), self.past_sigma)
            past = self._noised(past, past_sigma, 0.0)
        denoise = partial(self.forward, condition=self.condition(past, action, past_sigma))
        shape = (past.shape[0], *past.shape[2:])
        return sampler(denoise, sampler.start_noise(shape, past.device))

    def loss(self, sequence: Tensor, action: Tensor, first: Tensor, targets: int) -> Tensor:
        """Mean squared error of F against (x - c_skip x_noisy) / c_out, a scalar.

        Of each sequence the last `targets` frames are predicted, one after the other, each from the
        frames before it in its episode, of which those that were predicted already are replaced by
        the prediction (without its gradient). First frames of episodes are no targets.

        Args:
            sequence: (N, T, C, H, W) in [-1, 1].
            action: (N, T, A) encoded.
            first: (N, T) bool, an episode begins here.
            targets: number of frames to predict, below T.
        """
        frames = list(sequence.unbind(1))
        episode = first.cumsum(1)
        losses = []
        for t in range(len(frames) - targets, len(frames)):
            past, actions = self._history(frames, action, episode, t)
            sigma = self.draw_sigma(len(past), device=past.device)
            past_sigma = None
            if self.past_sigma:
                past_sigma = self.draw_sigma(len(past), device=past.device)
                past = self._noised(past, past_sigma, self.sigma_offset)
            target = frames[t]
            noisy = add_noise(target, sigma, self.sigma_offset)
            condition = self.condition(past, actions, past_sigma)
            output, factors = self.raw(noisy, sigma, condition)
            c_skip, c_out = factors.c_skip[:, None, None, None], factors.c_out[:, None, None, None]
            error = (output - (target - c_skip * noisy) / c_out).square().mean((1, 2, 3))
            valid = ~first[:, t]
            losses.append((error * valid).sum() / valid.sum().clamp(min=1))
            if t + 1 < len(frames):
                predicted = self.combine(noisy, output.detach(), factors)
                frames[t] = torch.where(valid[:, None, None, None], predicted, target)
        return torch.stack(losses).mean()

    def _history(
        self, frames: list[Tensor], action: Tensor, episode: Tensor, t: int
    ) -> tuple[Tensor, Tensor]:
        """The L frames (N, L, C, H, W) and actions (N, L, A) before step t, of its episode only."""
        start = max(0, t - self.past)
        past, actions = torch.stack(frames[start:t], 1), action[:, start:t]
        here = episode[:, start:t] == episode[:, t : t + 1]
        past, actions = past * here[..., None, None, None], actions * here[..., None]
        missing = self.past - past.shape[1]
        if missing:
            past = torch.cat(
                [torch.zeros_like(past[:, :1]).expand(-1, missing, -1, -1, -1), past], 1
            )
            actions = torch.cat(
                [actions.new_zeros(len(actions), missing, actions.shape[2]), actions], 1
            )
        return past, actions

    def _noised(self, past: Tensor, sigma: Tensor, sigma_offset: float) -> Tensor:
        """Past frames (N, L, C, H, W) with noise of one level (N,) for each history."""
        return add_noise(past.flatten(1, 2), sigma, sigma_offset).view_as(past)
