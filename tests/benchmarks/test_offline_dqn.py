from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest

from benchmarks import baselines
from benchmarks.baselines import OFFLINE, BaselineRunner, load_preset, make_agent, make_task_env
from benchmarks.cell import Cell, read_metrics, run_cell
from datamodules import EpisodeStore, OfflineDataModule, Spec, UserError
from datamodules.sources.source import step_fields
from datamodules.sources.writing import append_episode, store_attributes
from zoo import configs

pytest.importorskip("stable_baselines3")
from benchmarks.offline_dqn import fill_buffer, learn

GAMMA = 0.8
QUIT, ON = range(2)
TABLE = {  # with one-hot observations a linear network is a table
    "policy": "MlpPolicy",
    "policy_kwargs": {"net_arch": []},
    "learning_rate": 0.02,
    "batch_size": 32,
    "gamma": GAMMA,
    "target_update_interval": 20,
}
CELL = Cell(OFFLINE, "corridor-20", "zoo/KeyCorridor20-v0", 0, eval_every=20, eval_episodes=2)


class Spaces(gym.Env):
    """Only spaces: nobody may act here."""

    def __init__(self, observation_space):
        self.observation_space, self.action_space = observation_space, gym.spaces.Discrete(2)


class Chain(Spaces):
    """Three states, one-hot; going on from the last one pays 1, quitting anywhere 0.5."""

    def __init__(self):
        super().__init__(gym.spaces.Box(0, 1, (3,), np.float32))


def record(path, env, episodes):
    """A store of episodes (observations of n + 1 steps by key, n actions, n rewards, terminal)."""
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    with EpisodeStore.create(path, step_fields(spec), 16, store_attributes(spec, None)) as store:
        for obs, actions, rewards, terminal in episodes:
            n = len(actions)
            episode = {f"obs/{key}": np.asarray(obs[key], a.dtype) for key, a in spec.obs.items()}
            episode["action"] = np.array([*actions, 0], np.int64)
            episode["reward"] = np.array([0, *rewards], np.float32)
            for key, at in (("is_first", 0), ("is_last", n), ("is_terminal", n)):
                episode[key] = np.arange(n + 1) == at
            episode["is_terminal"] &= terminal
            append_episode(store, 0, episode)
    return str(path)


def chain(path, episodes):
    """Episodes in `Chain`, by the numbers of their states."""
    vectors = [({"vector": np.eye(3)[states]}, *rest) for states, *rest in episodes]
    return OfflineDataModule(record(path, Chain(), vectors), env=Chain)


def learned(data, updates=400):
    """Q-values (states, actions)."""
    agent = make_agent(OFFLINE, {"task": Chain, OFFLINE: TABLE}, seed=0)
    fill_buffer(agent, data)
    learn(agent, updates, lambda: None)
    assert agent.num_timesteps == 0
    return agent.q_net(agent.q_net.obs_to_tensor(np.eye(3, dtype=np.float32))[0]).detach().numpy()


def test_the_optimal_values_of_a_chain(tmp_path):
    # The last observation is the best state: bootstrapping from it would raise all values.
    episodes = [
        ([0, 1, 2, 2], [ON, ON, ON], [0, 0, 1], True),
        ([0, 2], [QUIT], [0.5], True),
        ([0, 1, 2], [ON, QUIT], [0, 0.5], True),
        ([0, 1, 2, 2], [ON, ON, QUIT], [0, 0, 0.5], True),
    ]
    found = learned(chain(tmp_path, episodes))
    optimal = [[0.5, GAMMA**2], [0.5, GAMMA], [0.5, 1.0]]
    np.testing.assert_allclose(found, optimal, atol=0.02)


@pytest.mark.parametrize(("terminal", "value"), [(False, GAMMA), (True, 0.0)])
def test_values_cross_the_end_of_a_recording_but_not_that_of_the_task(tmp_path, terminal, value):
    episodes = [([0, 1], [ON], [0], terminal), ([1, 2], [ON], [1], True), ([1, 2], [0], [0], True)]
    assert learned(chain(tmp_path, episodes))[0, ON] == pytest.approx(value, abs=0.02)


def test_the_target_network_moves_every_so_many_updates(tmp_path):
    agent = make_agent(OFFLINE, {"task": Chain, OFFLINE: TABLE}, seed=0)
    fill_buffer(agent, chain(tmp_path, [([0, 1], [ON], [1], True)]))

    def parameters(network):
        return [value.clone() for value in network.state_dict().values()]

    def same(one, other):
        return all((a == b).all() for a, b in zip(one, other, strict=True))

    kept, moved = parameters(agent.q_net_target), []

    def after_update():
        now = parameters(agent.q_net_target)
        moved.append(not same(now, kept))
        if moved[-1]:
            assert same(now, parameters(agent.q_net))
            kept[:] = now

    learn(agent, 45, after_update)
    assert np.flatnonzero(moved).tolist() == [19, 39]


