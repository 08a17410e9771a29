"""Lambda-returns and the normalisation of returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lambda_returns(
    reward: Tensor, value: Tensor, discount: Tensor, last: Tensor | None, lam: float
) -> Tensor:
    """TD(lambda) returns R_t = r_{t+1} + d_{t+1} ((1 - l_{t+1}) v_{t+1} + l_{t+1} R_{t+1}).

    Here d is the discount on arriving (0 where the task ended), l = lam, but 0 where the recording
    ends, so that a truncated sequence bootstraps from its last value (DreamerV3, critic learning).

    Args:
        reward: (N, T + 1), earned on arriving at each step; the first is not used.
        value: (N, T + 1) bootstrap values; the first is not used.
        discount: (N, T + 1) factor for what comes at and after each step, in [0, 1].
        last: (N, T + 1) bool, the recording ends at this step; None for nowhere.
        lam: lambda in [0, 1].

    Returns:
        (N, T) returns of steps 0 to T - 1.
    """
    if last is None:
        mix: Tensor | float = lam
        interim = reward[:, 1:] + discount[:, 1:] * (1 - lam) * value[:, 1:]
    else:
        mix = lam * (~last[:, 1:]).float()
        interim = reward[:, 1:] + discount[:, 1:] * (1 - mix) * value[:, 1:]
    steps = interim.unbind(1)
    decays = (discount[:, 1:] * mix).unbind(1)
    result = value[:, -1]
    returns = []
    for step, decay in zip(reversed(steps), reversed(decays), strict=True):
        result = torch.addcmul(step, decay, result)
        returns.append(result)
    return torch.stack(returns[::-1], 1)


class ReturnNormalizer(nn.Module):
    """Running range between the 5th and 95th percentile of returns (DreamerV3, actor learning).

    The scale is max(floor, P95 - P5), both percentiles as exponential moving averages of the
    batch's. Under DDP the percentiles are those of the joined batch of all ranks.

    Args:
        rate: weight of a new batch.
        low, high: quantiles in [0, 1].
        floor: smallest scale, so that sparse rewards are not blown up to noise.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, rate: float = 0.01, low: float = 0.05, high: float = 0.95, floor: float = 1.0
    ) -> None:
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("quantiles", torch.tensor([low, high]), persistent=False)
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Takes in a batch of returns of any shape."""
        flat = returns.detach().float().flatten()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, flat)
            flat = torch.cat(parts)
        low, high = torch.quantile(flat, self.quantiles)  # type: ignore[arg-type]
        self.low.lerp_(low, self.rate)
        self.high.lerp_(high, self.rate)

    @property
    def scale(self) -> Tensor:
        """max(floor, high - low), a scalar."""
        return (self.high - self.low).clamp(min=self.floor)
