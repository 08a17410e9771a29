"""The video tokenizer: frames to codes and back (Genie, section 2.1).

A VQ-VAE whose encoder and decoder are causal ST-transformers ("ST-ViViT"): the codes of a frame
know of the frames before it, and so does what they are decoded to. In shapes, B is the number of
clips, T of their frames, P of the patches of a frame.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from zoo.genie.patches import Patches
from zoo.genie.quantizers import Quantized, Quantizer
from zoo.nets.st_transformer import OUT_SCALE, Shape, STTransformer, draw_weights

GREY = 0.5  # pixels are centred there


class Reconstruction(NamedTuple):
    """Frames (B, T, H, W, C) as the decoder sees them, and their quantised patches (B, T, P)."""

    frames: Tensor
    quantized: Quantized


class PatchEncoder(nn.Sequential):
    """Two more layers for each patch alone (ours), tokens (..., D) to the same shape.

    Patches that do not change keep their codes, which a transformer does not promise: small
    dynamics learn to copy these long before they learn what else changes codes.
    """

    def __init__(self, width: int) -> None:
        super().__init__(nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        draw_weights(self)


class Tokenizer(nn.Module):
    """Patches, an encoder, a quantizer and a decoder.

    Args:
        patches: how frames are cut.
        encoder, decoder: sizes of the transformers; an encoder of 0 layers is a `PatchEncoder`.
        frames: most frames of a clip.
        quantizer: of the encoder's outputs, mapped linearly to its width.
        relative: as for `STTransformer`.
    """

    def __init__(
        self,
        patches: Patches,
        encoder: Shape,
        decoder: Shape,
        frames: int,
        quantizer: Quantizer,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.embed = nn.Linear(patches.values, encoder.width)
        self.encoder: nn.Module = PatchEncoder(encoder.width)
        if encoder.layers:
            self.encoder = STTransformer(encoder, patches.grid, frames, relative=relative)
        self.to_latent = nn.Linear(encoder.width, quantizer.width)
        self.quantizer = quantizer
        self.from_latent = nn.Linear(quantizer.width, decoder.width)
        self.decoder = STTransformer(decoder, patches.grid, frames, relative=relative)
        self.to_pixels = nn.Linear(decoder.width, patches.values)
        for linear in (self.embed, self.to_latent, self.from_latent):
            draw_weights(linear)
        draw_weights(self.to_pixels, OUT_SCALE)

    def forward(self, frames: Tensor) -> Reconstruction:
        """Encodes, quantises and decodes frames (B, T, H, W, C) in [0, 1]."""
        quantized = self.quantizer(self.to_latent(self.features(frames)))
        return Reconstruction(self._decoded(quantized.vectors), quantized)

    def features(self, frames: Tensor) -> Tensor:
        """The encoder's outputs (B, T, P, D) before quantisation."""
        out: Tensor = self.encoder(self.embed(self.patches.cut(frames) - GREY))
        return out

    def tokens(self, frames: Tensor) -> Tensor:
        """Codes (B, T, P) of frames (B, T, H, W, C) in [0, 1]."""
        codes: Tensor = self.quantizer(self.to_latent(self.features(frames))).codes
        return codes

    def decode(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Frames (B, T, H, W, C) in [0, 1] of codes (B, T, P); `valid` (B, T) as in the brick."""
        return self._decoded(self.quantizer.lookup(tokens), valid).clamp(0, 1)

    def _decoded(self, vectors: Tensor, valid: Tensor | None = None) -> Tensor:
        hidden = self.decoder(self.from_latent(vectors), valid)
        return self.patches.join(self.to_pixels(hidden)) + GREY
