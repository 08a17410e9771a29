"""From continuous vectors to codes and back.

`VectorQuantizer` is VQ-VAE's codebook (van den Oord et al., 2017) that follows its vectors by
moving averages (its appendix A.1) and brings dead codes back. `FiniteScalarQuantizer` rounds each
number to one of few levels (Mentzer et al., 2024). Both give straight-through gradients. In shapes,
K is the number of codes and D the length of a vector.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from zoo.nets.ranks import from_first_rank, gather_ranks, mean_over_ranks, own_rows

DECAY = 0.99
ALIVE = 0.01  # of an even share; codes that are used less are dead
REVIVED = 0.02  # of an even share, what codes begin with: unused ones are dead after 69 updates


class Quantized(NamedTuple):
    """Vectors (..., D) after quantisation.

    Attributes:
        codes: (...) int64.
        vectors: (..., D) those of the codes, with the gradients of what was quantised.
        commitment: mean squared distance of what was quantised to its codes, which moves only the
            former; 0 where codes do not move.
    """

    codes: Tensor
    vectors: Tensor
    commitment: Tensor


class Quantizer(nn.Module):
    """What the quantizers share: normalisation and the watch over the use of the codes.

    Attributes:
        size: K.
        width: D.
        seen: (K,) share of the vectors that had each code, a moving average of training that began
            with zeros.

    Args:
        size, width: K and D.
        normalize: standardise each of the D numbers over the batch first (batch norm without
            weights; ours). Keeps codes in use that few vectors would reach otherwise.
    """

    seen: Tensor

    def __init__(self, size: int, width: int, normalize: bool = False) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.norm = nn.BatchNorm1d(width, affine=False) if normalize else None
        self.register_buffer("seen", torch.zeros(size))

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (..., D) of codes (...)."""

    @abstractmethod
    def quantize(self, flat: Tensor) -> Quantized:
        """Quantises (N, D)."""

    @property
    def learns(self) -> bool:
        """Whether what is quantised moves codebook and statistics: in training steps only."""
        return self.training and torch.is_grad_enabled()

    def forward(self, z: Tensor) -> Quantized:
        """Quantises vectors (..., D), in float32."""
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().flatten(0, -2)
            if self.norm is not None:
                flat = self._normalized(flat)
            codes, vectors, commitment = self.quantize(flat)
            if self.learns:
                self.learn(flat.detach(), codes)
        return Quantized(
            codes.unflatten(0, z.shape[:-1]), vectors.unflatten(0, z.shape[:-1]), commitment
        )

    def _normalized(self, flat: Tensor) -> Tensor:
        """Standardised over the batches of all ranks, with gradients through their statistics."""
        assert self.norm is not None
        if self.learns:
            return own_rows(self.norm(gather_ranks(flat)))
        return F.batch_norm(flat, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)

    @torch.no_grad()
    def learn(self, flat: Tensor, codes: Tensor) -> Tensor:
        """Keeps the books after vectors (N, D) had codes (N,); gives the share (K,) of each."""
        counts = torch.bincount(codes, minlength=self.size).float()
        shares = mean_over_ranks(counts / len(codes))
        self.seen.lerp_(shares, 1 - DECAY)
        return shares

    @property
    def usage(self) -> Tensor:
        """(K,) share of the vectors that had each code lately; zeros before any was seen."""
        return self.seen / self.seen.sum().clamp(min=1e-12)

    @property
    def alive(self) -> Tensor:
        """Share of the codes that are in use, a scalar."""
        return (self.usage >= ALIVE / self.size).float().mean()

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of the use of codes, a scalar from 1 to K."""
        return torch.special.entr(self.usage).sum().exp()


class VectorQuantizer(Quantizer):
    """The nearest of K vectors that follow what is quantised.

    A code's vector is the moving average of the vectors it was given, `sums` over `cluster`. One
    whose `cluster` falls below `ALIVE` of an even share becomes a random vector of the batch, the
    likelier the farther that is from its code; so does each in the very first batch.
    """

    codebook: Tensor
    cluster: Tensor
    sums: Tensor
    begun: Tensor

    def __init__(self, size: int, width: int, normalize: bool = False) -> None:
        super().__init__(size, width, normalize)
        if size < 2:
            raise UserError(f"a codebook needs at least 2 codes, got {size}")
        self.register_buffer("codebook", torch.randn(size, width))
        self.register_buffer("cluster", torch.full((size,), REVIVED / size))
        self.register_buffer("sums", self.codebook * REVIVED / size)
        self.register_buffer("begun", torch.tensor(False))

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (..., D) of codes (...)."""
        return self.codebook[codes]

    def quantize(self, flat: Tensor) -> Quantized:
        """The nearest code of each of (N, D)."""
        with torch.no_grad():
            # The vector's own square changes nothing about which code is the nearest.
            distance = self.codebook.square().sum(1) - 2 * flat @ self.codebook.t()
            codes = distance.argmin(1)
            nearest = self.lookup(codes)
        return Quantized(codes, _straight_through(flat, nearest), F.mse_loss(flat, nearest))

    @torch.no_grad()
    def learn(self, flat: Tensor, codes: Tensor) -> Tensor:
        """Moves the codebook towards vectors (N, D) that had codes (N,)."""
        shares = super().learn(flat, codes)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, flat) / len(codes)
        self.cluster.lerp_(shares, 1 - DECAY)
        self.sums.lerp_(mean_over_ranks(sums), 1 - DECAY)
        dead = (self.cluster < ALIVE / self.size) | ~self.begun
        drawn = from_first_rank(flat[self._far(flat, codes)])
        share = REVIVED / self.size
        self.cluster.masked_fill_(dead, share)
        self.sums.copy_(torch.where(dead[:, None], drawn * share, self.sums))
        self.codebook.copy_(self.sums / self.cluster[:, None])
        self.begun.fill_(True)
        return shares

    def _far(self, flat: Tensor, codes: Tensor) -> Tensor:
        """K of the vectors (N, D), drawn by their squared distances to their codes (N,)."""
        distance = (flat - self.lookup(codes)).square().sum(1) + 1e-12
        return torch.multinomial(distance, self.size, replacement=True)


