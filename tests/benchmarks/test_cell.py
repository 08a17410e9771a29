import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.cell import Cell, ZooRunner, read_metrics, run_cell
from datamodules.errors import UserError
from zoo import runs
from zoo.commands import eval as zoo_eval
from zoo.commands import fit

NAMES = ("planet", "cartpole", "CartPole-v1", 1)
METRICS = """\
updates,env_steps,metric,value
50,500,eval/return_mean,20.0
50,500,time/wall_s,1.5
50,500,time/eval_s,0.25
50,500,train/loss,3.0
100,1000,eval/return_mean,90.0
100,1000,eval/return_std,5.0
100,1000,eval/dream_reality_gap,1.1
100,1000,eval/open_loop_mse@5,0.25
100,1000,time/wall_s,3.0
100,1000,time/eval_s,0.25
"""


class FakeRunner:
    """Leaves what a zoo run leaves; `dies` before that many calls have been made."""

    def __init__(self, dies=0):
        self.dies = dies
        self.trained = self.evaluated = 0

    def train(self, cell, run):
        self.trained += 1
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.csv").write_text(METRICS)
        if self.trained <= self.dies:
            raise RuntimeError("killed")
        done = {"env_steps": 1010, "updates": 101, "wall_s": 4.0}
        (run / "done.json").write_text(json.dumps(done))

    def evaluate(self, cell, run):
        self.evaluated += 1
        return {
            "return_mean": 88.0, "return_std": 4.0, "episodes": cell.episodes,
            "params": 1234, "success_rate": 0.5, "seed": 7, "checkpoint": "best",
        }  # fmt: skip


def values(result, metric):
    return [
        (row["env_steps"], row["value"], row["n"], row["wall_s"])
        for row in result["rows"]
        if row["metric"] == metric
    ]


def test_rows_of_a_run(tmp_path):
    result = run_cell(*NAMES, tmp_path, runner=FakeRunner(), suite="s", env_steps=1000)
    # The learning curve first, the final evaluation last.
    assert values(result, "return_mean") == [
        (500, 20.0, 10, 1.5),
        (1000, 90.0, 10, 3.0),
        (1010, 88.0, 100, 3.5),  # wall time without the two evaluations
    ]
    assert result["rows"][-1]["metric"] == "return_mean"
    assert values(result, "return_std") == [(1010, 4.0, 100, 3.5)]
    assert values(result, "dream_reality_gap") == [(1000, 1.1, 10, 3.0)]
    assert values(result, "open_loop_mse@5") == [(1000, 0.25, 10, 3.0)]
    assert values(result, "updates_per_s") == [(1010, pytest.approx(101 / 3.5), 1, 3.5)]
    assert values(result, "params") == [(1010, 1234, 1, 3.5)]
    assert values(result, "success_rate") == [(1010, 0.5, 100, 3.5)]
    assert values(result, "peak_rss_mb")[0][1] > 10
    assert not {"loss", "seed", "checkpoint", "eval_s"} & {row["metric"] for row in result["rows"]}
    first = result["rows"][0]
    assert (first["suite"], first["model"], first["preset"], first["seed"]) == ("s", *NAMES[:2], 1)
    assert first["git_sha"]
    assert "numpy" in first["versions"]
    assert "cores" in first["hardware"]


def test_episode_counts_come_from_the_run_where_it_says_them(tmp_path):
    runner = FakeRunner()
    run = Cell(*NAMES).run(tmp_path)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        """
trainer:
  callbacks:
    - {class_path: callbacks.budget.Budget}
    - {class_path: callbacks.evaluation.Evaluation, init_args: {episodes: 7}}
    - {class_path: callbacks.dream_gap.DreamRealityGap, init_args: {starts: 32}}
"""
    )
    result = run_cell(*NAMES, tmp_path, runner=runner)
    assert values(result, "return_mean")[0][2] == 7
    assert values(result, "dream_reality_gap")[0][2] == 32


