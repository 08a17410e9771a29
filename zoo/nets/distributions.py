"""What output heads return: objects that know `pred()`, `loss(target)`, `sample()`, `entropy()`.

No loss formula stands anywhere else. All compute in float32 whatever the precision of the network.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def symlog(x: Tensor) -> Tensor:
    """sign(x) * ln(1 + |x|): compresses large values, keeps zero and sign (DreamerV3)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """sign(x) * (exp(|x|) - 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis; several times faster than torch's on CPU for a few classes."""
    if logits.shape[-1] >= 16 or logits.is_cuda:
        return F.softmax(logits, -1)
    exp = torch.exp(logits - logits.amax(-1, keepdim=True))
    return exp / exp.sum(-1, keepdim=True)


class _Unimix(torch.autograd.Function):
    """`unimix` with a backward of its own: few operations, one saved tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, fraction: float) -> Tensor:
        probs = softmax(logits)
        ctx.save_for_backward(probs)
        ctx.fraction = fraction
        return probs.mul(1 - fraction).add_(fraction / logits.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (probs,) = ctx.saved_tensors
        grad = grads[0] * probs
        return torch.addcmul(grad, probs, grad.sum(-1, keepdim=True), value=-1).mul_(
            1 - ctx.fraction
        ), None


def unimix(logits: Tensor, fraction: float) -> Tensor:
    """Probabilities (1 - fraction) * softmax(logits) + fraction * uniform, in float32.

    Args:
        logits: (..., C) in any precision.
        fraction: share of the uniform distribution, 0 to 1.
    """
    probs: Tensor = _Unimix.apply(logits.float(), fraction)
    return probs


def one_hot(index: Tensor, classes: int) -> Tensor:
    """float32 one-hot (..., classes); faster than `F.one_hot` followed by a cast."""
    return torch.zeros(*index.shape, classes, device=index.device).scatter_(
        -1, index.unsqueeze(-1), 1.0
    )


def draw(probs: Tensor, noise: Tensor) -> Tensor:
    """Samples one-hot vectors by inverting the cumulative distribution.

    Args:
        probs: (..., C) probabilities.
        noise: (..., 1) uniform in [0, 1): one number per sample, where Gumbel noise needs C.
    """
    index = (probs.cumsum(-1) <= noise).sum(-1).clamp_(max=probs.shape[-1] - 1)
    return one_hot(index, probs.shape[-1])


class Latent(Protocol):
    """A distribution over stochastic states z (..., S, C): S variables of C numbers each."""

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A sample (..., S, C) through which gradients flow; `noise` as `draw_noise` makes it."""

    def mode(self) -> Tensor:
        """The most likely z (..., S, C), through which gradients flow."""

    def detach(self) -> Latent:
        """The same distribution without gradient."""

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over the variables."""

    def kl(self, other: Any) -> Tensor:
        """KL(self || other) (...) in nats, summed over the variables."""

    @classmethod
    def stack(cls, parts: list[Any]) -> Latent:
        """Distributions of T steps (B, ...) as one (B, T, ...)."""


class OneHot:
    """Independent categoricals over one-hot vectors, with straight-through gradients.

    Args:
        probs: (..., S, C) probabilities of S categoricals.
        log_probs: their logarithms, needed where probabilities may be zero in float32.
    """

    def __init__(self, probs: Tensor, log_probs: Tensor | None = None) -> None:
        self.probs, self._log_probs = probs, log_probs

    @property
    def log_probs(self) -> Tensor:
        """Logarithms of the probabilities (..., S, C)."""
        return self.probs.log() if self._log_probs is None else self._log_probs

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A sample (..., S, C) = one_hot + probs - stop_gradient(probs)."""
        probs = self.probs.detach()
        if noise is None:
            noise = torch.rand(*probs.shape[:-1], 1, device=probs.device)
        value = draw(probs, noise)
        return value + (self.probs - probs) if self.probs.requires_grad else value

    def mode(self) -> Tensor:
        """The most likely one-hot vectors (..., S, C), with straight-through gradients."""
        value = one_hot(self.probs.argmax(-1), self.probs.shape[-1])
        return value + (self.probs - self.probs.detach())

    @classmethod
    def stack(cls, parts: list[OneHot]) -> OneHot:
        """Distributions of T steps (B, ...) as one (B, T, ...)."""
        probs = torch.stack([part.probs for part in parts], 1)
        if parts[0]._log_probs is None:
            return cls(probs)
        return cls(probs, torch.stack([part.log_probs for part in parts], 1))

    def detach(self) -> OneHot:
        """The same distributions without gradient."""
        logs = None if self._log_probs is None else self._log_probs.detach()
        return OneHot(self.probs.detach(), logs)

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over the S categoricals: (...)."""
        return -(self.probs * self.log_probs).sum((-2, -1))

    def kl(self, other: OneHot) -> Tensor:
        """KL(self || other) in nats, summed over the S categoricals: (...)."""
        return (self.probs * (self.log_probs - other.log_probs)).sum((-2, -1))


class DiagonalNormal:
    """Independent normals with reparameterised samples.

    Args:
        mean, std: (..., S, 1) of S variables; std positive.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A sample (..., S, 1) = mean + std * noise, with standard normal noise."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        """The mean (..., S, 1)."""
        return self.mean

    @classmethod
    def stack(cls, parts: list[DiagonalNormal]) -> DiagonalNormal:
        """Distributions of T steps (B, ...) as one (B, T, ...)."""
        return cls(torch.stack([p.mean for p in parts], 1), torch.stack([p.std for p in parts], 1))

    def detach(self) -> DiagonalNormal:
        """The same distributions without gradient."""
        return DiagonalNormal(self.mean.detach(), self.std.detach())

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over the S variables: (...)."""
        return _normal_entropy(self.std).sum((-2, -1))

    def kl(self, other: DiagonalNormal) -> Tensor:
        """KL(self || other) in nats, summed over the S variables: (...)."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum((-2, -1))


class Policy(Protocol):
    """A distribution over encoded actions (..., A)."""

    def pred(self) -> Tensor:
        """The action to take when not exploring (..., A)."""

    def sample(self) -> Tensor:
        """A random action (..., A), with gradients towards the parameters where there are any."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability or log-density (...) of encoded actions (..., A)."""

    def entropy(self) -> Tensor:
        """Entropy (...) in nats."""


