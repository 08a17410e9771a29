"""What I-JEPA and V-JEPA share: the parts, the slow target, the schedules and what is logged.

A subclass names its masks and its loss in `predictions`; training, validation, encoding and exact
resuming are here.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.arguments import reject_outside, reject_ranges, reject_unless_positive
from zoo.base import Batch, Obs, ZooModel
from zoo.jepa.masks import Dice, Masks
from zoo.jepa.predictor import Predictor
from zoo.jepa.target import copied, cosine, drift, feature_std, momentum, normalized
from zoo.jepa.views import random_crops, resized, stack_images
from zoo.nets.averaging import follow
from zoo.nets.vit import SIZES as ENCODERS
from zoo.nets.vit import ViT, patchify, take


def sizes(predictors: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Widths of encoder and predictor of each size.

    Args:
        predictors: width and layers of the predictor; it has as many heads as the encoder.
    """
    return {
        name: {
            **ENCODERS[name],
            "predictor_width": width,
            "predictor_layers": layers,
            "predictor_heads": ENCODERS[name]["heads"],
        }
        for name, (width, layers) in predictors.items()
    }


class Schedule(NamedTuple):
    """How the optimizer and the target change with the updates.

    Attributes:
        total: the update at which everything reaches its last value.
        warmup: updates in which the learning rate rises, linearly.
        start_lr, lr, final_lr: learning rate at first, after the warm-up, and at `total`.
        weight_decay: at first and at `total`; half a cosine in between.
        ema: share of itself that the target keeps, at first and at `total`; linear.
    """

    total: int
    warmup: int
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: tuple[float, float]
    ema: tuple[float, float]

    def lr_at(self, update: int) -> float:
        """Learning rate of an update, counted from 1."""
        if update < self.warmup:
            return self.start_lr + (self.lr - self.start_lr) * update / self.warmup
        left = max(1, self.total - self.warmup)
        return cosine(update - self.warmup, left, self.lr, self.final_lr)


class View(NamedTuple):
    """A batch as the encoders see it.

    Attributes:
        patches: (N, P, values) of all clips.
        features: (N, P, D) what the target encoder says of them.
        target: the same, normalised: what has to be predicted.
        dice: the generators of this batch's masks.
    """

    patches: Tensor
    features: Tensor
    target: Tensor
    dice: Dice


class Prediction(NamedTuple):
    """One set of masks and what was predicted for it.

    Attributes:
        name: of its loss.
        masks: the places.
        predicted: (N, M, K, D) features at `masks.targets`.
    """

    name: str
    masks: Masks
    predicted: Tensor


