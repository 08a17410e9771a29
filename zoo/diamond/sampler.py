"""The sampler of DIAMOND: a few deterministic steps from noise to a frame (EDM, algorithm 1).

Karras, Aittala, Aila and Laine, "Elucidating the Design Space of Diffusion-Based Generative
Models", 2022. It knows nothing of frames: a denoiser is any function D(x, sigma).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.errors import UserError
from zoo.arguments import reject_fractions, reject_outside, reject_unknown, reject_unless_positive

MOST_SIGMA = 1e6  # beside such noise float32 rounds a frame to steps of 0.06


def karras_sigmas(
    steps: int, sigma_min: float = 2e-3, sigma_max: float = 5.0, rho: float = 7.0
) -> Tensor:
    """Noise levels (steps + 1,), falling from sigma_max to sigma_min, and then 0 (EDM, equation 5).

    sigma_i = (max^(1/rho) + i / (steps - 1) (min^(1/rho) - max^(1/rho)))^rho; a single step starts
    at sigma_max.

    Example:
        >>> [round(sigma, 3) for sigma in karras_sigmas(3).tolist()]
        [5.0, 0.283, 0.002, 0.0]
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


@dataclass(frozen=True)
class Sampler:
    """Solves the probability-flow equation dx / dsigma = (x - D(x, sigma)) / sigma.

    Args:
        steps: noise levels; with order 1 each costs one call of the denoiser, with order 2 they
            cost 2 steps - 1 together.
        sigma_min, sigma_max, rho: see `karras_sigmas`.
        order: 1 (Euler) or 2 (Heun).
        start_std: standard deviation of the noise to start from. Theory would have sigma_max; 1 is
            DIAMOND's choice, which keeps long dreams from drifting (eloialonso/diamond, issue 40),
            and which hides uncertain events: see README.md.

    Raises:
        UserError: an argument out of range.
    """

    steps: int = 3
    sigma_min: float = 2e-3
    sigma_max: float = 5.0
    rho: float = 7.0
    order: Literal[1, 2] = 1
    start_std: float = 1.0

    def __post_init__(self) -> None:
        reject_fractions("Sampler", steps=self.steps, order=self.order)
        reject_outside("Sampler", 1, float("inf"), steps=self.steps)
        positive = {"sigma_min": self.sigma_min, "rho": self.rho, "start_std": self.start_std}
        reject_unless_positive("Sampler", **positive)
        reject_outside("Sampler", self.sigma_min, MOST_SIGMA, sigma_max=self.sigma_max)
        reject_outside("Sampler", 1, 2, order=self.order)

    @torch.no_grad()
    def __call__(self, denoise: Callable[[Tensor, Tensor], Tensor], start: Tensor) -> Tensor:
        """Follows the equation from `start` (N, ...) at sigma_max down to 0.

        Args:
            denoise: D(x, sigma) of x (N, ...) and sigma (N,).
            start: the noise to begin with, see `start_noise`.

        Returns:
            The last output of the denoiser (N, ...), exactly.
        """
        x = start
        sigmas = karras_sigmas(self.steps, self.sigma_min, self.sigma_max, self.rho).tolist()
        for sigma, following in pairwise(sigmas):
            level = x.new_full((len(x),), sigma)
            denoised = denoise(x, level)
            if not following:
                return denoised  # x + (x - D) / sigma * (0 - sigma), without its rounding
            slope = (x - denoised) / sigma
            ahead = x + slope * (following - sigma)
            if self.order == 2:
                corrected = (ahead - denoise(ahead, torch.full_like(level, following))) / following
                ahead = x + (slope + corrected) / 2 * (following - sigma)
            x = ahead
        raise AssertionError("the last noise level is 0")

    def start_noise(
        self, shape: tuple[int, ...], device: torch.device | str | None = None
    ) -> Tensor:
        """Normal noise of deviation `start_std` to start from."""
        return self.start_std * torch.randn(shape, device=device, dtype=torch.float32)


# "published" is DIAMOND's; "faithful" (ours) starts as theory has it and shows uncertain events
# about as often as they are, with 9 calls of the denoiser in place of 3.
SAMPLERS = {
    "published": Sampler(),
    "faithful": Sampler(steps=5, sigma_min=0.05, sigma_max=5.0, order=2, start_std=5.0),
}


def make_sampler(chosen: str | Mapping[str, Any]) -> Sampler:
    """One of `SAMPLERS` by name, or a `Sampler` of these arguments.

    Raises:
        UserError: an unknown name or argument, or an argument out of range.
    """
    if isinstance(chosen, str):
        reject_unknown("Diamond", SAMPLERS, sampler=chosen)
        return SAMPLERS[chosen]
    if not isinstance(chosen, Mapping):
        raise UserError(
            f"Diamond has no sampler {chosen}: give one of {', '.join(SAMPLERS)}, or arguments "
            "such as {steps: 3}"
        )
    known = [field.name for field in fields(Sampler)]
    for key in chosen:
        if key not in known:
            raise UserError(f"sampler has no '{key}': choose from {', '.join(known)}")
    return Sampler(**chosen)
