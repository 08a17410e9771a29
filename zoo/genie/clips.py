"""Clips of one image: what is read of the data, and causal functions of longer ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.base import Batch


def only_image(spec: Spec) -> tuple[str, tuple[int, int, int]]:
    """Key and shape (H, W, C) of the one image that there is.

    Raises:
        UserError: there is none, or there are more.
    """
    if len(spec.images) != 1:
        raise UserError(
            f"Genie learns from one image, and the data has {spec}: name the one to read by "
            "`observations` of the datamodule"
        )
    key = spec.images[0]
    height, width, channels = spec.obs[key].shape
    return key, (height, width, channels)


def pixels(video: Tensor) -> Tensor:
    """uint8 to float in [0, 1]."""
    return video.float() / 255


def psnr(error: Tensor) -> Tensor:
    """Decibels of a mean squared error of pixels in [0, 1]."""
    return -10 * error.detach().clamp(min=1e-10).log10()


def over_clips(
    function: Callable[[Tensor], Tensor], frames: Tensor, most: int, first: Tensor | None = None
) -> Tensor:
    """A causal function of clips of at most `most` frames, (B, T, ...), over longer ones.

    Beyond the first clip each frame sees as many before it as there is room for, and what the
    function says of it alone is kept. It sees no frame before one that is `first` (B, T).
    """
    if first is not None and first[:, 1:].any():
        rows = []
        for row, begins in zip(frames, first, strict=True):
            ends = [*(begins[1:].nonzero()[:, 0] + 1).tolist(), len(row)]
            lengths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
            parts = [over_clips(function, part[None], most) for part in row.split(lengths)]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)
    pieces = [function(frames[:, :most])]
    for end in range(most + 1, frames.shape[1] + 1):
        pieces.append(function(frames[:, end - most : end])[:, -1:])
    return torch.cat(pieces, 1)


def reject_lengths(video: Tensor, frames: int, least: int = 2) -> None:
    """Refuses clips (B, T, ...) of fewer or more frames than that.

    Raises:
        UserError: T is below `least` or above `frames`.
    """
    if video.shape[1] < least:
        raise UserError(
            f"Genie learns what happens between frames, from {least} of them or more, and a batch "
            f"has clips of {video.shape[1]}: set --data.clip_length {frames}"
        )
    if video.shape[1] > frames:
        raise UserError(
            f"Genie has positions for {frames} frames, and a batch has clips of "
            f"{video.shape[1]}: set --data.clip_length or frames"
        )


def reject_batch(batch: Batch, key: str, frames: int) -> None:
    """Refuses clips that would leave positions untrained, or go on into another episode.

    Raises:
        UserError: clips that are not of `frames` frames of one episode each.
    """
    count = batch["obs"][key].shape[1]
    if count != frames:
        raise UserError(
            f"Genie with frames={frames} learns from clips of so many frames, and a batch has "
            f"clips of {count}: set --data.clip_length {frames}, or --model.frames {count}"
        )
    if "is_first" in batch and batch["is_first"][:, 1:].any():
        raise UserError(
            "Genie learns from clips of one episode each, and a batch has some that go on into "
            "the next one: read the data by VideoDataModule"
        )
