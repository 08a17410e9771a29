"""Planning: searches for the action sequences whose imagined outcome scores best.

A planner keeps a belief over encoded action sequences (`ActionCodec`): a normal in [-1, 1] for box
actions, a categorical for each step (and component) of discrete ones. Each iteration draws
candidates, imagines all of them for all environments in one batch, and refits the belief to the
best ones, the elites. Nothing is decoded, and no gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.base import Imagined, State
from zoo.nets.actions import ActionCodec
from zoo.nets.distributions import draw

SMOOTHING = 0.05  # share of discrete actions drawn uniformly, so that none is lost for good


def predicted_return(imagined: Imagined) -> Tensor:
    """Sum of the predicted rewards (N,), without discount or value (PlaNet, Algorithm 2)."""
    return imagined.reward.float().sum(1)


def continued_return(imagined: Imagined) -> Tensor:
    """Sum of the predicted rewards (N,), each times the probability that the task got so far."""
    reached = torch.ones_like(imagined.reward, dtype=torch.float32)
    reached[:, 1:] = imagined.cont[:, :-1].float().cumprod(1)
    return (imagined.reward.float() * reached).sum(1)


def last_reward(imagined: Imagined) -> Tensor:
    """Predicted reward (N,) of the last step: where a plan ends is all that counts."""
    return imagined.reward[:, -1].float()


def weighted_moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, ...) of x (B, K, ...) under weights (B, K) that sum to one."""
    weights = weights.view(*weights.shape, *(1,) * (x.dim() - 2))
    mean = (weights * x).sum(1)  # a matmul would leave float32 in autocast
    return mean, (weights * (x - mean.unsqueeze(1)).square()).sum(1)


class Dreams(Protocol):
    """What a planner needs of an `Imaginer`."""

    def imagine(
        self, state: State, actions: Tensor | Callable[[State], Tensor] | None, horizon: int
    ) -> Imagined:
        """As in `Imaginer`."""


class Plan(NamedTuple):
    """What a planner found for B environments.

    Attributes:
        action: (B, H) or (B, H, A) mean (discrete: mode) of the last belief, in the units of the
            environment; `action[:, 0]` is to be executed.
        value: (B,) mean score of the last elites, weighted as in the refit.
        mean: (B, H, E) mean of the last belief over encoded actions: probabilities of discrete
            ones. As `previous` it warm-starts the next plan.
        std: (B, H, E) its standard deviation.
    """

    action: Tensor
    value: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True)
class CEM:
    """The cross-entropy method; the defaults are PlaNet's (Algorithm 2, and its code).

    The belief becomes N(mean, var + 1e-6) of the elites, or their frequencies where actions are
    discrete.

    Args:
        horizon: actions H that a plan looks ahead.
        block: successive actions that are the same, so that there are H / block to choose.
        iterations: how often the belief is refitted.
        candidates: action sequences of each environment in an iteration.
        elites: how many of them refit the belief.
        init_std: standard deviation of the first belief over box actions in [-1, 1].
        momentum: share in [0, 1) of the last belief that a refit keeps.
        policy_candidates: how many of the candidates come from the imaginer's own policy; drawn
            once, and offered in every iteration (TD-MPC2).
    """

    box_only: ClassVar[bool] = False
    horizon: int = 12
    block: int = 1
    iterations: int = 10
    candidates: int = 1000
    elites: int = 100
    init_std: float = 1.0
    momentum: float = 0.0
    policy_candidates: int = 0

    def __post_init__(self) -> None:
        self._require("horizon", self.horizon >= 1, "at least 1")
        divides = self.block >= 1 and self.horizon % self.block == 0
        self._require("block", divides, f"a divisor of the horizon {self.horizon}")
        self._require("iterations", self.iterations >= 1, "at least 1")
        self._require("elites", 1 <= self.elites <= self.candidates, f"in [1, {self.candidates}]")
        self._require("init_std", self.init_std > 0, "positive")
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        few = 0 <= self.policy_candidates < self.candidates
        self._require("policy_candidates", few, f"in [0, {self.candidates})")

    @torch.no_grad()
    def plan(
        self,
        imaginer: Dreams,
        state: State,
        codec: ActionCodec,
        previous: Tensor | None = None,
        score: Callable[[Imagined], Tensor] = predicted_return,
    ) -> Plan:
        """Plans for all environments at once.

        Args:
            imaginer: what dreams.
            state: {key: (B, ...)} where the environments are.
            codec: of their actions, on the device of the state.
            previous: `Plan.mean` (B, H, E) of one step ago, which warm-starts the belief; rows of
                zeros start afresh, as after a reset.
            score: what to maximise, (N,) from an `Imagined` of N = B * candidates rows, in which
                those of an environment are adjacent: `unflatten(0, (B, -1))` separates them.
                Scores that are not finite never become elites.

        Raises:
            UserError: actions that this cannot plan, or no finite score for an environment.
        """
        spec = codec.spec
        if self.box_only and spec.kind != "box":
            raise UserError(f"{type(self).__name__} cannot plan {spec.kind} actions: use CEM")
        any_state = next(iter(state.values()))
        batch, device = len(any_state), any_state.device
        uniform = _uniform(spec, device).repeat(batch, self.horizon, 1)
        mean = uniform if previous is None else _shift(spec, previous, uniform)
        mean, uniform = (x.unflatten(1, (-1, self.block)).mean(2) for x in (mean, uniform))
        std = torch.full_like(mean, self.init_std)
        proposals = self._proposals(imaginer, state, codec)
        starts = _repeat(state, self.candidates)
        drawn = self.candidates - self.policy_candidates
        hopeless = torch.zeros(batch, dtype=torch.bool, device=device)
        for _ in range(self.iterations):
            sequences = _sample(spec, mean, std, uniform, drawn)
            if proposals is not None:
                sequences = torch.cat([sequences, proposals], 1)
            actions = codec.decode(self._held(sequences.flatten(0, 1)))
            scores = score(imaginer.imagine(starts, actions, self.horizon)).float()
            scores = scores.reshape(batch, self.candidates)
            scores = scores.masked_fill(~scores.isfinite(), -torch.inf)
            hopeless |= (scores == -torch.inf).all(1)
            scores, best = scores.topk(self.elites, 1, sorted=False)
            weights = self._weights(scores).nan_to_num(0.0)  # NaN where hopeless
            elites = torch.take_along_dim(sequences, best[..., None, None], 1)
            elite_mean, variance = weighted_moments(elites, weights)
            mean = elite_mean.lerp(mean, self.momentum)
            std = self._std(variance).lerp(std, self.momentum)
        if hopeless.any():  # asked once, since each time a GPU would have to be waited for
            raise UserError(
                f"no plan of environment {int(hopeless.nonzero()[0])} has a finite score: the "
                "world model has diverged, load an earlier checkpoint"
            )
        value = (weights * scores.nan_to_num()).sum(1)
        mean, std = self._held(mean), self._held(std)
        return Plan(codec.decode(mean), value, mean, std)

    def _weights(self, scores: Tensor) -> Tensor:
        """Weights (B, K) of elites that sum to one; those of score -inf weigh nothing."""
        valid = (scores > -torch.inf).float()
        return valid / valid.sum(1, keepdim=True)

    def _std(self, variance: Tensor) -> Tensor:
        return (variance + 1e-6).sqrt()

    def _proposals(self, imaginer: Dreams, state: State, codec: ActionCodec) -> Tensor | None:
        if not self.policy_candidates:
            return None
        starts = _repeat(state, self.policy_candidates)
        actions = codec.encode(imaginer.imagine(starts, None, self.horizon).action)
        return actions[:, :: self.block].clamp(-1, 1).unflatten(0, (-1, self.policy_candidates))

    def _held(self, blocks: Tensor) -> Tensor:
        """Each of the (N, H / block, E) choices for as many actions as a block has: (N, H, E)."""
        return blocks.repeat_interleave(self.block, 1) if self.block > 1 else blocks

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            given = getattr(self, name)
            raise UserError(f"{name} of {type(self).__name__} must be {what}, got {given}")


