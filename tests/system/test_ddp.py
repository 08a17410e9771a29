"""Two processes train one model in sync, each with its own environments and replay shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from datamodules.sources.opening import open_source
from datamodules.store import EpisodeStore
from zoo.__main__ import main

CONFIG = """\
seed_everything: 5
model:
  class_path: zoo.dreamer_v3.module.DreamerV3
  init_args: {size: nano, deter: 16, hidden: 16, stoch: 4, classes: 4, units: 16, bins: 41,
              imagine_length: 3, lr: 1.0e-3, warmup: 10}
data:
  class_path: datamodules.env_datamodule.EnvDataModule
  init_args: {env: CartPole-v1, num_envs: 2, batch_size: 4, sequence_length: 8, replay_ratio: 16,
              prefill: 40}
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  log_every_n_steps: 5
  callbacks:
    - class_path: callbacks.evaluation.Evaluation
      init_args: {every_env_steps: 150, episodes: 2}
    - class_path: callbacks.checkpoint.RunCheckpoint
      init_args: {every_updates: 10}
"""

# Run in place of `zoo`: writes what every rank holds at the end, for the test to compare.
SPY = """\
import json
import sys
import torch
import zoo.commands.fit as fit
from zoo.__main__ import main

fitted = fit._fit
def spy(trainer, model, data, resume):
    code = fitted(trainer, model, data, resume)
    state = {"weights": dict(model.state_dict()), "steps": model.env_steps}
    state["updates"] = model.updates
    torch.save(state, f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")
    return code
fit._fit = spy
for command in json.loads(sys.argv[1]):
    if code := main(command):
        sys.exit(code)
"""


def _fit(config: Path, run: Path, *options: str) -> list[dict]:
    return _fit_each({config: run}, *options)[0]


def _fit_each(runs: dict[Path, Path], *options: str) -> list[list[dict]]:
    """Trains one configuration after the other, for two processes take long to start."""
    spy = next(iter(runs)).with_name("spy.py")
    spy.write_text(SPY)
    commands = [["fit", str(c), "--run", str(run), *options] for c, run in runs.items()]
    done = subprocess.run(
        [sys.executable, str(spy), json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        [torch.load(run / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        for run in runs.values()
    ]


def _rewards(run: Path, rank: int) -> list[np.ndarray]:
    store = EpisodeStore.open(run / "replay" / f"rank{rank}", verify=True)
    rows = [
        store.read(stream, first, end - first)["obs/vector"]
        for stream in store.stream_ids
        for first, end in [store.bounds(stream)]
    ]
    store.close()
    return rows


def test_two_ranks_stay_in_sync_and_resume(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    once = _fit(config, tmp_path / "once", "--env-steps", "600")
    for key, value in once[0]["weights"].items():
        assert torch.equal(value, once[1]["weights"][key]), key
    assert once[0]["steps"] == once[1]["steps"] >= 600
    assert once[0]["updates"] == once[1]["updates"] > 0
    # Different environments: no stream of one rank begins like one of the other.
    ours, theirs = _rewards(tmp_path / "once", 0), _rewards(tmp_path / "once", 1)
    assert all(not np.array_equal(x[:5], y[:5]) for x in ours for y in theirs)

    _fit(config, tmp_path / "twice", "--env-steps", "300")
    twice = _fit(config, tmp_path / "twice", "--resume", "--env-steps", "600")
    for rank in (0, 1):
        assert twice[rank]["steps"] == once[rank]["steps"]
        for key, value in once[rank]["weights"].items():
            assert torch.equal(value, twice[rank]["weights"][key]), (rank, key)


STAGED = """\
seed_everything: 5
model:
  class_path: zoo.world_models.module.WorldModels
  init_args: {hidden: 8, vector_latent: 2, vision_updates: 4, memory_updates: 6, generations: 3,
              population: 4, rollouts: 3, horizon: 20, gate_episodes: 2, rounds: 2}
data:
  class_path: datamodules.env_datamodule.EnvDataModule
  init_args: {env: CartPole-v1, num_envs: 2, batch_size: 4, sequence_length: 8, policy: random,
              episodes: 6}
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  callbacks:
    - class_path: callbacks.checkpoint.RunCheckpoint
"""


def test_stages_in_which_most_parts_do_not_learn_stay_in_sync(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(STAGED)
    first, second = _fit(config, tmp_path / "run", "--updates", "26")
    assert first["updates"] == second["updates"] == 26
    assert first["steps"] == second["steps"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key


WINDOWS = """\
model:
  class_path: zoo.dreamer_v3.module.DreamerV3
  init_args: {size: nano, deter: 16, hidden: 16, stoch: 4, classes: 4, units: 16, bins: 41,
              imagine_length: 3, lr: 1.0e-3, warmup: 10}
"""

CONTEXTS = """\
model:
  class_path: zoo.decision_transformer.module.DecisionTransformer
  init_args: {size: nano, width: 16, context: 8, return_scale: 100, warmup: 5, lr: 1.0e-3}
"""

RECORDED = """\
seed_everything: 5
data:
  class_path: datamodules.offline_datamodule.OfflineDataModule
  init_args: {batch_size: 4, sequence_length: 8, updates_per_epoch: 7, env: CartPole-v1,
              time_limit: 40}
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  callbacks:
    - class_path: callbacks.evaluation.Evaluation
      init_args: {every_updates: 6, episodes: 2}
    - class_path: callbacks.checkpoint.RunCheckpoint
"""


def test_recorded_data_is_shared_out(tmp_path: Path) -> None:
    data, runs = tmp_path / "data", {}
    for name, model in (("windows", WINDOWS), ("contexts", CONTEXTS)):
        config = tmp_path / f"{name}.yaml"
        config.write_text(model + RECORDED)
        runs[config] = tmp_path / name
    main(["data", "collect", "CartPole-v1", "--episodes", "8", "--out", str(data)])
    found = open_source(data)
    source = ["--source", str(data), "--data.cache", str(tmp_path / "cache")]
    for run, (first, second) in zip(
        runs.values(), _fit_each(runs, *source, "--updates", "8"), strict=True
    ):
        assert first["updates"] == second["updates"] == 8
        assert first["steps"] == second["steps"] == 0
        for key, value in first["weights"].items():
            assert torch.equal(value, second["weights"][key]), (run.name, key)
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        ranks = [rank["sequences"] for rank in checkpoint["OfflineDataModule"]["ranks"]]
        assert [rank["sampling"] for rank in ranks] == [run.name] * 2
        assert sum(r["num_steps"] for r in ranks) == found.num_actions + found.num_episodes
        assert ranks[0]["rng"] != ranks[1]["rng"]
