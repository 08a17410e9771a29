"""What I-JEPA and V-JEPA share: schedules, the slow target, resuming, features."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from video_standin import MovingSquares

from datamodules import ArraySpec, Spec, UserError
from zoo.i_jepa.module import IJEPA
from zoo.jepa.masks import Dice
from zoo.jepa.model import MaskedJEPA, Schedule
from zoo.jepa.target import cosine
from zoo.v_jepa.module import VJEPA

TINY: dict[str, Any] = {
    "size": "nano", "width": 12, "layers": 1, "heads": 1, "predictor_width": 6,
    "predictor_layers": 1, "predictor_heads": 1, "patch": 8,
}  # fmt: skip
SPEC = MovingSquares.spec
BOTH = pytest.mark.parametrize("cls", [IJEPA, VJEPA])


def build(cls: type[MaskedJEPA], spec: Spec = SPEC, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(spec, **{**TINY, **options})


def batch(size: int = 3, frames: int = 4) -> dict[str, Any]:
    return MovingSquares(size, frames).next_batch()


def fit(model: MaskedJEPA, updates: int, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=MovingSquares())
    return trainer


def test_the_learning_rate_warms_up_and_falls() -> None:
    schedule = Schedule(100, 10, 2e-4, 1e-3, 1e-6, (0.04, 0.4), (0.996, 1.0))
    assert schedule.lr_at(1) == pytest.approx(2e-4 + 0.1 * 8e-4)
    assert schedule.lr_at(5) == pytest.approx(6e-4)
    assert schedule.lr_at(10) == pytest.approx(1e-3)
    assert schedule.lr_at(55) == pytest.approx((1e-3 + 1e-6) / 2)
    assert schedule.lr_at(100) == schedule.lr_at(300) == pytest.approx(1e-6)


@BOTH
def test_each_update_sets_the_optimizer_and_moves_the_target_after_it(
    cls: type[MaskedJEPA],
) -> None:
    seen: list[Any] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(copy.deepcopy(model.target_encoder.state_dict()))

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            seen.append([g[key] for g in groups for key in ("lr", "weight_decay")])
            seen.append(copy.deepcopy(model.encoder.state_dict()))
            seen.append(copy.deepcopy(model.target_encoder.state_dict()))

    model = build(cls, total_updates=4, warmup=2, ema=(0.5, 0.9), lr=1e-2)
    fit(model, 3, callbacks=[Watch()])
    kept = (0.5, 0.6, 0.7)
    for update in range(3):
        before, rates, fast, after = seen[4 * update : 4 * update + 4]
        decay = cosine(update + 1, 4, 0.04, 0.4)
        lr = model.schedule.lr_at(update + 1)
        assert rates == pytest.approx([lr, decay, lr, 0.0])
        for key, value in after.items():
            expected = kept[update] * before[key] + (1 - kept[update]) * fast[key]
            torch.testing.assert_close(value, expected)
    assert not torch.equal(fast["embed.weight"], after["embed.weight"])


@BOTH
def test_biases_and_norms_are_not_decayed(cls: type[MaskedJEPA]) -> None:
    model = build(cls)
    decayed, free = model.configure_optimizers().param_groups
    names = {id(p): key for key, p in model.named_parameters()}
    assert all(names[id(p)].endswith(("weight", "mask_tokens")) for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(
        [p for p in model.parameters() if p.requires_grad]
    )
    assert not any(p.requires_grad for p in model.target_encoder.parameters())


@BOTH
def test_the_loss_compares_predictions_with_normalised_features_of_the_whole(
    cls: type[MaskedJEPA],
) -> None:
    model = build(cls, crop_scale=None)
    loss = model.training_step(batch(), 0)
    view = model.view(batch()["obs"], Dice.of(0, 0))
    whole = torch.nn.functional.layer_norm(model.target_encoder(view.patches), (12,))
    losses = []
    for _, masks, predicted in model.predictions(view):
        hidden = torch.stack(
            [whole[i][masks.targets[i]] for i in range(len(whole))]
        )  # (N, M, K, D)
        error = (predicted - hidden).abs()
        if cls is IJEPA:
            error = torch.where(error < 1, error.square() / 2, error - 0.5)
        losses.append(error.mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert len(losses) == (1 if cls is IJEPA else 2)


@BOTH
def test_nothing_hidden_reaches_the_prediction(cls: type[MaskedJEPA]) -> None:
    model = build(cls, crop_scale=None)
    view = model.view(batch()["obs"], Dice.of(0, 0))
    for _, masks, predicted in model.predictions(view):
        noise = torch.randn_like(view.patches)
        for i, seen in enumerate(masks.context):
            noise[i, seen] = view.patches[i, seen]
        context = model.encoder(noise, masks.context)
        again = model.predictor(context, *masks, view.patches.shape[1] // 16)
        torch.testing.assert_close(again, predicted)


@BOTH
def test_masks_go_on_where_a_checkpoint_left_off(cls: type[MaskedJEPA], tmp_path: Path) -> None:
    model = build(cls)
    trainer = fit(model, 2)
    assert model.drawn == 2
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = build(cls)
    loaded.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert loaded.drawn == 2


@BOTH
def test_gradients_may_be_accumulated(cls: type[MaskedJEPA]) -> None:
    model = build(cls)
    fit(model, 2, accumulate_grad_batches=3)
    assert (model.updates, model.drawn) == (2, 6)


@BOTH
def test_metrics_of_training_and_validation(cls: type[MaskedJEPA]) -> None:
    model = build(cls)
    metrics = fit(model, 2).logged_metrics
    assert 0 < metrics["train/feature_std"] < 1
    assert 0 < metrics["train/copy_ratio"] < 10
    assert 0 < metrics["train/target_drift"] < 1
    assert 0 < metrics["train/visible"] < 1

    class Held(MovingSquares):
        def val_dataloader(self) -> Any:
            return DataLoader([batch()], batch_size=None)

    found = [pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu").validate(
        model, datamodule=Held(), verbose=False
    )[0] for _ in range(2)]  # fmt: skip
    assert found[0] == found[1]
    assert {"val/feature_std", "val/copy_ratio"} < set(found[0])
    assert model.drawn == 2


def test_collapse_shows_in_the_metrics() -> None:
    model = build(IJEPA)
    with torch.no_grad():
        for encoder in (model.encoder, model.target_encoder):
            encoder.transformer.norm.weight.zero_()
            encoder.transformer.norm.bias.copy_(torch.arange(12.0))
        model.predictor.project.weight.zero_()
        model.predictor.project.bias.copy_(
            torch.nn.functional.layer_norm(torch.arange(12.0), (12,))
        )
    view = model.view(batch()["obs"], Dice.of(0, 0))
    losses, metrics = model._losses(view, measure=True)
    assert metrics["feature_std"] < 1e-6
    assert metrics["copy_ratio"] == pytest.approx(1.0, abs=0.1)
    assert losses["prediction"] < 1e-8


@BOTH
def test_features_are_the_target_encoders(cls: type[MaskedJEPA]) -> None:
    model, obs = build(cls), batch()["obs"]
    before = model.encode(obs)
    assert before.shape == (3, 4, 12)
    with torch.no_grad():
        model.encoder.embed.weight.zero_()
    assert torch.equal(model.encode(obs), before)
    with torch.no_grad():
        model.target_encoder.embed.weight.zero_()
    assert not torch.equal(model.encode(obs), before)
    assert not before.requires_grad


def test_feature_maps_of_frames_and_of_tubelets() -> None:
    obs = batch(frames=5)["obs"]
    images, clips = build(IJEPA), build(VJEPA)
    assert images.feature_map(obs).shape == (3, 5, 4, 4, 12)
    assert clips.feature_map(obs).shape == (3, 3, 4, 4, 12)  # the last frame fills its tubelet
    torch.testing.assert_close(images.encode(obs)[:, 2], images.feature_map(obs)[:, 2].mean((1, 2)))
    encoded = clips.encode(obs)
    assert encoded.shape == (3, 5, 12)
    assert torch.equal(encoded[:, 0], encoded[:, 1])
    assert not torch.equal(encoded[:, 1], encoded[:, 2])
    filled = {"image": torch.cat([obs["image"], obs["image"][:, -1:]], 1)}
    assert torch.equal(clips.feature_map(filled), clips.feature_map(obs))


def test_images_of_several_cameras_are_channels() -> None:
    image = ArraySpec((16, 16, 3), "uint8")
    spec = Spec({"left": image, "right": image, "state": ArraySpec((2,), "float32")})
    model = build(IJEPA, spec)
    obs = {key: torch.randint(256, (2, 1, 16, 16, 3)).byte() for key in ("left", "right")}
    assert model.encode(obs).shape == (2, 1, 12)
    assert model.encoder.embed.in_features == 8 * 8 * 6


def test_images_are_resized_for_the_encoder_and_cropped_only_in_training() -> None:
    model = build(VJEPA, image_size=16)
    assert model.grid == (2, 2)
    obs, dice = batch()["obs"], Dice.of
    whole = model.eval().view(obs, dice(0, 0)).patches
    assert torch.equal(whole, model.view(obs, dice(0, 1)).patches)
    assert not torch.equal(whole, model.train().view(obs, dice(0, 0)).patches)


def refused() -> Iterator[tuple[type[MaskedJEPA], Spec, dict[str, Any], str]]:
    vector = Spec({"vector": ArraySpec((3,), "float32")})
    sizes = Spec({"a": ArraySpec((8, 8, 1), "uint8"), "b": ArraySpec((16, 16, 1), "uint8")})
    yield IJEPA, vector, {}, "reads images"
    yield VJEPA, sizes, {}, "images of one size"
    yield IJEPA, SPEC, {"patch": 5}, "multiples of it"
    yield IJEPA, SPEC, {"patch": 32}, "two patches long"
    yield IJEPA, SPEC, {"size": "giant"}, "no size 'giant'"
    yield VJEPA, SPEC, {"heads": 5}, "width=12 is not divisible into 5 heads"
    yield VJEPA, SPEC, {"predictor_heads": 4}, "predictor_width=6"
    yield IJEPA, SPEC, {"ema": (0.9, 1.1)}, "ema"
    yield IJEPA, SPEC, {"warmup": 10, "total_updates": 5}, "warmup"
    yield VJEPA, SPEC, {"tubelet": 0}, "tubelet"
    yield VJEPA, SPEC, {"long_range": (2, 1.5)}, "long_range"
    yield VJEPA, SPEC, {"aspect": (1.5, 0.75)}, "aspect"
    yield VJEPA, SPEC, {"crop_aspect": (0.0, 1.0)}, "crop_aspect"
    yield IJEPA, SPEC, {"target_scale": (0.1, 1.2)}, "target_scale"
    yield IJEPA, SPEC, {"context_scale": (1.0, 0.9)}, "context_scale"
    yield IJEPA, SPEC, {"patch": 0}, "patch"
    yield IJEPA, SPEC, {"image_size": 0}, "image_size"


@pytest.mark.parametrize(("cls", "spec", "options", "message"), refused())
def test_what_does_not_fit_is_refused(
    cls: type[MaskedJEPA], spec: Spec, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(cls, spec, **options)


def test_clips_shorter_than_a_tubelet_are_refused() -> None:
    with pytest.raises(UserError, match="clip_length"):
        build(VJEPA).training_step(batch(frames=1), 0)