@dataclass(frozen=True, kw_only=True)
class MPPI(CEM):
    """Model predictive path integral control (Williams et al. 2017), for box actions.

    The defaults are TD-MPC2's. Elites weigh softmax(score / temperature) in the refit. TD-MPC2
    executes an elite drawn by weight; here the mean is the plan, as in Williams et al.

    Args:
        temperature: lambda of Williams et al., in units of the score. The `temperature` 0.5 of
            TD-MPC2 multiplies the score: it is the inverse of this one.
        min_std, max_std: bounds of the refitted standard deviation.
    """

    box_only = True
    horizon: int = 3
    iterations: int = 6
    candidates: int = 512
    elites: int = 64
    init_std: float = 2.0
    temperature: float = 2.0
    min_std: float = 0.05
    max_std: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("temperature", self.temperature > 0, "positive")
        self._require("min_std", 0 < self.min_std <= self.max_std, f"in (0, {self.max_std}]")

    def _weights(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / self.temperature, 1)

    def _std(self, variance: Tensor) -> Tensor:
        return variance.sqrt().clamp(self.min_std, self.max_std)


def _sample(spec: ActionSpec, mean: Tensor, std: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Encoded sequences (B, count, H, E) of a belief (B, H, E)."""
    shape = (len(mean), count, mean.shape[1])
    if spec.kind == "box":
        noise = torch.randn(*shape, mean.shape[2], device=mean.device)
        return torch.addcmul(mean.unsqueeze(1), std.unsqueeze(1), noise).clamp_(-1, 1)
    probs = mean.lerp(uniform, SMOOTHING).unsqueeze(1)
    noise = torch.rand(*shape, len(spec.nvec), device=mean.device)
    parts = zip(probs.split(spec.nvec, -1), noise.split(1, -1), strict=True)
    return torch.cat([draw(*part) for part in parts], -1)


def _shift(spec: ActionSpec, previous: Tensor, uniform: Tensor) -> Tensor:
    """The first mean (B, H, E): that of one step ago moved by one, its new last step uniform."""
    rest, fresh = previous[:, 1:], uniform[:, 1:]
    # A converged categorical samples nothing else: half of it becomes uniform.
    centre = rest if spec.kind == "box" else (rest + fresh) / 2
    shifted = torch.where(rest.any(-1, keepdim=True), centre, fresh)
    return torch.cat([shifted, uniform[:, :1]], 1)


def _uniform(spec: ActionSpec, device: torch.device) -> Tensor:
    """Mean (E,) of a belief that knows nothing: 1 / n for discrete actions, 0 for a box."""
    shares = [1 / n for n in spec.nvec for _ in range(n)]
    return torch.tensor(shares or [0.0] * spec.encoded_size, device=device)


def _repeat(state: State, times: int) -> State:
    return {key: value.repeat_interleave(times, 0) for key, value in state.items()}