class MaskedJEPA(ZooModel):
    """A model that predicts the features of hidden patches from those of visible ones.

    Attributes:
        tubelet: frames of a patch.
        encoder: reads visible patches; learns.
        target_encoder: its slow copy, which reads all; its features are what `encode` gives, as
            both papers evaluate it.
        predictor: from the ones to the others.
    """

    needs_actions: ClassVar[bool] = False
    collapse_remedy: ClassVar[str] = (
        "let the target move more slowly (ema nearer to 1), or lower the learning rate"
    )
    axes: ClassVar[int]

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        widths: Mapping[str, int],
        schedule: Schedule,
        *,
        patch: int,
        image_size: int | None,
        crop_scale: tuple[float, float] | None,
        crop_aspect: tuple[float, float],
        mask_seed: int,
        tubelet: int = 1,
        flip: bool = False,
        rope: bool = False,
        mask_tokens: int = 1,
        zero_tokens: bool = False,
    ) -> None:
        super().__init__(spec)
        name = type(self).__name__
        self._check(widths, schedule)
        reject_unless_positive(name, patch=patch)
        if image_size is not None:
            reject_unless_positive(name, image_size=image_size)
        if crop_scale is not None:
            reject_ranges(name, crop_scale=crop_scale, crop_aspect=crop_aspect)
        self.patch, self.tubelet, self.schedule, self.mask_seed = (
            patch,
            tubelet,
            schedule,
            mask_seed,
        )
        shapes = {self.spec.obs[key].shape for key in self.spec.images}
        if len({shape[:2] for shape in shapes}) != 1:
            raise UserError(
                f"{name} reads images of one size, and the data has {self.spec}: name those to "
                "read by `observations` of the datamodule, or `size` to make them alike"
            )
        height, width = shapes.pop()[:2]
        self.size = (image_size, image_size) if image_size else (height, width)
        if any(side % patch or side < 2 * patch for side in self.size):
            raise UserError(
                f"{name} cuts images of {self.size[0]}x{self.size[1]} pixels into patches of "
                f"{patch}: sides must be multiples of it, and at least two patches long; set patch "
                "or image_size"
            )
        self.grid = self.size[0] // patch, self.size[1] // patch
        self.crop = None
        if crop_scale is not None:
            pairs = (crop_scale[0], crop_scale[1]), (crop_aspect[0], crop_aspect[1])
            self.crop = partial(random_crops, scale=pairs[0], aspect=pairs[1], flip=flip)
        self.drawn = 0  # masks, in training

        channels = sum(self.spec.obs[key].shape[2] for key in self.spec.images)
        values = tubelet * patch * patch * channels
        own: dict[str, Any] = {key: widths[key] for key in ("width", "layers", "heads")}
        theirs: dict[str, Any] = {key: widths[f"predictor_{key}"] for key in own}
        shared: dict[str, Any] = {"grid": self.grid, "axes": self.axes, "rope": rope}
        self.encoder = ViT(values, **own, **shared)
        self.predictor = Predictor(
            own["width"],
            **theirs,
            **shared,
            mask_tokens=mask_tokens,
            zero_tokens=zero_tokens,
        )
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    # Training

    @abstractmethod
    def clips(self, images: Tensor) -> Tensor:
        """Clips (N, T, H, W, C) of images (B, T, H, W, C)."""

    @abstractmethod
    def predictions(self, view: View) -> Iterator[Prediction]:
        """Draws masks and predicts what they hide."""

    @abstractmethod
    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The loss of predicted features, a scalar."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predicts hidden patches of a batch of images (B, T, H, W, C)."""
        view = self.view(batch["obs"], Dice.of(self.mask_seed, self.drawn, self.global_rank))
        self.drawn += 1
        losses, metrics = self._losses(view, measure=self.logs_now)
        if self.logs_now:
            self.log_metrics(metrics)
        return self.total_loss(losses, dict.fromkeys(losses, 1 / len(losses)))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the same of clips that are not trained on, as val/<name>, always with one mask."""
        view = self.view(batch["obs"], Dice.of(self.mask_seed + 1, batch_idx, self.global_rank))
        losses, metrics = self._losses(view, measure=True)
        values = {f"val/{name}": value for name, value in {**losses, **metrics}.items()}
        self.log_dict(values, sync_dist=self.trainer.world_size > 1, batch_size=len(view.patches))

    def view(self, obs: Obs, dice: Dice) -> View:
        """Crops, patches, and the targets of all of them."""
        clips = self.clips(stack_images(obs, self.spec.images))
        if self.crop is not None and self.training:
            clips = self.crop(dice.own, clips, self.size)
        patches = self._patches(clips)
        with torch.no_grad():
            features = self.target_encoder(patches)
            return View(patches, features, normalized(features), dice)

    def predict(self, view: View, name: str, masks: Masks, kind: int = 0) -> Prediction:
        """Predicts from the visible patches alone: the others are dropped before the encoder."""
        masks = masks.to(view.patches.device)
        context = self.encoder(view.patches, masks.context)
        times = view.patches.shape[1] // self.encoder.cells
        return Prediction(name, masks, self.predictor(context, *masks, times, kind))

    def _losses(self, view: View, measure: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        losses, copies, visible = {}, [], []
        for name, masks, predicted in self.predictions(view):
            losses[name] = self.distance(predicted, take(view.target, masks.targets))
            if measure:
                with torch.no_grad():
                    copy_ = copied(view.target, *masks, self.grid)
                    copies.append(self.distance(copy_, take(view.target, masks.targets)))
                visible.append(masks.context.shape[1] / view.patches.shape[1])
        if not measure:
            return losses, {}
        loss, copy_loss = (torch.stack(list(x)).sum().detach() for x in (losses.values(), copies))
        return losses, {
            "feature_std": feature_std(view.features),
            "copy_ratio": (loss + 1e-8) / (copy_loss + 1e-8),  # 1 where nothing is left to tell
            "target_drift": drift(self.target_encoder, self.encoder),
            "visible": sum(visible) / len(visible),
        }

    def after_update(self) -> None:
        """Moves the target encoder towards the encoder."""
        super().after_update()
        kept = momentum(self.updates - 1, self.schedule.total, self.schedule.ema)
        follow(self.target_encoder, self.encoder, 1 - kept)

    def configure_optimizers(self) -> Optimizer:
        """AdamW that decays neither biases nor norms."""
        learning = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learning if p.dim() > 1], "decays": True},
            {"params": [p for p in learning if p.dim() <= 1], "decays": False, "weight_decay": 0.0},
        ]
        return AdamW(groups, self.schedule.lr, foreach=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Sets the learning rate and the weight decay of the update to come."""
        update, schedule = self.updates + 1, self.schedule
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(update)
            if group["decays"]:
                group["weight_decay"] = cosine(update, schedule.total, *schedule.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how many masks were drawn, from which the next ones follow."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks_drawn"] = self.drawn

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        super().on_load_checkpoint(checkpoint)
        self.drawn = int(checkpoint.get("masks_drawn", 0))

    # Features

    @torch.no_grad()
    def feature_map(self, obs: Obs) -> Tensor:
        """Features (B, T', rows, columns, D) of the patches of obs {key: (B, T, ...)}.

        T' is T / tubelet, rounded up: the last frame is repeated until it fills a tubelet.
        """
        images = stack_images(obs, self.spec.images)
        missing = -images.shape[1] % self.tubelet
        images = torch.cat([images, images[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
        features: Tensor = self.target_encoder(self._patches(self.clips(images)))
        times = images.shape[1] // self.tubelet
        return features.reshape(len(images), times, *self.grid, features.shape[-1])

    def encode(self, obs: Obs) -> Tensor:
        """Features (B, T, D) of obs {key: (B, T, ...)}: the mean over the patches of each frame."""
        pooled = self.feature_map(obs).mean((2, 3))
        steps = next(iter(obs.values())).shape[1]
        return pooled.repeat_interleave(self.tubelet, 1)[:, :steps]

    def _patches(self, clips: Tensor) -> Tensor:
        return patchify(resized(clips, self.size), self.patch, self.tubelet)

    def _check(self, widths: Mapping[str, int], schedule: Schedule) -> None:
        name = type(self).__name__
        for part in ("", "predictor_"):
            width, heads = widths[f"{part}width"], widths[f"{part}heads"]
            if width % (2 * heads):
                raise UserError(
                    f"{name}: {part}width={width} is not divisible into {heads} heads of an even "
                    f"width; change {part}width or {part}heads"
                )
        reject_unless_positive(name, total_updates=schedule.total, lr=schedule.lr)
        reject_outside(name, 0, schedule.total, warmup=schedule.warmup)
        reject_outside(name, 0, schedule.lr, start_lr=schedule.start_lr, final_lr=schedule.final_lr)
        for ends in zip(schedule.weight_decay, schedule.ema, strict=True):
            reject_outside(name, 0, 1, weight_decay=ends[0], ema=ends[1])
