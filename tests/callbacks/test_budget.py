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


def test_bad_budget_is_refused():
    with pytest.raises(UserError, match="env_steps is 0"):
        Budget(env_steps=0)