def test_a_finished_cell_returns_what_it_found(tmp_path):
    runner = FakeRunner()
    first = run_cell(*NAMES, tmp_path, runner=runner)
    assert run_cell(*NAMES, tmp_path, runner=runner) == first
    assert (runner.trained, runner.evaluated) == (1, 1)


def test_an_interrupted_cell_is_taken_up_again(tmp_path):
    runner = FakeRunner(dies=1)
    with pytest.raises(RuntimeError, match="killed"):
        run_cell(*NAMES, tmp_path, runner=runner)
    assert not Cell(*NAMES).result(tmp_path).exists()
    assert run_cell(*NAMES, tmp_path, runner=runner)["cell"]["episodes"] == 100
    assert runner.trained == 2


def test_other_settings_do_not_pass_as_the_same_cell(tmp_path):
    run_cell(*NAMES, tmp_path, runner=FakeRunner(), env_steps=1000)
    with pytest.raises(UserError, match=r"cell\.json was made with env_steps 1000 instead of 2000"):
        run_cell(*NAMES, tmp_path, runner=FakeRunner(), env_steps=2000)


def test_a_request_from_before_a_setting_existed_has_its_default(tmp_path):
    run_cell(*NAMES, tmp_path, runner=FakeRunner())
    path = Cell(*NAMES).folder(tmp_path) / "cell.json"
    asked = json.loads(path.read_text())
    del asked["checkpoint"]
    path.write_text(json.dumps(asked))
    assert run_cell(*NAMES, tmp_path, runner=FakeRunner())["rows"]
    with pytest.raises(UserError, match="made with checkpoint 'best' instead of 'last'"):
        run_cell(*NAMES, tmp_path, runner=FakeRunner(), checkpoint="last")


def test_a_preset_is_run_in_the_environment_that_the_options_name(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fit, "main", lambda command: asked.append(command) or 0)
    pong = Cell("dreamer-v3", "cartpole-pong", "ale/Pong", 0, base="cartpole")
    with pytest.raises(UserError, match="dreamer-v3/cartpole is for CartPole-v1, not for ale/Pong"):
        ZooRunner().train(pong, tmp_path)
    ZooRunner().train(replace(pong, options={"data.env": "ale/Pong"}), tmp_path)
    (command,) = asked
    assert command[0] == "dreamer-v3/cartpole"
    assert "--data.env=ale/Pong" in command


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_checkpoint_that_is_evaluated(which, tmp_path, monkeypatch):
    asked = []

    def evaluate(command):
        asked.append(command)
        print(json.dumps({"return_mean": 1.0, "episodes": 100}))
        return 0

    monkeypatch.setattr(zoo_eval, "main", evaluate)
    monkeypatch.setattr(runs, "load", lambda run: torch.nn.Linear(2, 1))
    final = ZooRunner().evaluate(Cell(*NAMES, checkpoint=which), tmp_path)
    assert final == {"params": 3, "return_mean": 1.0, "episodes": 100}
    assert ("last" in asked[0]) == (which == "last")


def test_a_broken_result_is_named(tmp_path):
    path = Cell(*NAMES).result(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(UserError, match=r"result\.json is not JSON .* delete it"):
        run_cell(*NAMES, tmp_path, runner=FakeRunner())


def test_metrics_are_read_while_they_are_written(tmp_path):
    (tmp_path / "metrics.csv").write_text("updates,env_steps,metric,value\n1,2,a,3.0\n1,2,b")
    assert read_metrics(tmp_path) == [(1, 2, "a", 3.0)]
    assert read_metrics(tmp_path / "nowhere") == []


def test_two_processes_never_run_the_same_cell(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from benchmarks.cell import _exclusive\n"
        "with _exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    folder = Cell(*NAMES).folder(tmp_path)
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being run by another process"):
            run_cell(*NAMES, tmp_path, runner=FakeRunner())
        other.send_signal(signal.SIGKILL)
    # The lock goes with the process, however it ended.
    assert run_cell(*NAMES, tmp_path, runner=FakeRunner())["rows"]


def test_a_cell_ends_with_the_process_that_started_it(tmp_path):
    child = (
        "import time; from benchmarks.cell import _end_with_parent\n"
        "_end_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as process:
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
