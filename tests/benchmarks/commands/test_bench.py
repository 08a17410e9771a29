import json
import re

import pytest

from benchmarks.commands import bench, report
from datamodules.errors import UserError

SUITE = """\
title: Chance
seeds: 2
episodes: 5
tasks:
  CartPole-v1: {random: 22.2, expert: 500.0, source: measured}
entries:
  - {model: random, preset: cartpole, task: CartPole-v1}
"""


@pytest.fixture
def chance(tmp_path):
    path = tmp_path / "chance.yaml"
    path.write_text(SUITE)
    return path


def test_dry_run_lists_the_cells_and_touches_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert bench.main(["quickstart", "--dry-run", "--seeds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"to run +(\S+) seed=(\d)", printed) == [
        (model, seed)
        for model in (
            "dreamer-v3/cartpole",
            "dqn/cartpole",
            "world-models/cartpole",
            "random/cartpole",
        )
        for seed in "01"
    ]
    assert "8 of 8 cells" in printed
    assert not out.exists()


def test_bench_runs_reports_and_has_nothing_left_to_do(chance, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(chance), "--out", str(out), "--jobs", "2"]
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"random +\d+\.\d \[.*\] +\S+ +2 +10 ", printed)
    assert printed.endswith(f"report: {out / 'report.html'}\n")
    assert {"results.csv", "summary.csv", "report.md", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    before = (out / "results.csv").read_bytes()
    assert bench.main(command) == 0
    assert "2 of 2 cells are already finished" in capsys.readouterr().out
    assert (out / "results.csv").read_bytes() == before


def test_shards_of_one_folder_make_one_report(chance, tmp_path, capsys):
    out = tmp_path / "out"
    # A shard succeeds though the other's cells are missing; its report says that they are.
    assert bench.main([str(chance), "--out", str(out), "--shard", "1/2"]) == 0
    assert "without a result: 1 cell" in capsys.readouterr().out
    assert report.main([str(out)]) == 1
    assert bench.main([str(chance), "--out", str(out), "--shard", "2/2"]) == 0
    assert report.main([str(out)]) == 0


def test_failures_are_reported_with_their_last_words(chance, tmp_path, capsys):
    chance.write_text(
        SUITE.replace("seeds: 2", "seeds: 1")
        + SUITE[SUITE.index("  - {") :].replace("cartpole", "acrobot")
    )
    out = tmp_path / "out"
    assert bench.main([str(chance), "--out", str(out), "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    assert "random/acrobot seed=0\n" in printed
    assert "preset 'acrobot' is for Acrobot-v1, not for CartPole-v1" in printed
    assert "random " in printed  # the other cell has its row
    assert len(json.loads((out / "suite.json").read_text())["suite"]["entries"]) == 2


def test_unknown_suites_are_a_users_mistake():
    with pytest.raises(UserError, match="did you mean smoke"):
        bench.main(["smok"])
