import signal
import subprocess
import sys
import textwrap
import time

import pytest

from benchmarks.cell import Cell, read_json
from benchmarks.pool import Progress, State, read_failure, run_pool, shard
from datamodules.errors import UserError

CELLS = [Cell(model, "p", "t", seed) for model in ("a", "b", "c") for seed in range(3)]

# What the pool starts instead of a training: writes a result, or fails where the model is "b".
FAKE = """
import json, os, sys
from pathlib import Path
from benchmarks.cell import Cell, write_json
cell, out = Cell(**json.loads(sys.argv[1])), Path(sys.argv[3])
print("threads", os.environ["OMP_NUM_THREADS"], cell.name)
if cell.model == "b":
    sys.exit("this cell is broken")
write_json(cell.result(out), {"rows": [{"metric": "return_mean", "value": 1.0}]})
"""


class Recorder:
    def __init__(self):
        self.messages = []
        self.running = []

    def update(self, state):
        self.running.append(len(state.running))

    def message(self, text):
        self.messages.append(text)


@pytest.mark.parametrize("count", [1, 2, 4, 20])
@pytest.mark.parametrize("first", [0, 1])
def test_shards_cover_every_cell_once(count, first):
    parts = [shard(CELLS, f"{first + index}/{count}") for index in range(count)]
    assert sorted(cell.name for part in parts for cell in part) == [cell.name for cell in CELLS]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [shard(CELLS, f"{first + index}/{count}") for index in range(count)]


@pytest.mark.parametrize("spec", ["3/2", "-1/2", "1/0", "1", "a/b", "1/2/3", ""])
def test_a_bad_shard_is_named(spec):
    with pytest.raises(UserError, match=r"--shard .*is not of the form i/n"):
        shard(CELLS, spec)


def test_failing_cells_stop_no_other(tmp_path):
    cells = [cell for cell in CELLS if cell.seed == 0]
    recorder = Recorder()
    failed = run_pool(cells, tmp_path, 2, recorder, [sys.executable, "-c", FAKE])
    assert [cell.name for cell in failed] == ["b/p seed=0"]
    assert read_failure(failed[0], tmp_path).endswith("this cell is broken")
    assert read_json(failed[0].folder(tmp_path) / "failed.json")["ending"] == "exit code 1"
    assert "threads 1 a/p seed=0" in (cells[0].folder(tmp_path) / "log.txt").read_text()
    assert any("FAILED b/p seed=0: exit code 1" in text for text in recorder.messages)
    # Finished cells are passed over, failed ones are tried again.
    again = Recorder()
    assert run_pool(cells, tmp_path, 1, again, [sys.executable, "-c", FAKE]) == failed
    assert again.messages[0] == "2 of 3 cells are already finished"
    assert again.messages[1] == "start b/p seed=0"


def test_jobs_bound_what_runs_at_once(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(0.7)" + FAKE]
    recorder = Recorder()
    started = time.monotonic()
    run_pool([CELLS[0], CELLS[1], CELLS[6]], tmp_path, 2, recorder, command)
    assert max(recorder.running) == 2
    assert time.monotonic() - started > 1.4
    with pytest.raises(UserError, match="--jobs 0"):
        run_pool(CELLS, tmp_path, 0, recorder)


def test_ctrl_c_stops_the_cells_and_leaves_none_behind(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from benchmarks.cell import Cell
        from benchmarks.display import LineDisplay
        from benchmarks.pool import run_pool
        sleep = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
        cells = [Cell("a", "p", "t", seed) for seed in range(3)]
        run_pool(cells, Path(sys.argv[1]), 2, LineDisplay(), [sys.executable, "-c", sleep])
        """
    )
    pool = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    logs = [CELLS[seed].folder(tmp_path) / "log.txt" for seed in range(2)]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if all(log.exists() and "pid" in log.read_text() for log in logs):
            break
        time.sleep(0.1)
    pool.send_signal(signal.SIGINT)
    _, errors = pool.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    for log in logs:
        pid = log.read_text().split()[1]
        assert subprocess.run(["kill", "-0", pid], capture_output=True).returncode != 0
    assert not CELLS[2].folder(tmp_path).exists()


def test_eta_waits_for_every_kind_of_cell():
    half = Progress(Cell("a", "p", "t", 0, env_steps=100), seconds=10.0, env_steps=50)
    unknown = Cell("b", "p", "t", 0)
    state = State(total=3, jobs=1, running=[half], waiting=[Cell("a", "p", "t", 1), unknown])
    assert half.remaining == 10.0
    assert state.eta is None
    state.finished[Cell("b", "p", "t", 1)] = 7.0
    assert state.eta == 10.0 + 20.0 + 7.0
