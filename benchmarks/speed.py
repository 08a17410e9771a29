"""`zoo bench speed`: what an update, a batch from the replay, an action and the Trainer cost.

Everything is timed with one thread unless OMP_NUM_THREADS says otherwise. Figures that are compared
(sampling against copying, Trainer against a bare loop) are taken in turns, so that a busy machine
slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

import zoo
from benchmarks.provenance import git_sha, hardware, versions
from benchmarks.results import Row, write_rows
from datamodules.replay import ReplayBuffer
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import Field

VECTORS = Spec(
    {"vector": ArraySpec((24,), "float32")}, ActionSpec("box", low=(-1.0,) * 6, high=(1.0,) * 6)
)
CARTPOLE = Spec({"vector": ArraySpec((4,), "float32")}, ActionSpec("discrete", nvec=(2,)))
FLAGS = ("is_first", "is_last", "is_terminal")


@dataclass(frozen=True)
class Setting:
    """A model, its size, and the batch it is timed on."""

    model: str
    name: str
    spec: Spec
    options: Mapping[str, Any]
    batch_size: int
    length: int


SETTINGS = (
    Setting("dreamer-v3", "nano 16x16, 64 starts", CARTPOLE, {"imagine_last": 4}, 16, 16),
    Setting("dreamer-v3", "nano 16x16, all starts", CARTPOLE, {}, 16, 16),
    Setting(
        "dreamer-v3",
        "deter 512, 16x16 latents, 8x32, all starts",
        VECTORS,
        {"size": "1m", "stoch": 16, "classes": 16},
        8,
        32,
    ),
)


def build(setting: Setting) -> zoo.ZooModel:
    """The setting's model with seeded weights; nano unless the setting says otherwise."""
    torch.manual_seed(0)
    return zoo.create(setting.model, spec=setting.spec, **{"size": "nano", **setting.options})


def batch_of(model: Any, batch_size: int, length: int) -> dict[str, Any]:
    """A random batch (B, T + context, ...) as the model's datamodule would give it."""
    spec, steps = model.spec, (batch_size, length + model.replay_context)
    rng = np.random.default_rng(0)
    actions = [spec.action.sample(rng) for _ in range(steps[0] * steps[1])]
    batch: dict[str, Any] = {
        "obs": {key: torch.randn(*steps, *array.shape) for key, array in spec.obs.items()},
        "action": torch.from_numpy(np.stack(actions)).view(*steps, *spec.action.shape),
        "reward": torch.randn(steps),
        "latents": {
            key: torch.zeros(*steps, *shape, dtype=getattr(torch, dtype))
            for key, (shape, dtype) in model.latent_fields().items()
        },
    }
    return batch | {key: torch.zeros(steps, dtype=torch.bool) for key in FLAGS}


def update_function(model: Any, batch: Mapping[str, Any]) -> Callable[[], None]:
    """One whole training update: losses, gradients, optimizer, slow copies."""
    optimizer = model.configure_optimizers()

    def update() -> None:
        loss: Tensor = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_update()

    return update


