import random

import numpy as np
import pytest
import torch
from callback_standins import EPISODE, PerfectDreamer, TinyData, TinyModel, rows, trainer

from callbacks.budget import Budget
from callbacks.evaluation import Evaluation
from callbacks.schedule import undisturbed
from datamodules.errors import UserError


def test_training_is_the_same_with_and_without_evaluation(tmp_path):
    for name, callbacks in [("a", []), ("b", [Evaluation(every_env_steps=3, episodes=2)])]:
        model = TinyModel()
        trainer(tmp_path / name, Budget(updates=12), *callbacks).fit(model, TinyData())
    assert rows(tmp_path / "a") == rows(tmp_path / "b", but=("eval/", "time/"))
    assert any(r[2] == "eval/return_std" for r in rows(tmp_path / "b"))


def test_values_and_moments(tmp_path):
    evaluation = Evaluation(every_env_steps=5, episodes=3)
    trainer(tmp_path, Budget(env_steps=24), evaluation).fit(PerfectDreamer(), TinyData())
    logged = [r for r in rows(tmp_path, but=()) if "eval" in r[2]]
    # two env steps per update: 5, 10, 15 and 20 are passed at 6, 10, 16 and 20
    assert [int(r[1]) for r in logged if r[2] == "eval/length_mean"] == [6, 10, 16, 20]
    first = {name: float(value) for updates, _, name, value in logged if updates == "3"}
    assert first["eval/return_mean"] == EPISODE * (EPISODE + 1) / 2
    assert first["eval/return_std"] == 0
    assert first["eval/length_mean"] == EPISODE
    assert first["time/eval_s"] > 0


def test_every_evaluation_has_other_seeds_but_runs_agree(tmp_path):
    for name in "ab":
        evaluation = Evaluation(every_env_steps=2, episodes=2)
        trainer(tmp_path / name, Budget(updates=3), evaluation).fit(TinyModel(), TinyData())
    returns = [r[3] for r in rows(tmp_path / "a") if r[2] == "eval/return_mean"]
    assert len(set(returns)) == len(returns) == 3
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_updates_may_decide_when_and_a_resumed_run_agrees(tmp_path):
    """Of a model that has collected all of its env steps before it learns."""

    def fit(name, updates, resume=None):
        evaluation = Evaluation(every_env_steps=1, episodes=2, every_updates=4)
        data = TinyData()
        trainer(tmp_path / name, Budget(updates=updates), evaluation).fit(
            TinyModel(), data, ckpt_path=resume, weights_only=resume and True
        )

    fit("once", 11)
    fit("twice", 6)
    fit("twice", 11, tmp_path / "twice" / "checkpoints" / "last.ckpt")
    measured = [r for r in rows(tmp_path / "once") if r[2].startswith("eval/return_mean")]
    assert [int(r[0]) for r in measured] == [4, 8]
    assert rows(tmp_path / "once") == rows(tmp_path / "twice")


def test_undisturbed_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    def seed():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    seed()
    expected = draw()
    seed()
    inside = []
    for _ in range(2):
        with undisturbed(model, np.random.SeedSequence(5)):
            assert not model.training
            assert not torch.is_grad_enabled()
            inside.append(draw())
    assert inside[0] == inside[1] != expected
    assert draw() == expected
    assert [m.training for m in model] == [True, False]


def test_bad_arguments_are_refused():
    with pytest.raises(UserError, match="Evaluation: every_env_steps is 0"):
        Evaluation(every_env_steps=0)
    with pytest.raises(UserError, match="Evaluation: every_updates is 0"):
        Evaluation(every_updates=0)
    with pytest.raises(UserError, match="episodes is 0"):
        Evaluation(episodes=0)
