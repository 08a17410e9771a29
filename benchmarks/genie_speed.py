"""`python -m benchmarks.genie_speed`: what dreamed frames and updates of Genie cost, on one thread.

A dreamed frame is one step at a full window and its decoding, as `zoo play` shows it. `cached` is
Genie's own: the past is read once a frame, for all MaskGIT steps; `anew` reads it at each of them.
Figures are medians, taken in turns, with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.speed import median_ms
from datamodules.errors import UserError
from datamodules.spec import ArraySpec, Spec
from zoo import registry
from zoo.commands.output import table
from zoo.genie.dreams import Dreams
from zoo.genie.dynamics import Dynamics, reveal, unmasking
from zoo.genie.module import Genie

STEPS = (1, 2, 4, 8, 25)
BATCHES = (1, 32)


def build(preset: str, side: int) -> Genie:
    """A preset's model with seeded weights, for images of this side in pixels."""
    if registry.split(preset)[0] != Genie.name:
        raise UserError(f"'{preset}' is no preset of genie, of which the speed is measured")
    torch.manual_seed(0)
    model: Any = registry.create(preset, Spec({"image": ArraySpec((side, side, 3), "uint8")}))
    return model


def clips(model: Genie, batch: int) -> Tensor:
    """Random uint8 video (B, T, H, W, C)."""
    shape = batch, model.frames, *model.spec.obs[model.image_key].shape
    return torch.randint(256, shape, dtype=torch.uint8)


@torch.no_grad()
def reread(dynamics: Dynamics, *arguments: Any) -> Tensor:
    """`Dynamics.next_frame` that reads the past anew at each step."""
    tokens, actions, valid, action, steps, temperature = arguments
    actions, valid = torch.cat([actions, action[:, None]], 1), F.pad(valid, (0, 1), value=True)
    guess = torch.full_like(tokens[:, -1], dynamics.mask)
    for left in unmasking(dynamics.places, steps):
        scores = dynamics(torch.cat([tokens, guess[:, None]], 1), actions, valid)[:, -1]
        guess = reveal(guess, scores, left, temperature, dynamics.mask)
    return guess


@torch.no_grad()
def dream_rates(model: Genie, batch: int, repeats: int) -> list[tuple[float, float]]:
    """Dreamed frames per second, cached and anew, for each number of MaskGIT steps."""
    states = model.eval().observe({"obs": {model.image_key: clips(model, batch)}})
    state = {key: value[:, -1] for key, value in states.items()}
    action = torch.randint(model.num_latent_actions, (batch,))

    def frame(dreams: Dreams, steps: int) -> None:
        after = dreams.step(state, action, steps, model.temperature)
        dreams.decode({key: value[:, None] for key, value in after.items()})

    anew: Any = SimpleNamespace(next_frame=partial(reread, model.dynamics))
    both = model.dreams, Dreams(model.tokenizer, model.latent_actions, anew, model.frames)
    functions = [partial(frame, dreams, steps) for steps in STEPS for dreams in both]
    rates = [1e3 * batch / taken for taken in median_ms(*functions, repeats=repeats, warmup=1)]
    return list(zip(rates[::2], rates[1::2], strict=True))


def updates(model: Genie, optimizer: Optimizer, frames: Tensor) -> Iterator[str]:
    """One update of the tokenizer, one of the world; says which part is done."""

    def step() -> None:
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    model.updates = 0
    model.tokenizer.train()
    losses, _ = model._tokenizer_losses(frames[: model.tokenizer_clips])
    loss = losses["reconstruction"] + model.commitment * losses["commitment"]
    yield "tokenizer: forward"
    loss.backward()
    yield "tokenizer: backward"
    step()
    yield "tokenizer: optimizer"
    model.updates = model.stages.lengths["tokenizer"] + model.stages.head_start
    frames = frames[: model.world_clips]
    losses, _, vectors = model._action_losses(frames)
    loss = losses["next_frame"] + model.commitment * losses["action_commitment"]
    yield "world: latent actions, forward"
    loss.backward()  # apart from the dynamics, from which no gradient comes back
    yield "world: latent actions, backward"
    model.tokenizer.eval()
    loss, _ = model._dynamics_loss(frames, vectors)
    yield "world: tokens and dynamics, forward"
    loss.backward()
    yield "world: dynamics, backward"
    step()
    yield "world: optimizer"


def update_parts(model: Genie, batch: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part of an update of the two stages."""
    frames, optimizer = clips(model.train(), batch).float() / 255, model.configure_optimizers()
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(1 + repeats):
        last = time.perf_counter()
        for part in updates(model, optimizer, frames):
            taken[part].append((time.perf_counter() - last) * 1e3)
            last = time.perf_counter()
    return {part: statistics.median(times[1:]) for part, times in taken.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("preset", nargs="?", default="genie/sprites")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=8, help="clips of an update")
    parser.add_argument("--repeats", type=int, default=10, help="timings per figure")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = build(options.preset, options.side)
    rows = []
    for batch in BATCHES:
        rates = zip(STEPS, dream_rates(model, batch, options.repeats), strict=True)
        rows += [[str(batch), str(n), f"{ours:.1f}", f"{anew:.1f}"] for n, (ours, anew) in rates]
    table(["dreams", "MaskGIT steps", "frames/s cached", "frames/s anew"], rows)
    parts = update_parts(model, options.batch, options.repeats)
    print(f"\nupdates on {options.batch} clips of {model.frames} frames")
    table(["part", "ms"], [[part, f"{taken:.1f}"] for part, taken in parts.items()])


if __name__ == "__main__":
    main()
