"""V-JEPA learns where things are from video alone, and is the faster the more is hidden."""

from __future__ import annotations

import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from video_standin import MovingSquares, moving_squares, probe

from zoo.jepa.masks import Dice, Masks
from zoo.v_jepa.module import VJEPA


def features(model: VJEPA, images: np.ndarray) -> np.ndarray:
    parts = torch.from_numpy(images).split(64)
    return torch.cat([model.encode({"image": part}) for part in parts]).numpy()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_linear_probe_finds_the_square() -> None:
    pl.seed_everything(0)
    data = MovingSquares(batch_size=16, clip_length=4)
    model = VJEPA(
        data.spec,
        size="nano",
        patch=4,
        crop_scale=None,
        flip=False,
        min_keep=6,
        ema=(0.99, 1.0),
        lr=1e-3,
        start_lr=1e-4,
        warmup=100,
        total_updates=1400,
    )
    held_out = moving_squares(np.random.default_rng(99), 1024, 4)
    pixels = held_out.image.reshape(1024, 4, -1) / 255
    found = {"pixels": probe(pixels, held_out.position)}
    found["random features"] = probe(features(model, held_out.image), held_out.position)
    trainer = pl.Trainer(
        max_steps=1400,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    seconds = time.process_time() - start
    found["V-JEPA"] = probe(features(model, held_out.image), held_out.position)
    print({key: round(value, 3) for key, value in found.items()}, f"{seconds:.0f} s")
    assert found["V-JEPA"] >= 0.9
    assert found["V-JEPA"] > max(found["pixels"], found["random features"]) + 0.05


@pytest.mark.slow
def test_a_step_takes_less_time_the_more_is_hidden() -> None:
    torch.manual_seed(0)
    model = VJEPA(MovingSquares.spec, size="nano", patch=4, crop_scale=None)
    view = model.view(MovingSquares(16, 8).next_batch()["obs"], Dice.of(0, 0))
    total = view.patches.shape[1]
    wanted = torch.arange(total)[None, None].expand(16, -1, -1)

    def seconds(hidden: float) -> float:
        seen = torch.arange(round((1 - hidden) * total)).expand(16, -1)
        masks = Masks(seen, wanted[..., len(seen[0]) :])
        times = []
        for _ in range(5):
            start = time.process_time()
            model.predict(view, "", masks).predicted.mean().backward()
            times.append(time.process_time() - start)
        return min(times)

    measured = {hidden: seconds(hidden) for hidden in (0.25, 0.5, 0.75, 0.9)}
    print({hidden: f"{1e3 * s:.0f} ms" for hidden, s in measured.items()})
    ordered = list(measured.values())
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[-1] < 0.6 * ordered[0]
