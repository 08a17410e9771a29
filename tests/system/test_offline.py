"""`zoo fit` and `zoo eval` of a model of recorded data: resumed, in two processes, and asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.__main__ import main

ROOT = Path(__file__).parents[2]
STAND_INS = str(ROOT / "tests" / "zoo")
CONFIG = """\
seed_everything: 3
model:
  class_path: zoo.decision_transformer.module.DecisionTransformer
  init_args: {size: nano, width: 16, context: 8, return_scale: 100, warmup: 5, lr: 1.0e-3}
data:
  class_path: offline_standin.CartPoleContexts
  init_args: {count: 6, sequence_length: 8, updates_per_epoch: 7}
trainer:
  log_every_n_steps: 5
  callbacks:
    - class_path: callbacks.evaluation.Evaluation
      init_args: {every_updates: 6, episodes: 2}
    - class_path: callbacks.checkpoint.RunCheckpoint
      init_args: {every_updates: 6}
"""

# Run in place of `zoo fit`: writes what every rank holds at the end, for the test to compare.
SPY = """\
import sys
import torch
import zoo.commands.fit as fit
from zoo.__main__ import main

fitted = fit._fit
def spy(trainer, model, data, resume):
    code = fitted(trainer, model, data, resume)
    torch.save(dict(model.state_dict()), f"{sys.argv[-1]}/rank{trainer.global_rank}.pt")
    return code
fit._fit = spy
sys.exit(main(sys.argv[1:-1]))
"""


def fit(folder: Path, name: str, updates: int, *options: str) -> dict[str, Any]:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    out = str(folder / name)
    assert main(["fit", str(config), "--run", out, "--updates", str(updates), *options]) == 0
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)


def measured(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    return [line for line in lines if ",time/" not in line]


def test_a_resumed_run_equals_one_that_was_not_stopped_and_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(STAND_INS)
    once = fit(tmp_path, "once", 16)
    fit(tmp_path, "twice", 9)
    twice = fit(tmp_path, "twice", 16, "--resume")
    assert once["zoo"] == twice["zoo"] == {**once["zoo"], "updates": 16, "env_steps": 0}
    for key, value in once["state_dict"].items():
        assert torch.equal(value, twice["state_dict"][key]), key
    assert measured(tmp_path / "once") == measured(tmp_path / "twice")
    assert any("eval/return_mean" in line for line in measured(tmp_path / "once"))

    command = ["eval", str(tmp_path / "once"), "--episodes", "2", "--json"]
    for options, asked in ([], once["state_dict"]["best_return"].item()), (["12.5"], 12.5):
        capsys.readouterr()
        assert main([*command, *(f"--target-return={value}" for value in options)]) == 0
        assert json.loads(capsys.readouterr().out)["target_return"] == asked


def test_two_processes_stay_in_sync(tmp_path: Path) -> None:
    config, spy = tmp_path / "config.yaml", tmp_path / "spy.py"
    config.write_text(CONFIG + "  accelerator: cpu\n  devices: 2\n  strategy: ddp\n")
    spy.write_text(SPY)
    out = str(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, str(spy), "fit", str(config), "--run", out, "--updates", "8", tmp_path],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), STAND_INS]),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
