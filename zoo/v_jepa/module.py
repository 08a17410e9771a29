"""V-JEPA (Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from
Video", TMLR 2024).

From the visible part of a clip the features of its hidden part are predicted: those that a slow
copy of the encoder gives for the whole clip. Hidden are blocks that span all frames: eight small
ones that may overlap (short-range), or two large ones (long-range). What V-JEPA 2 (Assran et al.,
2025) changed is there as options. This file is the method from top to bottom; its deviations from
the official code are listed in README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.arguments import (
    choose_widths,
    reject_outside,
    reject_ranges,
    reject_unless_positive,
)
from zoo.jepa.masks import tube_masks
from zoo.jepa.model import MaskedJEPA, Prediction, Schedule, View, sizes

# The paper's from base on (section 3.3).
SIZES = sizes(
    {  # width and layers
        "nano": (48, 2),
        "tiny": (96, 12),
        "small": (384, 12),
        "base": (384, 12),
        "large": (384, 12),
        "huge": (384, 12),
    }
)


class VJEPA(
    MaskedJEPA,
    repo_url="https://github.com/facebookresearch/jepa",
    paper_url="https://arxiv.org/abs/2404.08471",
):
    """V-JEPA.

    Args:
        spec: at least one image, all of one size; other observations and actions are not read.
        size: one of `SIZES`; single widths below override it.
        width, layers, heads: of the encoder.
        predictor_width, predictor_layers, predictor_heads: of the predictor (V-JEPA 2: 12 heads).
        patch: side of a patch in pixels.
        tubelet: frames of a patch. Clips may have any length from that on.
        image_size: side in pixels to which frames or crops are resized; None is that of the data.
        crop_scale: smallest and largest share of a frame that a training crop has, one crop for a
            clip; None takes whole frames.
        crop_aspect: smallest and largest ratio of a crop's width to its height.
        flip: mirror half of the training clips.
        short_range, long_range: number of blocks, and the share of a frame that each covers.
        aspect: smallest and largest ratio of a block's rows to its columns.
        min_keep: fewest patches of a frame that stay visible.
        mask_seed: of the masks. Ranks differ in where blocks lie, and agree in their size.
        one_mask_token: the two kinds of masks share a mask token.
        rope: rotary positions on three axes in place of sines and cosines (V-JEPA 2).
        ema: share of itself that the target encoder keeps in an update, at first and at last
            (V-JEPA 2: 0.99925, 0.99925).
        lr, start_lr, final_lr: learning rate after the warm-up, at first and at last.
        warmup: updates until the learning rate is reached; linear.
        weight_decay: at first and at last; not of biases and norms.
        clip: largest norm of the gradient, of encoder and predictor each, after the warm-up
            (V-JEPA 2: none, .inf).
        total_updates: update at which all schedules end; how long to train is another matter.
    """

    name: ClassVar[str] = "v-jepa"
    axes: ClassVar[int] = 3

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "large",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        predictor_width: int | None = None,
        predictor_layers: int | None = None,
        predictor_heads: int | None = None,
        patch: int = 16,
        tubelet: int = 2,
        image_size: int | None = None,
        crop_scale: tuple[float, float] | None = (0.3, 1.0),
        crop_aspect: tuple[float, float] = (0.75, 1.35),
        flip: bool = True,
        short_range: tuple[int, float] = (8, 0.15),
        long_range: tuple[int, float] = (2, 0.7),
        aspect: tuple[float, float] = (0.75, 1.5),
        min_keep: int = 1,
        mask_seed: int = 0,
        one_mask_token: bool = False,
        rope: bool = False,
        ema: tuple[float, float] = (0.998, 1.0),
        lr: float = 6.25e-4,
        start_lr: float = 2e-4,
        final_lr: float = 1e-6,
        warmup: int = 12_000,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        clip: float = 10.0,
        total_updates: int = 112_500,
    ) -> None:
        arguments = locals()
        widths = {
            "width": width,
            "layers": layers,
            "heads": heads,
            "predictor_width": predictor_width,
            "predictor_layers": predictor_layers,
            "predictor_heads": predictor_heads,
        }
        reject_unless_positive("VJEPA", tubelet=tubelet, min_keep=min_keep, clip=clip)
        for key, (blocks, scale) in (("short_range", short_range), ("long_range", long_range)):
            reject_unless_positive("VJEPA", **{f"{key}[0]": blocks, f"{key}[1]": scale})
            reject_outside("VJEPA", 0, 1, **{f"{key}[1]": scale})
        reject_ranges("VJEPA", aspect=aspect)
        super().__init__(
            spec,
            choose_widths("VJEPA", SIZES, size, widths),
            Schedule(total_updates, warmup, start_lr, lr, final_lr, weight_decay, ema),
            patch=patch,
            tubelet=tubelet,
            image_size=image_size,
            crop_scale=crop_scale,
            crop_aspect=crop_aspect,
            flip=flip,
            mask_seed=mask_seed,
            rope=rope,
            mask_tokens=1 if one_mask_token else 2,
            zero_tokens=True,
        )
        self.keep_hyperparameters(arguments)
        self.aspect, self.min_keep, self.clip = aspect, min_keep, clip
        self.ranges = {"short_range": short_range, "long_range": long_range}
        self.one_mask_token = one_mask_token

    def clips(self, images: Tensor) -> Tensor:
        """The images (B, T, H, W, C) of a batch, which are clips."""
        if images.shape[1] < self.tubelet:
            raise UserError(
                f"VJEPA cuts clips into patches of {self.tubelet} frames, and a batch has clips of "
                f"{images.shape[1]}: set --data.clip_length or tubelet"
            )
        return images

    def predictions(self, view: View) -> Iterator[Prediction]:
        """All that is hidden, once with each kind of mask."""
        times = view.patches.shape[1] // self.encoder.cells
        for kind, (name, (blocks, scale)) in enumerate(self.ranges.items()):
            masks = tube_masks(
                view.dice,
                self.grid,
                len(view.patches),
                times,
                blocks,
                scale,
                self.aspect,
                self.min_keep,
            )
            yield self.predict(view, name, masks, 0 if self.one_mask_token else kind)

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """L1 (equation 1)."""
        return F.l1_loss(predicted, target)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips both gradients' norms after the warm-up, unless the trainer has a setting."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.updates >= self.schedule.warmup:
            for part in (self.encoder, self.predictor):
                nn.utils.clip_grad_norm_(part.parameters(), self.clip)
