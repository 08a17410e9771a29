"""The error budget, on a model that has learnt nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.error_budget import Probe, Swapped, _state, planned, way
from datamodules.envs.factory import make_env
from datamodules.envs.two_rooms import sample_tasks
from datamodules.envs.two_rooms_policies import success_rate
from datamodules.spec import Spec
from zoo.jepa_wm.module import JEPAWorldModel
from zoo.planning import CEM


@pytest.fixture(scope="module")
def model() -> JEPAWorldModel:
    env = make_env("zoo/TwoRooms-v0", goal_in_obs=True)
    torch.manual_seed(0)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    return JEPAWorldModel(spec, "nano", encoder="conv", predictor="mlp", replan=3).eval()


@pytest.fixture(scope="module")
def probe(model: JEPAWorldModel) -> Probe:
    return Probe(model, np.random.default_rng(0), "fixed")


def test_the_way_leads_through_the_door() -> None:
    wall = torch.tensor([16.0, 16.0])
    left, right = torch.tensor([4.0, 16.0]), torch.tensor([28.0, 4.0])
    assert way(left, left + 3, wall) == pytest.approx(18**0.5)
    assert way(left, right, wall) == pytest.approx(12 + 288**0.5)


def test_the_probe_reads_positions(model: JEPAWorldModel, probe: Probe) -> None:
    assert 0.6 < probe.r2 < 1  # random convolutions keep most of a picture


def test_nothing_swapped_is_the_model(model: JEPAWorldModel, probe: Probe) -> None:
    tasks = sample_tasks(np.random.default_rng(1), 5)
    state, actions = _state(model, tasks.start, tasks), torch.rand(5, 4, 2)
    as_learnt = Swapped(model, probe, "learnt", "learnt").imagine(state, actions, 4).reward
    own = {key: state[key] for key in ("latents", "actions", "length", "goal")}
    torch.testing.assert_close(as_learnt, model.imagine(own, actions, 4).reward)
    # True dynamics: the cost of the images to which the actions lead.
    true = Swapped(model, probe, "true", "learnt").imagine(state, actions, 4).reward
    assert true.shape == as_learnt.shape and not torch.allclose(true, as_learnt)


def test_with_the_truth_plans_succeed(model: JEPAWorldModel, probe: Probe) -> None:
    tasks = sample_tasks(np.random.default_rng(1), 4)
    planner = CEM(horizon=30, block=3, iterations=3, candidates=100, elites=10, init_std=0.6)

    def success(dynamics: str, cost: str) -> float:
        torch.manual_seed(0)
        policy = planned(Swapped(model, probe, dynamics, cost), planner)
        return success_rate(policy, tasks, np.random.default_rng(0), 60)

    assert success("true", "true") == 1
    assert success("learnt", "learnt") < 1
