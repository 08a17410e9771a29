"""I-JEPA (Assran et al., "Self-Supervised Learning from Images with a JEPA", CVPR 2023).

From one large visible block of an image the features of four hidden blocks are predicted: those
that a slow copy of the encoder gives for the whole image. No pixels are reconstructed, and no two
views of an image are compared. This file is the method from top to bottom; its deviations from the
official code are listed in README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from datamodules.spec import Spec
from zoo.arguments import (
    choose_widths,
    reject_outside,
    reject_ranges,
    reject_unless_positive,
)
from zoo.jepa.masks import image_masks
from zoo.jepa.model import MaskedJEPA, Prediction, Schedule, View, sizes

# The paper's (appendix A.1) from base on, and the official code's default for small.
SIZES = sizes(
    {  # width and layers
        "nano": (48, 2),
        "tiny": (96, 6),
        "small": (384, 6),
        "base": (384, 6),
        "large": (384, 12),
        "huge": (384, 12),
    }
)


class IJEPA(
    MaskedJEPA,
    repo_url="https://github.com/facebookresearch/ijepa",
    paper_url="https://arxiv.org/abs/2301.08243",
):
    """I-JEPA.

    Args:
        spec: at least one image, all of one size; other observations and actions are not read.
        size: one of `SIZES`; single widths below override it.
        width, layers, heads: of the encoder.
        predictor_width, predictor_layers, predictor_heads: of the predictor.
        patch: side of a patch in pixels.
        image_size: side in pixels to which images or crops are resized; None is that of the data.
        crop_scale: smallest and largest share of an image that a training crop has; None takes
            whole images.
        crop_aspect: smallest and largest ratio of a crop's width to its height.
        targets: blocks that are predicted, each by itself.
        target_scale: smallest and largest share of an image that a target block has.
        target_aspect: smallest and largest ratio of its rows to its columns.
        context_scale: as `target_scale`, of the context block, from which targets are taken out.
        min_keep: fewest patches of a context; small grids want less.
        mask_seed: of the masks. Ranks differ in where blocks lie, and agree in their size.
        ema: share of itself that the target encoder keeps in an update, at first and at last.
        lr, start_lr, final_lr: learning rate after the warm-up, at first and at last.
        warmup: updates until the learning rate is reached; linear.
        weight_decay: at first and at last; not of biases and norms.
        total_updates: update at which all schedules end; how long to train is another matter.
    """

    name: ClassVar[str] = "i-jepa"
    axes: ClassVar[int] = 2

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "huge",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        predictor_width: int | None = None,
        predictor_layers: int | None = None,
        predictor_heads: int | None = None,
        patch: int = 16,
        image_size: int | None = None,
        crop_scale: tuple[float, float] | None = (0.3, 1.0),
        crop_aspect: tuple[float, float] = (0.75, 1.3333333),
        targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int = 10,
        mask_seed: int = 0,
        ema: tuple[float, float] = (0.996, 1.0),
        lr: float = 1e-3,
        start_lr: float = 2e-4,
        final_lr: float = 1e-6,
        warmup: int = 25_000,
        weight_decay: tuple[float, float] = (0.04, 0.4),
        total_updates: int = 187_500,
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
        reject_unless_positive("IJEPA", targets=targets, min_keep=min_keep)
        scales = {"target_scale": target_scale, "context_scale": context_scale}
        reject_ranges("IJEPA", **scales, target_aspect=target_aspect)
        reject_outside("IJEPA", 0, 1, **{key: max(pair) for key, pair in scales.items()})
        super().__init__(
            spec,
            choose_widths("IJEPA", SIZES, size, widths),
            Schedule(total_updates, warmup, start_lr, lr, final_lr, weight_decay, ema),
            patch=patch,
            image_size=image_size,
            crop_scale=crop_scale,
            crop_aspect=crop_aspect,
            mask_seed=mask_seed,
        )
        self.keep_hyperparameters(arguments)
        self.targets, self.min_keep = targets, min_keep
        self.target_scale, self.target_aspect = target_scale, target_aspect
        self.context_scale = context_scale

    def clips(self, images: Tensor) -> Tensor:
        """Each image (B, T, H, W, C) by itself: (B T, 1, H, W, C)."""
        return images.flatten(0, 1).unsqueeze(1)

    def predictions(self, view: View) -> Iterator[Prediction]:
        """Four blocks of features, each from the context alone."""
        masks = image_masks(
            view.dice,
            self.grid,
            len(view.patches),
            self.targets,
            self.target_scale,
            self.target_aspect,
            self.context_scale,
            self.min_keep,
        )
        yield self.predict(view, "prediction", masks)

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Smooth L1 (official code; the paper writes the squared error)."""
        return F.smooth_l1_loss(predicted, target)
