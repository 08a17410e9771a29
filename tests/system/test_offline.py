"""`zoo fit` and `zoo eval` of a model of recorded data: resumed, and asked for a return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.__main__ import main

CONFIG = """\
seed_everything: 3
model:
  class_path: zoo.decision_transformer.module.DecisionTransformer
  init_args: {size: nano, width: 16, context: 8, return_scale: 100, warmup: 5, lr: 1.0e-3}
data:
  class_path: datamodules.offline_datamodule.OfflineDataModule
  init_args: {batch_size: 4, sequence_length: 8, updates_per_epoch: 7, env: CartPole-v1,
              time_limit: 40}
trainer:
  log_every_n_steps: 5
  callbacks:
    - class_path: callbacks.evaluation.Evaluation
      init_args: {every_updates: 6, episodes: 2}
    - class_path: callbacks.checkpoint.RunCheckpoint
      init_args: {every_updates: 6}
"""


def fit(folder: Path, name: str, updates: int, *options: str) -> dict[str, Any]:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    where = ["--run", str(folder / name), "--source", str(folder / "data")]
    assert main(["fit", str(config), *where, "--updates", str(updates), *options]) == 0
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)


def measured(run: Path) -> list[str]:
    lines = (run / "metrics.csv").read_text().splitlines()
    return [line for line in lines if ",time/" not in line]


def test_a_resumed_run_equals_one_that_was_not_stopped_and_can_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collect = ["data", "collect", "CartPole-v1", "--episodes", "6", "--out", str(tmp_path / "data")]
    assert main(collect) == 0
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
