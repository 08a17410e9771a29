"""`python -m benchmarks.new_balls RUN`: do new balls of Catch appear in dreams, and fall?

RUN is a DIAMOND that has learnt from episodes of several balls:

    zoo data collect zoo/Catch-v0 --episodes 400 --env-kwargs balls=4 --out data/catch-balls
    zoo fit diamond/catch-video --source data/catch-balls --run RUN

When a ball has landed, the next frame has another at a random place of the first row, which then
drifts to the left, straight or to the right, one chance in three each. Dreams begin where the first
ball has landed, with true actions. For several samplers the table has the share of dreams in which
there is a ball at the top after one step, the share in which it falls as it must for five steps on,
without jumps, and how often of these it has drifted which way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import datamodules.envs.catch  # noqa: F401  registers the environment
from benchmarks.video import Clips, dream, find_ball, record_clips
from datamodules.envs.catch import FALL, STEPS_PER_BALL
from zoo.commands.output import table
from zoo.diamond.module import Diamond
from zoo.diamond.sampler import make_sampler
from zoo.runs import Run, load

AHEAD = 6  # steps of a dream, in which the ball falls five times
SAMPLERS = {
    "published": "published",
    "published, start_std 5": {"start_std": 5.0},
    "one step": {"steps": 1},
    "faithful": "faithful",
}


def landings(count: int, seed: int) -> Clips:
    """Episodes of two balls; dreams start where the first has landed."""
    options = {"clips": count, "clip_length": 2 * STEPS_PER_BALL + 2, "context": 1, "horizon": 1}
    clips = record_clips("zoo/Catch-v0", {**options, "env": {"balls": 2}}, seed)
    return clips._replace(start=torch.full((count,), STEPS_PER_BALL))


def truth(clips: Clips) -> Tensor:
    """What dreams of clips would be if they were true, (N, 1 + AHEAD, H, W, C) in [0, 1]."""
    (images,) = clips.batch["obs"].values()
    return images[:, STEPS_PER_BALL : STEPS_PER_BALL + 1 + AHEAD].float() / 255


def describe(frames: Tensor) -> list[float]:
    """Shares of dreams (N, 1 + AHEAD, H, W, C): appeared, fell; and of these left, straight, right.

    Places are those of balls of two pixels, of which `find_ball` gives the middle.
    """
    middle, seen = find_ball(frames[:, 1:])
    x, y = middle.unbind(-1)
    row = 0.5 + FALL * torch.arange(AHEAD)
    step = x.diff(dim=1).abs().amax(1)  # it drifts a pixel a step, and is reflected
    appeared = seen[:, 0] & ((y[:, 0] - row[0]).abs() < 1)
    fell = seen.all(1) & ((y - row).abs() < 1).all(1) & (step < 2)
    moved = (x[:, 2] - x[:, 0])[fell]  # in two steps, before most walls are met
    count = max(1, len(moved))
    ways = [(moved < -1).sum(), (moved.abs() <= 1).sum(), (moved > 1).sum()]
    return [float(appeared.float().mean()), float(fell.float().mean())] + [
        float(way) / count for way in ways
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--clips", type=int, default=200, help="dreams for each sampler")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load(Run(options.run).checkpoint()).eval()
    if not isinstance(model, Diamond):
        parser.error(f"{options.run} is no run of diamond")
    if options.clips < 1:
        parser.error(f"--clips is {options.clips}, must be at least 1")
    clips = landings(options.clips, seed=0)
    rows = [["the game", *describe(truth(clips))]]
    for name, sampler in SAMPLERS.items():
        torch.manual_seed(0)
        model.sampler = make_sampler(sampler)  # type: ignore[arg-type]
        rows.append([name, *describe(dream(model, clips, AHEAD))])
    shown = [[str(row[0]), *(f"{value:.2f}" for value in row[1:])] for row in rows]
    table(["sampler", "appears", "falls", "left", "straight", "right"], shown)


if __name__ == "__main__":
    main()
