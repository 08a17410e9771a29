import builtins
from dataclasses import replace
from importlib import resources

import gymnasium as gym
import numpy as np
import pytest
import yaml

from benchmarks import baselines
from benchmarks.baselines import BASELINES, BaselineRunner, load_preset, play
from benchmarks.cell import Cell, read_metrics, run_cell
from datamodules.errors import MissingExtra, UserError

DQN = Cell("dqn", "cartpole", "CartPole-v1", 0, env_steps=600, eval_every=200, eval_episodes=2)


class Count(gym.Env):
    """Rewards 1 for so many steps as the seed says; observes the number of steps."""

    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(1, 9))
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return (
            np.full(1, self.steps, np.float32),
            float(action),
            self.steps == self.length,
            False,
            {},
        )


def test_play_finishes_every_episode_with_its_own_seed():
    seeds = np.random.SeedSequence(3).generate_state(25)
    lengths = []
    for seed in seeds:
        env = Count()
        env.reset(seed=int(seed))
        lengths.append(env.length)
    assert play(Count, lambda obs: np.ones(len(obs)), 25, seed=3).tolist() == lengths
    # The policy sees each episode's own observation.
    first_only = play(Count, lambda obs: (obs[:, 0] == 0).astype(int), 25, seed=3)
    assert first_only.tolist() == [1.0] * 25


def test_random_policy_scores_what_the_suites_say(tmp_path):
    result = run_cell("random", "cartpole", "CartPole-v1", 0, tmp_path, episodes=400)
    (score,) = (row for row in result["rows"] if row["metric"] == "return_mean")
    assert score["value"] == pytest.approx(22.2, abs=2.5)
    assert (score["env_steps"], score["updates"], score["wall_s"]) == (0, 0, None)


@pytest.fixture(scope="module")
def dqn(tmp_path_factory):
    pytest.importorskip("stable_baselines3")
    out = tmp_path_factory.mktemp("dqn")
    options = {"env_steps": 600, "eval_every": 200, "eval_episodes": 2, "episodes": 4}
    return out, run_cell("dqn", "cartpole", "CartPole-v1", 0, out, **options)


def test_dqn_leaves_a_curve_a_checkpoint_and_a_score(dqn):
    out, result = dqn
    returns = [row for row in result["rows"] if row["metric"] == "return_mean"]
    assert [row["env_steps"] for row in returns[:3]] == [200, 400, 600]
    assert all(row["n"] == 2 and 1 <= row["value"] <= 500 for row in returns[:-1])
    assert (returns[-1]["n"], returns[-1]["wall_s"] > 0) == (4, True)
    # 4-256-256-2 with biases, the target network not counted.
    (params,) = (row["value"] for row in result["rows"] if row["metric"] == "params")
    assert params == 4 * 256 + 256 + 256 * 256 + 256 + 256 * 2 + 2
    assert (DQN.run(out) / "checkpoints" / "best.zip").exists()


def test_baselines_are_seeded(dqn, tmp_path):
    def score(line):
        return not line.metric.startswith("time/")

    BaselineRunner().train(DQN, tmp_path / "again")
    BaselineRunner().train(replace(DQN, seed=1), tmp_path / "other")
    first = list(filter(score, read_metrics(DQN.run(dqn[0]))))
    assert list(filter(score, read_metrics(tmp_path / "again"))) == first
    assert list(filter(score, read_metrics(tmp_path / "other"))) != first


def test_every_preset_builds_its_agents():
    pytest.importorskip("stable_baselines3")
    for file in (resources.files("benchmarks") / "presets").iterdir():
        preset = yaml.safe_load(file.read_text())
        for name in set(preset) - {"task", "env"}:
            assert name in BASELINES
            env = baselines.make_task_env(preset)
            agent = baselines.make_agent(name, preset)
            assert agent.predict(env.reset(seed=0)[0])[0] in env.action_space


def test_linear_schedules():
    assert baselines._schedule("linear 0.2")(0.25) == 0.05
    assert baselines._schedule("MlpPolicy") == "MlpPolicy"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "cartpol"}, "no preset 'cartpol'; nearest: cartpole"),
        ({"task": "Pendulum-v1"}, "is for CartPole-v1, not for Pendulum-v1"),
        ({"model": "sac"}, "no settings for 'sac', only dqn, ppo"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        load_preset(replace(DQN, **changes))


def test_a_preset_in_another_environment_than_its_own():
    cell = replace(DQN, preset="cartpole-acrobot", base="cartpole", task="Acrobot-v1")
    with pytest.raises(UserError, match="preset 'cartpole' is for CartPole-v1, not for Acrobot-v1"):
        load_preset(cell)
    assert load_preset(replace(cell, options={"data.env": "Acrobot-v1"}))["task"] == "Acrobot-v1"


def test_a_baseline_needs_a_budget(tmp_path):
    with pytest.raises(UserError, match="needs a budget: set env_steps"):
        BaselineRunner().train(replace(DQN, env_steps=None), tmp_path)


def test_a_missing_extra_names_the_command(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("stable_baselines3"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"'dqn' needs .*world-model-zoo\[baselines\]"):
        baselines._algorithm("dqn")