def test_several_observations_are_in_the_order_of_the_environment(tmp_path):
    space = gym.spaces.Dict(
        {"b": gym.spaces.Box(-9, 9, (2,), np.float32), "a": gym.spaces.Box(-9, 9, (1,), np.float32)}
    )
    env = partial(Spaces, space)
    rows = {"a": np.array([[1], [2]]), "b": np.array([[3, 4], [5, 6]])}
    source = record(tmp_path, env(), [(rows, [ON], [7], True)])
    agent = make_agent(OFFLINE, {"task": env, OFFLINE: TABLE})
    fill_buffer(agent, OfflineDataModule(source, env=env))
    (sample,) = zip(*agent.replay_buffer.sample(1)[:5], strict=True)
    flat = make_task_env({"task": env}).observation
    first, last = ({key: np.float32(value[t]) for key, value in rows.items()} for t in (0, 1))
    want = [flat(first), [ON], flat(last), [1.0], [7.0]]
    for found, expected in zip(sample, want, strict=True):
        assert found.tolist() == list(expected)


def test_images_are_refused(tmp_path):
    env = partial(Spaces, gym.spaces.Box(0, 255, (36, 36, 3), np.uint8))
    source = record(tmp_path, env(), [({"image": np.zeros((2, 36, 36, 3))}, [ON], [1], True)])
    agent = make_agent(OFFLINE, {"task": env, OFFLINE: {"policy": "CnnPolicy", "buffer_size": 1}})
    with pytest.raises(UserError, match=r"learns from vectors, but .* has images"):
        fill_buffer(agent, OfflineDataModule(source, env=env))


@pytest.fixture
def short(tmp_path, monkeypatch):
    """The preset with few updates, and four episodes in the folder that it names."""
    monkeypatch.chdir(tmp_path)
    preset = load_preset(CELL)
    env = make_task_env(preset)
    env.action_space.seed(0)
    episodes = []
    for seed in range(4):
        obs, rewards, actions, over = [env.reset(seed=seed)[0]], [], [], False
        while not over:
            actions.append(env.action_space.sample())
            after, reward, over, *_ = env.step(actions[-1])
            obs.append(after)
            rewards.append(reward)
        episodes.append(({"vector": obs}, actions, rewards, True))
    record(tmp_path / preset[OFFLINE]["source"], env, episodes)
    preset[OFFLINE]["updates"] = 60
    monkeypatch.setattr(baselines, "load_preset", lambda cell: preset)


@pytest.mark.usefixtures("short")
def test_a_cell_counts_updates_and_no_env_steps(tmp_path):
    options = {"eval_every": 20, "eval_episodes": 2, "episodes": 4}
    result = run_cell(CELL.model, CELL.preset, CELL.task, 0, tmp_path, **options)
    *curve, final = (row for row in result["rows"] if row["metric"] == "return_mean")
    assert [row["updates"] for row in curve] == [20, 40, 60]
    assert all(row["n"] == 2 for row in curve)
    assert (final["updates"], final["n"]) == (60, 4)
    assert {row["env_steps"] for row in result["rows"]} == {0}
    # Each evaluation has its own time, though env steps stand still.
    seconds = [row["wall_s"] for row in curve[:3]]
    assert 0 < seconds[0] < seconds[1] < seconds[2] <= final["wall_s"]
    (params,) = (row["value"] for row in result["rows"] if row["metric"] == "params")
    assert params == (10 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 3
    assert (CELL.run(tmp_path) / "checkpoints" / "best.zip").exists()


@pytest.mark.usefixtures("short")
def test_learning_is_seeded(tmp_path):
    from stable_baselines3 import DQN

    def weights(name, seed=0, **changes):
        BaselineRunner().train(replace(CELL, seed=seed, **changes), tmp_path / name)
        agent = DQN.load(tmp_path / name / "checkpoints" / "best.zip", device="cpu")
        scores = [line for line in read_metrics(tmp_path / name) if "wall" not in line.metric]
        return [v.tolist() for v in agent.q_net.state_dict().values()], scores

    assert weights("first") == weights("again")
    assert weights("first")[0] != weights("other", seed=1)[0]


def test_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file or folder 'data/corridor-20'.*zoo data collect"):
        BaselineRunner().train(CELL, tmp_path / "run")


def test_a_budget_of_env_steps_is_a_mistake(tmp_path):
    with pytest.raises(
        UserError, match=r"takes no env steps.*`updates` in the preset 'corridor-20"
    ):
        BaselineRunner().train(replace(CELL, env_steps=500), tmp_path / "run")


def test_the_corridors_differ_only_in_the_data_which_is_that_of_decision_transformer():
    settings = []
    for n in (20, 50, 100):
        for seen in (False, True):
            name, task = (f"seen-{n}", f"Seen{n}") if seen else (str(n), str(n))
            cell = replace(CELL, preset=f"corridor-{name}", task=f"zoo/KeyCorridor{task}-v0")
            preset = load_preset(cell)[OFFLINE]
            source = preset.pop("source")
            assert source == f"data/corridor-{name}"
            if not seen:
                data = configs.compose(f"decision-transformer/corridor-{n}")["data"]["init_args"]
                assert source == data["source"]
            settings.append(preset)
    assert all(preset == settings[0] for preset in settings)