def median_ms(*functions: Callable[[], Any], repeats: int, warmup: int = 3) -> list[float]:
    """Median milliseconds of each function, called in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(warmup + repeats):
        for taken, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if round_ >= warmup:
                taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def time_updates(repeats: int) -> Iterator[tuple[str, str, float, int]]:
    """updates_per_s and parameters of each setting, and act_latency_ms for four environments."""
    for setting in SETTINGS:
        model: Any = build(setting)
        update = update_function(model, batch_of(model, setting.batch_size, setting.length))
        (update_ms,) = median_ms(update, repeats=repeats)
        yield setting.name, "updates_per_s", 1e3 / update_ms, repeats
        yield setting.name, "params", sum(p.numel() for p in model.parameters()), 1
        obs = {key: torch.randn(4, *array.shape) for key, array in setting.spec.obs.items()}
        state = model.initial_state(4)
        (act_ms,) = median_ms(lambda: model.act(obs, state, explore=True), repeats=10 * repeats)  # noqa: B023
        yield setting.name, "act_latency_ms", act_ms, 10 * repeats


def time_sampling(steps: int, repeats: int) -> Iterator[tuple[str, str, float, int]]:
    """Sampling 16 x 64 images of 64x64x3 from a replay on disk, against copying as many bytes."""
    image = (64, 64, 3)
    fields = {"obs/image": Field(image, "uint8"), "action": Field((), "int64")}
    fields |= {"reward": Field((), "float32"), **{key: Field((), "bool") for key in FLAGS}}
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (64, *image), dtype=np.uint8)
    flags = {key: np.array(False) for key in FLAGS}
    name = f"16x64 of 64x64x3 from {steps:,} steps"
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        replay = ReplayBuffer(
            Path(folder) / "replay", fields, sequence_length=64, capacity=2**40, fresh_first=False
        )
        for step in range(steps):
            row = {"obs/image": frames[step % 64], "action": np.array(step)}
            replay.add(step % 4, {**row, "reward": np.array(0, np.float32), **flags})
        source = rng.integers(0, 256, (16, 64, *image), dtype=np.uint8)
        target = np.empty_like(source)
        # Warm: by then nearly every page of the replay has been mapped once.
        sample_ms, copy_ms = median_ms(
            lambda: replay.sample(16),
            lambda: np.copyto(target, source),
            repeats=repeats,
            warmup=steps // 300,
        )
        replay.close()
    yield name, "sample_ms", sample_ms, repeats
    yield name, "sample_over_copy", sample_ms / copy_ms, repeats


class _SameBatch:
    """A loader that serves one batch over and over."""

    def __init__(self, batch: Mapping[str, Any], length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter([self.batch] * self.length)


def time_trainer(updates: int, rounds: int) -> Iterator[tuple[str, str, float, int]]:
    """Time of a Trainer with our logger and callbacks over that of a bare loop, nano size."""
    from callbacks.budget import Budget
    from callbacks.checkpoint import RunCheckpoint
    from callbacks.logger import RunLogger
    from callbacks.progress import RunProgress
    from callbacks.run_metrics import RunMetrics

    setting = SETTINGS[0]
    bare: list[float] = []
    full: list[float] = []
    for _ in range(rounds):
        model: Any = build(setting)
        batch = batch_of(model, setting.batch_size, setting.length)
        update = update_function(model, batch)
        update()
        start = time.perf_counter()
        for _ in range(updates):
            update()
        bare.append(time.perf_counter() - start)

        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            clock = _Clock()
            trainer = pl.Trainer(
                accelerator="cpu",
                default_root_dir=folder,
                max_epochs=-1,
                max_steps=updates + 1,
                logger=RunLogger(),
                callbacks=[Budget(), RunMetrics(), RunProgress(), RunCheckpoint(), clock],
                enable_model_summary=False,
            )
            trainer.fit(build(setting), _SameBatch(batch, updates + 1))
            full.append(clock.seconds)
    ratio = statistics.median(full) / statistics.median(bare)
    yield setting.name, "trainer_over_bare_loop", ratio, rounds * updates


class _Clock(pl.Callback):
    """Seconds from the end of the first batch to the end of the last."""

    start: float | None = None
    seconds = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        if self.start is None:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - self.start


def main(argv: list[str]) -> int:
    """Times everything, prints it, and writes OUT/results.csv."""
    parser = argparse.ArgumentParser(prog="zoo bench speed")
    parser.add_argument("--out", type=Path, default=Path("bench/speed"))
    parser.add_argument("--repeats", type=int, default=30, help="timings per figure")
    parser.add_argument("--replay-steps", type=int, default=200_000, help="steps in the replay")
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    where = (git_sha(), versions(), hardware())
    rows = []
    figures = (
        time_updates(options.repeats),
        time_sampling(options.replay_steps, 10 * options.repeats),
        time_trainer(updates=10 * options.repeats, rounds=3),
    )
    for figure in figures:
        for name, metric, value, n in figure:
            print(f"{name:45} {metric:24} {value:12,.3f}", flush=True)
            cell = ("speed", SETTINGS[0].model, name, "synthetic", 0, 0, 0)
            rows.append(Row(*cell, metric, value, n, None, *where))
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "results.csv", rows)
    print(f"written to {options.out / 'results.csv'}")
    return 0
