import pytest
from callback_standins import TinyData, TinyModel, trainer

from callbacks.budget import Budget
from datamodules.errors import UserError


# two env steps per update
@pytest.mark.parametrize(
    ("budget", "updates"),
    [({"env_steps": 5}, 3), ({"env_steps": 6}, 3), ({"updates": 4, "env_steps": 100}, 4)],
)
def test_stops_at_the_first_batch_end_that_reaches_it(tmp_path, budget, updates):
    model = TinyModel()
    trainer(tmp_path, Budget(**budget)).fit(model, TinyData())
    assert model.updates == updates


def test_without_a_budget_the_trainer_decides(tmp_path):
    model = TinyModel()
    trainer(tmp_path, Budget(), max_steps=12).fit(model, TinyData())
    assert model.updates == 12


def test_stops_after_seconds_of_training_and_goes_on_with_what_is_left(tmp_path):
    first, model = Budget(seconds=0.3), TinyModel(sleep=0.05)
    trainer(tmp_path, first).fit(model, TinyData())
    assert 1 < model.updates <= 6
    last = tmp_path / "checkpoints" / "last.ckpt"

    def resumed(**options):
        again = TinyModel(sleep=0.05)
        trainer(tmp_path, Budget(**options)).fit(again, TinyData(), ckpt_path=last)
        return again.updates

    assert resumed(seconds=0.3) == model.updates  # nothing is left
    assert resumed(seconds=1e9, updates=model.updates + 1) == model.updates + 1


def test_the_processors_seconds_stand_still_while_it_sleeps(tmp_path):
    model = TinyModel(sleep=0.05)
    trainer(tmp_path, Budget(updates=8, seconds=0.3, clock="processor")).fit(model, TinyData())
    assert model.updates == 8


def test_measuring_is_not_training():
    budget = Budget(seconds=10)
    budget.load_state_dict({"seconds": 9.0})
    budget.on_metrics(None, {"time/evaluation_s": 4.0, "eval/return_mean": 1.0})
    budget.on_metrics(None, {"time/updates_per_s": 100.0, "time/wall_s": 3.0})
    assert budget.state_dict() == {"seconds": 5.0}


def test_bad_budget_is_refused():
    with pytest.raises(UserError, match="env_steps is 0"):
        Budget(env_steps=0)
    with pytest.raises(UserError, match="seconds is 0"):
        Budget(seconds=0)
    with pytest.raises(UserError, match="clock is 'sun'"):
        Budget(seconds=1, clock="sun")
