"""What the encoder is shown."""

from __future__ import annotations

import numpy as np
import torch

from zoo.jepa.views import random_crops, resized, stack_images


def crops(clips: torch.Tensor, seed: int = 0, flip: bool = False) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return random_crops(rng, clips, (16, 16), (0.3, 1.0), (0.75, 1.35), flip)


def gradient(count: int = 200) -> torch.Tensor:
    """(N, 2, 40, 20, 2) whose channels tell row and column; the second frame is 100 higher."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(20.0), indexing="ij")
    frame = torch.stack([y, x], -1)
    return torch.stack([frame, frame + 100]).expand(count, -1, -1, -1, -1)


def test_images_are_scaled_and_put_side_by_side() -> None:
    bytes_ = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2, 1)
    floats = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2, 1)
    out = stack_images({"b": bytes_, "a": floats, "vector": torch.zeros(1)}, ["a", "b"])
    assert out.shape == (1, 1, 1, 2, 2)
    assert out[0, 0, 0].tolist() == [[-1, -1], [0, 1]]


def test_resizing_keeps_means_and_what_fits_already() -> None:
    clips = torch.rand(2, 3, 32, 16, 1)
    small = resized(clips, (8, 4))
    assert small.shape == (2, 3, 8, 4, 1)
    torch.testing.assert_close(small.mean(), clips.mean(), atol=0.01, rtol=0)
    assert resized(clips, (32, 16)) is clips


def test_crops_are_rectangles_of_the_share_and_aspect_asked_for() -> None:
    views = crops(gradient())
    assert views.shape == (200, 2, 16, 16, 2)
    torch.testing.assert_close(views[:, 1] - views[:, 0], torch.full_like(views[:, 0], 100.0))
    inner = (views[:, 0, -2, -2] - views[:, 0, 1, 1]) / 13  # pixels of the clip per pixel
    tall, wide = 16 * inner[:, 0], 16 * inner[:, 1]
    share = tall * wide / 800
    assert 0.25 < share.min() < 0.4
    assert share.max() < 1.01
    assert (wide / tall).max() < 1.45
    assert wide.max() < 20.5
    assert views[..., 0].max() > 38
    assert views[..., 0].min() < 1


def test_half_of_the_clips_are_mirrored_if_asked_for() -> None:
    def mirrored(views: torch.Tensor) -> torch.Tensor:
        return (views[:, 0, 0, -1, 1] < views[:, 0, 0, 0, 1]).float().mean()

    assert mirrored(crops(gradient())) == 0
    assert 0.4 < mirrored(crops(gradient(), flip=True)) < 0.6


def test_the_same_numbers_give_the_same_crops() -> None:
    clips = torch.rand(3, 2, 20, 20, 3)
    assert torch.equal(crops(clips, 1, True), crops(clips, 1, True))
    assert not torch.equal(crops(clips, 1, True), crops(clips, 2, True))
