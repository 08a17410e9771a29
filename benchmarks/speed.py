"""`zoo bench speed`: what updates, batches, actions, the Trainer and dreams cost.

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
from datamodules.sources.source import step_fields
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import EpisodeStore
from datamodules.video_datamodule import VideoDataModule

VECTORS = Spec(
    {"vector": ArraySpec((24,), "float32")}, ActionSpec("box", low=(-1.0,) * 6, high=(1.0,) * 6)
)
CARTPOLE = Spec({"vector": ArraySpec((4,), "float32")}, ActionSpec("discrete", nvec=(2,)))
FRAMES = Spec({"image": ArraySpec((64, 64, 3), "uint8")}, CARTPOLE.action)
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
    image, fields = FRAMES.obs["image"].shape, step_fields(FRAMES)
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


def time_clips(frames: int, repeats: int) -> Iterator[tuple[str, str, float, int]]:
    """Clips 16 x 16 of 64x64x3 from a store on disk, against copying them from an array.

    Both go to the memory, for the frames are more than the caches hold.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (frames, *FRAMES.obs["image"].shape), dtype=np.uint8)
    name = f"clips 16x16 of 64x64x3 from {frames:,} frames"
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        about = {"spec": FRAMES.to_dict()}
        with EpisodeStore.create(folder, step_fields(FRAMES), attributes=about) as store:
            for at, image in enumerate(images):
                row = {"obs/image": image, "action": np.array(0), "reward": np.float32(0)}
                flags = (at % 500 == 0, at % 500 == 499 or at == frames - 1, False)
                row |= {key: np.array(flag) for key, flag in zip(FLAGS, flags, strict=True)}
                store.append(0, row)
        clips = VideoDataModule(folder, batch_size=16, clip_length=16)
        target = np.empty((16, 16, *images.shape[1:]), np.uint8)

        def copy() -> None:
            for clip, begin in zip(target, rng.integers(frames - 16, size=16), strict=True):
                clip[:] = images[begin : begin + 16]

        clip_ms, copy_ms = median_ms(clips.next_batch, copy, repeats=repeats, warmup=frames // 100)
    yield name, "sample_ms", clip_ms, repeats
    yield name, "sample_over_copy", clip_ms / copy_ms, repeats


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


def time_generation(steps: int, repeats: int) -> Iterator[tuple[str, str, float, int]]:
    """A generation of World Models, 64 members x 16 dreams x 1000 steps, at the paper's CarRacing.

    No dream ends before its horizon. The generation is run whole; one dream after another through
    the same program (batch 1) is timed on `steps` steps in turns with as many of the whole batch,
    for 1024 dreams would take minutes. The parts are timed on the tensors of one step.
    """
    from zoo.world_models.controller import Actions, Controller
    from zoo.world_models.dreams import Dreamer, LinearMembers, dream
    from zoo.world_models.memory import Memory

    members, rollouts, horizon = 64, 16, 1000
    torch.manual_seed(0)
    memory = Memory(32, 3, 256)
    assert memory.done_head is not None
    with torch.no_grad():
        memory.done_head.out.bias.fill_(-100.0)
    actions = Actions(ActionSpec("box", low=(-1.0, 0.0, 0.0), high=(1.0, 1.0, 1.0)), "car-racing")
    controller = Controller(32 + 256, 3)
    flat = 0.1 * torch.randn(members, controller.size)

    def features(state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state["z"], state["h"]], -1)

    def run(count: int, dreams: int, length: int) -> None:
        linear = LinearMembers(controller.population(flat[:count]), actions, features)
        dream(Dreamer(memory, threshold=True), linear, count, torch.randn(dreams, 32), length)

    name = "M 256, 64 members x 16 dreams"
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision is torch.bfloat16):
            batch_ms, one_ms = median_ms(
                lambda: run(members, rollouts, steps), lambda: run(1, 1, steps), repeats=repeats
            )
            start = time.perf_counter()
            run(members, rollouts, horizon)
            whole = time.perf_counter() - start
        label = f"{name}, {str(precision).removeprefix('torch.')}"
        yield label, "generation_s", whole, 1
        yield label, "batch_step_ms", batch_ms / steps, repeats
        yield label, "single_step_ms", one_ms / steps, repeats
        yield label, "speedup_over_single", members * rollouts * one_ms / batch_ms, repeats

    with torch.no_grad():
        dreamer, shape = Dreamer(memory), (members, rollouts)
        hidden = torch.randn(*shape, 256)
        state = {"z": torch.randn(*shape, 32), "h": hidden, "c": hidden}
        state["first"] = torch.zeros(shape, dtype=torch.bool)
        linear = LinearMembers(controller.population(flat), actions, features)
        action, mixture = linear.act(state), memory.predict(hidden)
        choice, noise = torch.rand(rollouts, 32), torch.randn(rollouts, 32)
        parts: dict[str, Callable[[], Any]] = {
            "lstm_ms": lambda: dreamer.recall(state, action),
            "mixture_outputs_ms": lambda: memory.predict(hidden),
            "mixture_sample_ms": lambda: mixture.sample(1.0, choice, noise),
            "controller_ms": lambda: linear.act(state),
        }
        for part, taken in zip(parts, median_ms(*parts.values(), repeats=30), strict=True):
            yield f"{name}, one step", part, taken, 30


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
    dreamer = SETTINGS[0].model
    figures = (
        (dreamer, time_updates(options.repeats)),
        (dreamer, time_sampling(options.replay_steps, 10 * options.repeats)),
        ("v-jepa", time_clips(20_000, 10 * options.repeats)),
        (dreamer, time_trainer(updates=10 * options.repeats, rounds=3)),
        ("world-models", time_generation(50, max(1, options.repeats // 6))),
    )
    for model, figure in figures:
        for name, metric, value, n in figure:
            print(f"{name:45} {metric:24} {value:12,.3f}", flush=True)
            cell = ("speed", model, name, "synthetic", 0, 0, 0)
            rows.append(Row(*cell, metric, value, n, None, *where))
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / "results.csv", rows)
    print(f"written to {options.out / 'results.csv'}")
    return 0
