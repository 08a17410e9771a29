import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from callback_standins import TinyData, TinyModel, rows, trainer

from callbacks.budget import Budget
from callbacks.checkpoint import RunCheckpoint
from callbacks.evaluation import Evaluation
from callbacks.schedule import publish
from datamodules.errors import UserError


class Crash(pl.Callback):
    """Raises after so many updates."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.updates == self.at:
            raise RuntimeError("crash")


def fit(run, *callbacks, updates=30, resume=False, model=None, data=None, **options):
    model, data = model or TinyModel(), data or TinyData()
    evaluation = Evaluation(every_env_steps=7, episodes=2, at_start=True)
    t = trainer(run, evaluation, Budget(updates=updates), *callbacks, **options)
    t.fit(model, data, ckpt_path=run / "checkpoints/last.ckpt" if resume else None)
    return model, t


def optimizer_state(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["optimizer_states"][0]["state"]


def assert_same_run(run, other):
    assert rows(run) == rows(other)
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(r / "checkpoints" / name, weights_only=True) for r in (run, other))
        assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
        assert a["zoo"] == b["zoo"]
    a, b = optimizer_state(run), optimizer_state(other)
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    a, b = (json.loads((r / "done.json").read_text()) for r in (run, other))
    assert {**a, "wall_s": 0} == {**b, "wall_s": 0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    fit(run)
    return run


def test_log_and_done_of_a_run(uninterrupted):
    updates = [int(r[0]) for r in rows(uninterrupted) if r[2] == "train/loss"]
    assert updates == [5, 10, 15, 20, 25, 30]
    evaluated = [int(r[1]) for r in rows(uninterrupted) if r[2] == "eval/return_mean"]
    assert evaluated == [0, 8, 14, 22, 28, 36, 42, 50, 56]
    done = json.loads((uninterrupted / "done.json").read_text())
    best = max(float(r[3]) for r in rows(uninterrupted) if r[2] == "eval/return_mean")
    assert (done["updates"], done["env_steps"], done["best"]) == (30, 60, best)
    assert done["wall_s"] > 0


# 5, 10: the moment after a save, at a log step, inside and at the end of an epoch
@pytest.mark.parametrize("crash_at", [3, 6, 11, 14, 21, 29])
def test_crashed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, crash_at):
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, Crash(crash_at))
    assert not (tmp_path / "done.json").exists()
    fit(tmp_path, resume=crash_at > 5)
    assert_same_run(tmp_path, uninterrupted)


# 20 ends an epoch, 13 is neither an interval nor a log step
@pytest.mark.parametrize("budget", [13, 20])
def test_larger_budget_equals_asking_for_it_at_the_start(tmp_path, uninterrupted, budget):
    fit(tmp_path, updates=budget)
    assert json.loads((tmp_path / "done.json").read_text())["updates"] == budget
    fit(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("limits", [{"max_steps": 17}, {"max_epochs": 2}])
def test_trainer_limits_can_be_raised(tmp_path, uninterrupted, limits):
    fit(tmp_path, updates=None, **limits)
    assert json.loads((tmp_path / "done.json").read_text())["updates"] in (17, 20)
    fit(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_spent_budget_stops_without_an_update(tmp_path):
    fit(tmp_path, updates=8)
    before = (tmp_path / "checkpoints/last.ckpt").stat().st_mtime_ns
    model, _ = fit(tmp_path, updates=8, resume=True)
    assert model.updates == 8
    assert (tmp_path / "checkpoints/last.ckpt").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "done.json").read_text())["updates"] == 8


def test_dying_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save = torch.save

    def half(checkpoint, file):
        if checkpoint["zoo"]["updates"] == 10 and "optimizer_states" in checkpoint:
            file.write(b"half of a checkpoint")
            raise OSError("disk full")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path)
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 5
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


class Publish(pl.Callback):
    """Publishes one score after each update."""

    def __init__(self, scores):
        self.scores = scores

    def on_train_batch_end(self, trainer, pl_module, *args):
        publish(trainer, {"eval/return_mean": self.scores[pl_module.updates - 1]})


def test_best_is_the_later_of_equals_and_never_nan(tmp_path):
    data = TinyData()
    checkpoint = RunCheckpoint(every_minutes=None)
    scores = [1.0, 3.0, 2.0, 3.0, float("nan"), 2.5]
    t = trainer(tmp_path, Publish(scores), Budget(updates=6), checkpoint=checkpoint)
    t.fit(TinyModel(), data)
    best = torch.load(checkpoint.best_path, weights_only=True)
    assert best["zoo"]["updates"] == 4
    assert best["best"] == {"eval/return_mean": 3.0}
    assert "optimizer_states" not in best
    assert "TinyData" not in best
    assert data.saves == 2  # for last.ckpt, with the first score and at the end; not for best.ckpt
    loaded = TinyModel.load_from_checkpoint(checkpoint.best_path, weights_only=True)
    assert loaded.updates == 4
    assert torch.equal(loaded.net[0].weight, best["state_dict"]["net.0.weight"])


def test_a_best_checkpoint_is_never_without_one_to_go_on_from(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, Crash(at=1), checkpoint=RunCheckpoint(every_minutes=None))
    assert not (tmp_path / "checkpoints/last.ckpt").exists()
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, Crash(at=2), checkpoint=RunCheckpoint(every_minutes=None))
    assert (tmp_path / "checkpoints/best.ckpt").is_file()
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 1


def test_best_score_survives_resume(tmp_path):
    t = trainer(tmp_path, Publish([5.0, 1.0]), Budget(updates=2))
    t.fit(TinyModel(), TinyData())
    t = trainer(tmp_path, Publish([5.0, 1.0, 4.0]), Budget(updates=3))
    t.fit(TinyModel(), TinyData(), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)
    assert best["zoo"]["updates"] == 1


def test_nan_loss_is_named_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"'extra' is nan at update 8 .*last\.ckpt of update 5"):
        fit(tmp_path, model=TinyModel(nan_at=7))
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 5


class Poison(pl.Callback):
    """Makes a parameter infinite, which the loss of that update does not show."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.updates == 10:
            pl_module.net[0].bias.data[0] = float("inf")


