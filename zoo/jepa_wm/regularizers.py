"""What keeps latents from collapsing to a constant, each term a function of latents.

Variance, covariance and similarity are those of EB-JEPA (Terver et al., 2026), after VICReg (Bardes
et al., 2022); SIGReg is of LeJEPA (Balestriero and LeCun, 2025), as EB-JEPA computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.nets.ranks import mean_over_ranks

VARIANCE_EPS = 1e-4


def variance_loss(x: Tensor) -> Tensor:
    """Mean over features of max(0, 1 - sqrt(var + 1e-4)), over the rows of x (N, D)."""
    std = (x.var(0) + VARIANCE_EPS).sqrt()
    return torch.relu(1 - std).mean()


def covariance_loss(x: Tensor) -> Tensor:
    """Mean of the squares of all D (D - 1) covariances between different features of x (N, D)."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    different = covariance.square().sum() - covariance.diagonal().square().sum()
    return different / (x.shape[1] * (x.shape[1] - 1))


def similarity_loss(latents: Tensor, goes_on: Tensor) -> Tensor:
    """Mean squared difference of successive latents (B, T, D) where `goes_on` (B, T - 1)."""
    return masked_mean((latents[:, 1:] - latents[:, :-1]).square().mean(-1), goes_on)


def sigreg_loss(x: Tensor, seed: int, slices: int = 256, knots: int = 10) -> Tensor:
    """How far x (N, D) is from a standard normal: the mean of Epps-Pulley tests of its slices.

    A slice is the projection on a random unit vector. With its characteristic function f, the test
    is the integral of |f(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) over [-3, 3], by the trapezoidal rule.
    It is not multiplied by N.

    Args:
        x: (N, D).
        seed: of the directions; the same on all ranks, another one at each step.
        slices: number of directions.
        knots: of the trapezoidal rule.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same for all devices
    directions = torch.randn(x.shape[1], slices, generator=generator)
    directions = (directions / directions.norm(dim=0)).to(x)
    t = torch.linspace(-3.0, 3.0, knots).to(x)
    normal = torch.exp(-t.square() / 2)
    angle = (x @ directions).unsqueeze(-1) * t  # (N, slices, knots)
    error = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()
    return torch.trapezoid(error * normal, t).mean()


class InverseDynamics(nn.Sequential):
    """The encoded action (N, A) (discrete: its logits) between latents, side by side (N, 2 D).

    Args:
        latent: D.
        action: A.
        hidden: width of its two hidden layers.
    """

    def __init__(self, latent: int, action: int, hidden: int = 256) -> None:
        super().__init__(
            nn.Linear(2 * latent, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, action),
        )


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the values (B, T) where `valid` (B, T), over the batches of all ranks.

    The mean of what the ranks get is that mean: they divide by the mean of their counts.
    """
    count = mean_over_ranks(valid.sum().float())
    return (values * valid).sum() / count.clamp(min=1)
