"""V: what the agent sees, as a small code z.

Images go through the convolutional VAE of the paper (section 4.2 and appendix A.1). Vectors are
standardised and then either are z themselves, or go through a small VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.spec import Spec
from zoo.nets.layers import MLP, RELU, GlorotLinear
from zoo.rssm.vision import StridedEncoder, TransposedDecoder, image_shape


class Code(NamedTuple):
    """A diagonal normal over z.

    Attributes:
        mean, logvar: (..., Z); a logvar of -inf says that z is known exactly.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self) -> Tensor:
        """A reparameterised sample (..., Z)."""
        return self.mean + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mean)


def kl_above(mean: Tensor, logvar: Tensor, tolerance: float) -> Tensor:
    """max(KL(N(mean, exp(logvar)) || N(0, 1)), tolerance * Z) in nats.

    The tolerance keeps V from giving up more of z than that: below it there is no gradient.

    Args:
        mean, logvar: (..., Z).
        tolerance: nats for each of the Z variables.

    Returns:
        (...).
    """
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)
    return kl.clamp(min=tolerance * mean.shape[-1])


class VAE(nn.Module):
    """A variational auto-encoder of inputs x in [0, 1] or around zero.

    Args:
        encoder: maps x (N, ...) to (N, encoder_size).
        encoder_size: its width.
        decoder: maps z (N, latent) to what `output` turns into x.
        latent: length Z of the code.
        output: applied to what the decoder returns.
    """

    def __init__(
        self,
        encoder: nn.Module,
        encoder_size: int,
        decoder: nn.Module,
        latent: int,
        output: nn.Module,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.output = encoder, decoder, output
        self.mean = GlorotLinear(encoder_size, latent)
        self.logvar = GlorotLinear(encoder_size, latent)

    def encode(self, x: Tensor) -> Code:
        """The code (N, Z) of x (N, ...)."""
        features = self.encoder(x)
        return Code(self.mean(features).float(), self.logvar(features).float())

    def decode(self, z: Tensor) -> Tensor:
        """The x (N, ...) of z (N, Z)."""
        out: Tensor = self.output(self.decoder(z).float())
        return out

    def losses(self, x: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Squared error summed over x, and KL above the tolerance; means over N."""
        code = self.encode(x)
        error = (self.decode(code.sample()) - x).square().flatten(1).sum(1)
        return error.mean(), kl_above(*code, tolerance).mean()


class Standardize(nn.Module):
    """(x - mean) / std with statistics of the data; the identity before they are known."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., size) to zero mean and unit variance."""
        return (x - self.mean) / self.std

    def inverse(self, x: Tensor) -> Tensor:
        """The inverse of `forward`."""
        return x * self.std + self.mean


class Vision(nn.Module):
    """V for any mix of images and vectors; z is the image's code, then that of the vectors.

    Args:
        spec: what the observations look like; images are 64 x 64 and share one VAE.
        latent: length of the image's code.
        depth: channels of the VAE's first convolution (32 in the paper).
        vector_latent: length of the vectors' code; 0 takes the standardised vectors as they are.
        vector_units: width of the two hidden layers of the vectors' VAE.
    """

    def __init__(
        self, spec: Spec, latent: int, depth: int, vector_latent: int = 0, vector_units: int = 64
    ) -> None:
        super().__init__()
        self.spec, self.images, self.vectors = spec, spec.images, spec.vectors
        self.size = 0
        if self.images:
            shape = image_shape(spec)
            encoder = StridedEncoder(shape, depth, nn.ReLU)
            decoder = TransposedDecoder(shape, latent, depth, nn.ReLU)
            self.image = VAE(encoder, encoder.size, decoder, latent, nn.Sigmoid())
            self.size += latent
        self.vector: VAE | None = None
        if self.vectors:
            inputs = sum(spec.obs[key].size for key in self.vectors)
            self.standardize = Standardize(inputs)
            if vector_latent:
                units = vector_units
                back = nn.Sequential(
                    MLP(vector_latent, 2, units, RELU), GlorotLinear(units, inputs)
                )
                self.vector = VAE(
                    MLP(inputs, 2, units, RELU), units, back, vector_latent, nn.Identity()
                )
            self.size += vector_latent or inputs

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return any(True for _ in self.parameters())

    def encode(self, obs: Mapping[str, Tensor]) -> Code:
        """The code (..., Z) of observations {key: (..., *shape)}."""
        codes = []
        if self.images:
            image = self._picture(obs)
            lead = image.shape[:-3]
            code = self.image.encode(image.flatten(0, -4).movedim(-1, 1))
            codes.append(Code(code.mean.unflatten(0, lead), code.logvar.unflatten(0, lead)))
        if self.vectors:
            flat = self.standardize(self.flatten(obs))
            if self.vector is None:
                codes.append(Code(flat, torch.full_like(flat, -torch.inf)))
            else:
                codes.append(self.vector.encode(flat))
        means, logvars = zip(*codes, strict=True)
        return Code(torch.cat(means, -1), torch.cat(logvars, -1))

    def decode(self, z: Tensor) -> dict[str, Tensor]:
        """Observations {key: (..., *shape)} of codes (..., Z); images are float in [0, 1]."""
        found: dict[str, Tensor] = {}
        if self.images:
            width = self.image.mean.out_features
            seen, z = z[..., :width], z[..., width:]
            image = self.image.decode(seen.flatten(0, -2)).movedim(1, -1)
            parts = [self.spec.obs[key].shape[-1] for key in self.images]
            image = image.unflatten(0, seen.shape[:-1])
            found |= dict(zip(self.images, image.split(parts, -1), strict=True))
        if self.vectors:
            flat = self.standardize.inverse(z if self.vector is None else self.vector.decode(z))
            parts = [self.spec.obs[key].size for key in self.vectors]
            for key, part in zip(self.vectors, flat.split(parts, -1), strict=True):
                found[key] = part.reshape(*part.shape[:-1], *self.spec.obs[key].shape)
        return found

    def losses(self, obs: Mapping[str, Tensor], tolerance: float) -> dict[str, Tensor]:
        """Losses of whatever learns, as means over the observations {key: (B, T, *shape)}."""
        pairs = []
        if self.images:
            pairs.append(
                self.image.losses(self._picture(obs).flatten(0, -4).movedim(-1, 1), tolerance)
            )
        if self.vector is not None:
            flat = self.standardize(self.flatten(obs)).flatten(0, -2)
            pairs.append(self.vector.losses(flat, tolerance))
        reconstruction, kl = zip(*pairs, strict=True)
        return {"reconstruction": torch.stack(reconstruction).sum(), "kl": torch.stack(kl).sum()}

    def flatten(self, obs: Mapping[str, Tensor]) -> Tensor:
        """All vectors as one (..., V) float32."""
        lead = len(self.spec.obs[self.vectors[0]].shape)
        first = obs[self.vectors[0]]
        shape = first.shape[: first.dim() - lead]
        return torch.cat([obs[key].float().reshape(*shape, -1) for key in self.vectors], -1)

    def _picture(self, obs: Mapping[str, Tensor]) -> Tensor:
        image = torch.cat([obs[key] for key in self.images], -1)
        return image.float() / 255 if image.dtype == torch.uint8 else image