class FiniteScalarQuantizer(Quantizer):
    """Each of D numbers, after tanh, becomes the nearest of its L evenly spaced levels in [-1, 1].

    Two levels are the sign. Mentzer et al. shift an even number of levels by half a step so that 0
    is one of them; here levels are symmetric, so that with two of them both are equally likely.

    Args:
        levels: L of each number; K is their product.
        normalize: of the `Quantizer`.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int], normalize: bool = False) -> None:
        if not levels or min(levels) < 2:
            raise UserError(f"finite scalar quantisation needs levels of at least 2, got {levels}")
        super().__init__(math.prod(levels), len(levels), normalize)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (..., D) of codes (...)."""
        digits = codes[..., None] // self.basis % self.levels
        return digits / (self.levels - 1) * 2 - 1

    def quantize(self, flat: Tensor) -> Quantized:
        """The nearest levels of each of (N, D)."""
        bounded = flat.tanh()
        with torch.no_grad():
            digits = ((bounded + 1) / 2 * (self.levels - 1)).round().long()
            codes = (digits * self.basis).sum(-1)
        vectors = _straight_through(bounded, self.lookup(codes))
        return Quantized(codes, vectors, flat.new_zeros(()))


class Continuous(Quantizer):
    """No codes: vectors pass as they are. For the ablation of what discreteness is good for."""

    def __init__(self, width: int, normalize: bool = False) -> None:
        super().__init__(1, width, normalize)

    def lookup(self, codes: Tensor) -> Tensor:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "continuous latent actions have no codes: give `imagine` vectors "
            f"(N, H, {self.width}), or choose action_quantizer vq or fsq"
        )

    def quantize(self, flat: Tensor) -> Quantized:
        """(N, D) unchanged, as code 0."""
        codes = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        return Quantized(codes, flat, flat.new_zeros(()))


def make_quantizer(
    kind: str, size: int, width: int, levels: Sequence[int] | None, normalize: bool = False
) -> Quantizer:
    """A codebook of `size` vectors ("vq"), `levels` ("fsq"), or neither, of `width` ("none")."""
    if kind == "fsq":
        return FiniteScalarQuantizer(levels or (), normalize)
    return VectorQuantizer(size, width, normalize) if kind == "vq" else Continuous(width, normalize)


def _straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    return z + (quantized - z).detach()
