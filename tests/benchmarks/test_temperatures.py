"""The sweep over temperatures, on a model that has learnt nothing."""

from __future__ import annotations

from functools import partial

import torch

import zoo
from benchmarks.temperatures import sweep
from datamodules.envs.factory import make_env
from datamodules.spec import Spec


def test_each_temperature_has_a_controller_of_its_own() -> None:
    make = partial(make_env, "CartPole-v1", time_limit=30)
    env = make()
    torch.manual_seed(0)
    model = zoo.create(
        "world-models",
        Spec.from_spaces(env.observation_space, env.action_space),
        **{"size": "nano", "population": 4, "rollouts": 2, "horizon": 10, "step_reward": 1.0},
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = list(sweep(model, make, (0.1, 2.0), generations=2, episodes=3))
    assert [row.temperature for row in rows] == [0.1, 2.0]
    assert all(1 <= row.dreamed <= 10 and 5 <= row.real <= 30 for row in rows)
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {key for key in before if key.startswith("controller.")}
    # Neither what came before nor the controller that was there matters.
    assert list(sweep(model, make, (2.0,), generations=2, episodes=3)) == rows[1:]
