"""Silent video made on the spot: a square that moves about, served as clips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.spec import ArraySpec, Spec

SIDE, SQUARES, GREY = 32, (8, 4), 128


class Video(NamedTuple):
    """Clips (B, T, 32, 32, 3) uint8, and the middle of the large square: (B, T, 2) in [0, 1]."""

    image: np.ndarray
    position: np.ndarray


def moving_squares(rng: np.random.Generator, clips: int, frames: int) -> Video:
    """A large square covers a small one; both go straight on and bounce off the walls.

    Each has a colour of its own in each clip, brighter or darker than the grey behind: the mean
    over colours is grey, so nothing linear in the pixels tells where the squares are.
    """
    image = np.full((clips, frames, SIDE, SIDE, 3), GREY, np.uint8)
    axis = np.arange(SIDE)
    for side in sorted(SQUARES):
        room = SIDE - side
        start, speed = rng.uniform(0, room, (clips, 1, 2)), rng.uniform(-2, 2, (clips, 1, 2))
        path = start + speed * np.arange(frames)[:, None]
        corner = np.abs((path + room) % (2 * room) - room)  # folded back at the walls
        first = corner.round()[..., None]
        inside = (axis >= first) & (axis < first + side)
        square = inside[..., 0, :, None] & inside[..., 1, None, :]
        contrast = rng.choice([-1, 1], (clips, 1, 1, 1, 1)) * rng.integers(
            60, 127, (clips, 1, 1, 1, 3)
        )
        colour = np.broadcast_to(GREY + contrast, image.shape)
        image[square] = colour[square]
    return Video(image, (corner + side / 2) / SIDE)


class MovingSquares(pl.LightningDataModule):
    """Endless batches of clips, all different."""

    spec = Spec({"image": ArraySpec((SIDE, SIDE, 3), "uint8")}, action=None)

    def __init__(self, batch_size: int = 4, clip_length: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.clip_length, self.seed = batch_size, clip_length, seed
        self.served = 0

    def train_dataloader(self) -> Loader:
        return Loader(self)

    def next_batch(self) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.served])
        self.served += 1
        video = moving_squares(rng, self.batch_size, self.clip_length)
        flags = torch.zeros(self.batch_size, self.clip_length, dtype=torch.bool)
        return {
            "obs": {"image": torch.from_numpy(video.image)},
            "is_first": flags,
            "is_last": flags,
            "is_terminal": flags,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


class Loader:
    def __init__(self, data: MovingSquares) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(len(self)):
            yield self.data.next_batch()


def probe(features: np.ndarray, position: np.ndarray) -> float:
    """R^2 of the position (B, T, 2) from features (B, T, F), on a quarter of the clips.

    A ridge regression on another half; its strength is chosen on the rest.
    """
    x, y = features.reshape(*position.shape[:2], -1).astype(np.float64), position
    n = len(x) // 4
    parts = [slice(0, 2 * n), slice(2 * n, 3 * n), slice(3 * n, None)]
    (x, x_choice, x_test), (y, y_choice, y_test) = (
        [a[part].reshape(-1, a.shape[-1]) for part in parts] for a in (x, y)
    )
    mean, std = x.mean(0), x.std(0) + 1e-6
    seen, x_choice, x_test = ((a - mean) / std for a in (x, x_choice, x_test))
    gram, centred = seen @ seen.T / len(seen), y - y.mean(0)

    def r2(strength: float, x: np.ndarray, truth: np.ndarray) -> float:
        weight = seen.T @ np.linalg.solve(gram + strength * np.eye(len(gram)), centred) / len(gram)
        error = np.square(x @ weight + y.mean(0) - truth).sum()
        return float(1 - error / np.square(truth - truth.mean(0)).sum())

    best = max((r2(s, x_choice, y_choice), s) for s in (1e-4, 1e-3, 1e-2, 1e-1, 1.0))[1]
    return r2(best, x_test, y_test)