class PolicySteps:
    """Policies of K steps, each over (N, A), as one over (N, K, A)."""

    def __init__(self, steps: list[Policy]) -> None:
        self.steps = steps

    def pred(self) -> Tensor:
        """The actions to take when not exploring (N, K, A)."""
        return torch.stack([step.pred() for step in self.steps], 1)

    def sample(self) -> Tensor:
        """Random actions (N, K, A)."""
        return torch.stack([step.sample() for step in self.steps], 1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probabilities or log-densities (N, K) of encoded actions (N, K, A)."""
        pairs = zip(self.steps, action.unbind(1), strict=True)
        return torch.stack([step.log_prob(taken) for step, taken in pairs], 1)

    def entropy(self) -> Tensor:
        """Entropies (N, K) in nats."""
        return torch.stack([step.entropy() for step in self.steps], 1)


class Categorical:
    """One discrete choice, or several independent ones (`nvec`), from concatenated logits.

    Actions are encoded as concatenated one-hot vectors (..., sum(nvec)), the network's view.
    """

    def __init__(self, logits: Tensor, nvec: tuple[int, ...]) -> None:
        self.nvec = nvec
        parts = logits.float().split(nvec, -1) if len(nvec) > 1 else (logits.float(),)
        self.log_probs = [F.log_softmax(part, -1) for part in parts]

    def pred(self) -> Tensor:
        """The most likely choice, encoded (..., sum(nvec))."""
        return torch.cat([one_hot(p.argmax(-1), p.shape[-1]) for p in self.log_probs], -1)

    def sample(self) -> Tensor:
        """A random choice, encoded (..., sum(nvec)), with straight-through gradients."""
        probs = [p.exp() for p in self.log_probs]
        noise = [torch.rand(*p.shape[:-1], 1, device=p.device) for p in probs]
        draws = [OneHot(p).sample(n) for p, n in zip(probs, noise, strict=True)]
        return torch.cat(draws, -1)

    def log_prob(self, encoded: Tensor) -> Tensor:
        """Log-probability (...) of encoded choices (..., sum(nvec))."""
        return (torch.cat(self.log_probs, -1) * encoded).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over the choices."""
        return -sum((p.exp() * p).sum(-1) for p in self.log_probs)  # type: ignore[return-value]


class BoundedNormal:
    """Normal with mean tanh(.) in [-1, 1] and standard deviation in [min_std, max_std].

    Args:
        mean, std: raw network outputs (..., A).
    """

    def __init__(
        self, mean: Tensor, std: Tensor, min_std: float = 0.1, max_std: float = 1.0
    ) -> None:
        self.mean = torch.tanh(mean.float())
        self.std = (max_std - min_std) * torch.sigmoid(std.float() + 2.0) + min_std

    def pred(self) -> Tensor:
        """The mean (..., A)."""
        return self.mean

    def sample(self) -> Tensor:
        """A random action (..., A); may leave [-1, 1], the environment sees it clipped."""
        return self.mean + self.std * torch.randn_like(self.mean)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (...), summed over the A dimensions."""
        return _normal_log_prob(action, self.mean, self.std).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over the A dimensions."""
        return _normal_entropy(self.std).sum(-1)


class TanhNormal:
    """tanh of a normal whose mean is squashed to [-5, 5] (Dreamer V1).

    mean = 5 tanh(mean / 5), std = softplus(std + softplus^-1(init_std)) + min_std; the mode and the
    entropy are estimated from 100 samples.

    Args:
        mean, std: raw network outputs (..., A).
        init_std: standard deviation before the tanh where the raw output is zero.
    """

    def __init__(
        self, mean: Tensor, std: Tensor, init_std: float = 5.0, min_std: float = 1e-4
    ) -> None:
        self.mean = 5 * torch.tanh(mean.float() / 5)
        self.std = F.softplus(std.float() + math.log(math.expm1(init_std))) + min_std

    def pred(self) -> Tensor:
        """The most likely of 100 samples (..., A)."""
        action, before = self._draw(100)
        best = self._log_prob(before).argmax(0)
        return action.gather(0, best[None, ..., None].expand_as(action[:1])).squeeze(0)

    def sample(self) -> Tensor:
        """A random action (..., A) in [-1, 1], reparameterised."""
        return self._draw(1)[0].squeeze(0)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (...), summed over the A dimensions."""
        return self._log_prob(torch.atanh(action.clamp(-0.999999, 0.999999)))

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, estimated from 100 samples."""
        return -self._log_prob(self._draw(100)[1]).mean(0)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(count, *self.mean.shape, device=self.mean.device)
        before = self.mean + self.std * noise
        return torch.tanh(before), before

    def _log_prob(self, before: Tensor) -> Tensor:
        log_slope = 2 * (math.log(2) - before - F.softplus(-2 * before))
        return (_normal_log_prob(before, self.mean, self.std) - log_slope).sum(-1)


class TruncatedNormal:
    """Normal with mean tanh(.), cut off outside of [-1, 1] (Dreamer V2).

    std = 2 sigmoid(std / 2) + min_std.

    Args:
        mean, std: raw network outputs (..., A).
    """

    def __init__(self, mean: Tensor, std: Tensor, min_std: float = 0.1) -> None:
        self.mean = torch.tanh(mean.float())
        self.std = 2 * torch.sigmoid(std.float() / 2) + min_std
        self._low, self._high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        self._below = torch.special.ndtr(self._low)
        self._mass = torch.special.ndtr(self._high) - self._below

    def pred(self) -> Tensor:
        """The mode (..., A), which is the mean before the cut."""
        return self.mean

    def sample(self) -> Tensor:
        """A random action (..., A) strictly inside of [-1, 1], reparameterised."""
        quantile = self._below + self._mass * torch.rand_like(self.mean)
        action = self.mean + self.std * torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (...), summed over the A dimensions."""
        return (_normal_log_prob(action, self.mean, self.std) - self._mass.log()).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy (...) in nats, summed over the A dimensions."""
        edge = self._low * _density(self._low) - self._high * _density(self._high)
        entropy = _normal_entropy(self.std) + self._mass.log()
        return (entropy + edge / (2 * self._mass)).sum(-1)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def _normal_entropy(std: Tensor) -> Tensor:
    return std.log() + 0.5 * math.log(2 * math.pi * math.e)


class Binary:
    """A probability from a logit (...)."""

    def __init__(self, logit: Tensor) -> None:
        self.logit = logit.float()

    def pred(self) -> Tensor:
        """The probability (...)."""
        return torch.sigmoid(self.logit)

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy (...) with a target probability in [0, 1]."""
        return F.binary_cross_entropy_with_logits(self.logit, target, reduction="none")


class Scalar(Protocol):
    """A prediction of scalars (...), as a value head gives it."""

    def __getitem__(self, index: Any) -> Scalar:
        """The predictions at an index of the leading axes."""

    def pred(self) -> Tensor:
        """The expected value (...)."""

    def loss(self, target: Tensor) -> Tensor:
        """Loss (...) against targets (...)."""


class MSE:
    """Squared error summed over the last `dims` axes."""

    def __init__(self, mean: Tensor, dims: int) -> None:
        self.mean, self.dims = mean.float(), dims

    def __getitem__(self, index: Any) -> MSE:
        """The predictions at an index of the leading axes."""
        return type(self)(self.mean[index], self.dims)

    def pred(self) -> Tensor:
        """The prediction."""
        return self.mean

    def loss(self, target: Tensor) -> Tensor:
        """Sum of squared errors (no factor 1/2), without the last `dims` axes."""
        error = (self.mean - target).square()
        return error.flatten(-self.dims).sum(-1) if self.dims else error


class UnitNormal(MSE):
    """A normal with variance 1: half the squared error (PlaNet, Dreamer V1 and V2).

    The constant 0.5 ln(2 pi) per element, which trains nothing, is left out of the loss.
    """

    def loss(self, target: Tensor) -> Tensor:
        """Half the sum of squared errors, without the last `dims` axes."""
        return 0.5 * super().loss(target)


class CenteredImage(UnitNormal):
    """A `UnitNormal` over pixels around zero; `pred` and targets are in [0, 1]."""

    def pred(self) -> Tensor:
        """The prediction in [0, 1]."""
        return (self.mean + 0.5).clamp(0, 1)

    def loss(self, target: Tensor) -> Tensor:
        """Half the sum of squared errors of pixels minus 0.5."""
        return super().loss(target - 0.5)


class SymlogMSE(MSE):
    """Squared error in symlog space; `pred` is back in the units of the data."""

    def pred(self) -> Tensor:
        """The prediction in the units of the data."""
        return symexp(self.mean)

    def loss(self, target: Tensor) -> Tensor:
        """Sum of squared errors between the output and symlog(target)."""
        return super().loss(symlog(target))


def symexp_bins(count: int, limit: float = 20.0) -> Tensor:
    """`count` (odd) bin centres symexp(linspace(-limit, limit)), exactly symmetric about 0."""
    if count % 2 == 0:
        raise ValueError(f"the number of two-hot bins must be odd, got {count}")
    half = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=torch.float64)).float()
    return torch.cat([half, -half[:-1].flip(0)])


class TwoHot:
    """A scalar as a categorical over symmetric bins (DreamerV3, "Symexp two-hot").

    The expectation and the two-hot targets are in raw space: only the placing of the bins is
    logarithmic (the 2023 code put targets and expectation in symlog space).

    Args:
        logits: (..., K).
        bins: (K,) centres, odd K, symmetric about 0.
    """

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        self.logits, self.bins = logits.float(), bins

    def __getitem__(self, index: Any) -> TwoHot:
        """The distributions at an index of the leading axes."""
        return TwoHot(self.logits[index], self.bins)

    @cached_property
    def log_probs(self) -> Tensor:
        """Logarithms of the probabilities (..., K)."""
        return F.log_softmax(self.logits, -1)

    def pred(self) -> Tensor:
        """The expected value (...).

        Pairs of opposite bins are joined before the sum, so that equal probabilities give exactly
        zero: rounding errors would otherwise be multiplied by the largest bins.
        """
        half = len(self.bins) // 2
        # Not `softmax`: the rounding of the logarithms lets far bins on both sides of zero, whose
        # logits differ by the noise of training only, cancel exactly. Times bins of 1e8 that noise
        # would be rewards of 0.1.
        probs = self.log_probs.exp()
        excess = probs[..., half + 1 :] - probs[..., :half].flip(-1)
        return (excess * self.bins[half + 1 :]).sum(-1)  # a matmul would leave float32 in autocast

    def loss(self, target: Tensor) -> Tensor:
        """Cross-entropy (...) with the two-hot encoding of `target` (...)."""
        below, above, weight = two_hot(target, self.bins)
        log_probs = self.log_probs.gather(-1, torch.stack([below, above], -1))
        return -torch.lerp(log_probs[..., 0], log_probs[..., 1], weight)


def two_hot(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbouring bins of each target and the weight of the upper one.

    Args:
        target: (...) values; those beyond the bins are clamped to the outermost one.
        bins: (K,) ascending.

    Returns:
        (below, above, weight): indices and weight with
        (1 - weight) * bins[below] + weight * bins[above] == target.
    """
    target = target.detach().clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, target.contiguous()).clamp(1, len(bins) - 1)
    below = above - 1
    weight = (target - bins[below]) / (bins[above] - bins[below])
    return below, above, weight
