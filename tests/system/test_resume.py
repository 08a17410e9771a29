"""Killed at random moments and resumed, a run ends bit for bit like one that was never stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.store import EpisodeStore

TINY = """\
seed_everything: 3
model:
  class_path: zoo.dreamer_v3.module.DreamerV3
  init_args: {{size: nano, deter: 16, hidden: 16, stoch: 4, classes: 4, units: 16, bins: 41,
              imagine_length: 3, lr: 1.0e-3, warmup: 10}}
data:
  class_path: datamodules.env_datamodule.EnvDataModule
  init_args: {{env: {env}, num_envs: 2, batch_size: 4, sequence_length: 8, replay_ratio: 16,
              prefill: 40, capacity: 400, time_limit: 60, updates_per_epoch: 90}}
trainer:
  log_every_n_steps: 7
  callbacks:
    - class_path: callbacks.budget.Budget
      init_args: {{env_steps: {env_steps}}}
    - class_path: callbacks.evaluation.Evaluation
      init_args: {{every_env_steps: 200, episodes: 2}}
    - class_path: callbacks.dream_gap.DreamRealityGap
      init_args: {{every_env_steps: 400}}
    - class_path: callbacks.checkpoint.RunCheckpoint
      init_args: {{every_updates: 20}}
"""


def _command(config: Path, run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "zoo", "fit", str(config), "--run", str(run), *options]


def _environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def _fit(config: Path, run: Path, *options: str) -> None:
    done = subprocess.run(
        _command(config, run, *options), env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _config(folder: Path, env: str, env_steps: int) -> Path:
    path = folder / f"config-{env_steps}.yaml"
    path.write_text(TINY.format(env=env, env_steps=env_steps))
    return path


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in _differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: lengths {len(a)} and {len(b)}"]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in _differences(x, y, f"{path}/{i}")
        ]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [f"{path}: tensors differ"]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]


def _learning_state(run: Path) -> dict[str, Any]:
    """Everything of the last checkpoint that does not depend on wall time or on the folder."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    keys = ("state_dict", "optimizer_states", "zoo", "EnvDataModule", "global_step")
    for rank in checkpoint["EnvDataModule"]["ranks"]:
        # Where the journal stands depends on when it was flushed; `_replay` compares the steps.
        del rank["replay"]["store"], rank["directory"]
    return {key: checkpoint[key] for key in keys}


def _metrics(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    return [line for line in lines if ",time/" not in line]


def _replay(run: Path) -> dict[str, np.ndarray]:
    store = EpisodeStore.open(run / "replay" / "rank0", verify=True)
    rows = {}
    for stream in store.stream_ids:
        first, end = store.bounds(stream)
        for key, values in store.read(stream, first, end - first).items():
            rows[f"{stream}/{key}"] = values
    store.close()
    return rows


def _assert_same_run(run: Path, reference: Path) -> None:
    assert _differences(_learning_state(run), _learning_state(reference)) == []
    assert _metrics(run) == _metrics(reference)
    ours, theirs = _replay(run), _replay(reference)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def _run_with_kills(config: Path, run: Path, kills: int, rng: random.Random, span: float) -> int:
    """Starts, kills (SIGKILL) at random moments and resumes, then lets it finish.

    Every second kill waits for a checkpoint that is being written.
    """
    landed = 0
    for kill in range(kills):
        process = subprocess.Popen(
            _command(config, run, "--resume"),
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        folder = run / "checkpoints"
        before = {p: p.stat().st_mtime_ns for p in folder.glob("*")} if folder.exists() else {}
        while process.poll() is None and time.monotonic() < deadline:
            now = {p: p.stat().st_mtime_ns for p in _listing(folder)}
            if any(before.get(p) != t for p, t in now.items()):
                break  # training has begun, a checkpoint is on its way
            time.sleep(0.002)
        if kill % 2 == 0:
            time.sleep(rng.uniform(0, span))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            landed += 1
        process.wait()
    _fit(config, run, "--resume")
    return landed


def _listing(folder: Path) -> list[Path]:
    paths = []
    for path in folder.glob("*"):
        try:
            path.stat()
        except FileNotFoundError:
            continue
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with `config-900.yaml` and what becomes of it, `reference`, by environment."""

    @cache
    def made(env: str) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted")
        _fit(_config(folder, env, 900), folder / "reference")
        return folder

    return made


@pytest.mark.parametrize(
    "env",
    ["CartPole-v1", pytest.param("dm_control/cartpole-balance-v0", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, env: str, uninterrupted: Callable[[str], Path]
) -> None:
    config, reference = uninterrupted(env) / "config-900.yaml", uninterrupted(env) / "reference"
    run = tmp_path / "killed"
    landed = _run_with_kills(config, run, kills=2, rng=random.Random(1), span=1.5)
    assert landed == 2, "the run ended before it could be killed: nothing was tested"
    _assert_same_run(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("env", ["CartPole-v1", "dm_control/cartpole-balance-v0"])
def test_killed_many_times(tmp_path: Path, env: str) -> None:
    config = _config(tmp_path, env, 6000)
    reference, run = tmp_path / "reference", tmp_path / "killed"
    _fit(config, reference)
    landed = _run_with_kills(config, run, kills=12, rng=random.Random(2), span=4.0)
    assert landed >= 8
    _assert_same_run(run, reference)


@pytest.mark.slow  # test_commands.py has the same in one process
def test_larger_budget_on_resume_equals_asking_for_it_at_once(tmp_path: Path) -> None:
    _fit(_config(tmp_path, "CartPole-v1", 400), tmp_path / "grown")
    _fit(_config(tmp_path, "CartPole-v1", 700), tmp_path / "once")
    config = _config(tmp_path, "CartPole-v1", 400)
    _fit(config, tmp_path / "grown", "--resume", "--env-steps", "700")
    _assert_same_run(tmp_path / "grown", tmp_path / "once")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signals_save_and_exit_non_zero(
    tmp_path: Path, number: signal.Signals, uninterrupted: Callable[[str], Path]
) -> None:
    folder, run = uninterrupted("CartPole-v1"), tmp_path / "stopped"
    config, reference = folder / "config-900.yaml", folder / "reference"
    process = subprocess.Popen(_command(config, run), env=_environment(), stderr=subprocess.PIPE)
    metrics = run / "metrics.csv"
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert metrics.exists()
    _fit(config, run, "--resume")
    _assert_same_run(run, reference)