def test_infinite_parameter_is_never_saved(tmp_path):
    with pytest.raises(UserError, match=r"parameter 'net\.0\.bias' is not finite at update 10"):
        fit(tmp_path, Poison())
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 5


def test_minutes(tmp_path, monkeypatch):
    checkpoint = RunCheckpoint(every_minutes=1e-9)
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda t, model: saved.append(model.updates))
    trainer(tmp_path, Budget(updates=3), checkpoint=checkpoint).fit(TinyModel(), TinyData())
    assert saved[:3] == [1, 2, 3]


def test_fast_dev_run_leaves_no_files(tmp_path):
    t = trainer(tmp_path, Budget(updates=3), fast_dev_run=True)
    t.fit(TinyModel(), TinyData())
    assert list(tmp_path.iterdir()) == []


def test_bad_intervals_are_refused():
    with pytest.raises(UserError, match="every_minutes is -1"):
        RunCheckpoint(every_minutes=-1)


class Signal(pl.Callback):
    """Sends signals to this process in the middle of an update."""

    def __init__(self, number, at, times=1):
        self.number, self.at, self.times = number, at, times

    def on_train_batch_start(self, trainer, pl_module, *args):
        if pl_module.updates == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_saves_and_stops(tmp_path, uninterrupted, number):
    checkpoint = RunCheckpoint()
    model, _ = fit(tmp_path, Signal(number, 7), checkpoint=checkpoint)
    assert model.updates == 8
    assert checkpoint.interrupted_by_signal == number
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 8
    assert not (tmp_path / "done.json").exists()
    fit(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)


def test_second_signal_stops_at_once(tmp_path):
    checkpoint = RunCheckpoint()
    model = TinyModel()
    with pytest.raises(SystemExit):
        fit(tmp_path, Signal(signal.SIGTERM, 7, times=2), model=model, checkpoint=checkpoint)
    assert model.updates == 7
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 1  # saved with the first score


class Collecting(TinyData):
    """Says between two batches that it collects; before the third it gets a signal meanwhile."""

    def __init__(self, number=None):
        super().__init__()
        self.number = number

    def next_batch(self):
        if self.env_steps == 4 and self.number is not None:
            os.kill(os.getpid(), self.number)
        self.collecting()
        return super().next_batch()

    def setup(self, stage):
        super().setup(stage)
        self.collecting = None


def test_collecting_saves_when_the_minutes_are_over(tmp_path):
    checkpoint = RunCheckpoint(every_minutes=1e-9)
    saved = []
    checkpoint.save = lambda trainer, model: saved.append(model.updates)
    t = trainer(tmp_path, Budget(updates=2), checkpoint=checkpoint)
    t.fit(TinyModel(), Collecting())
    assert saved[:4] == [0, 1, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_collecting_saves_and_stops(tmp_path, number):
    before = signal.getsignal(signal.SIGINT)
    checkpoint = RunCheckpoint(every_minutes=None)
    with pytest.raises(SystemExit):
        fit(tmp_path, data=Collecting(number), checkpoint=checkpoint)
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert checkpoint.interrupted_by_signal == number
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert (last["zoo"]["updates"], last["zoo"]["env_steps"]) == (2, 4)


# torch.save stops half-way through the third last.ckpt
SCRIPT = """
import sys, time, torch
from pathlib import Path
from test_checkpoint import fit
run, save = Path(sys.argv[1]), torch.save
saved = 0
def half(checkpoint, file):
    global saved
    saved += "optimizer_states" in checkpoint
    if "optimizer_states" in checkpoint and saved == 3:
        file.write(b"half of a checkpoint")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
    save(checkpoint, file)
torch.save = half
fit(run)
"""


def test_killed_while_writing_and_resumed_equals_uninterrupted(tmp_path, uninterrupted):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line.startswith("writing") for line in process.stdout)
    process.kill()
    process.wait()
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert last["zoo"]["updates"] == 5
    fit(tmp_path, resume=True)
    assert_same_run(tmp_path, uninterrupted)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(tmp_path, updates=2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(RuntimeError):
        fit(tmp_path, Crash(1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
