"""What is recorded, by whom, how much of it, and that a collection that was killed goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from datamodules.collector import RandomPolicy
from datamodules.envs.wrappers import DictObservation
from datamodules.errors import UserError
from datamodules.sources.opening import open_source
from datamodules.sources.source import steps
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import EpisodeStore
from zoo import collecting
from zoo.collecting import PROGRESS, Amount, Part, collect
from zoo.decision_transformer.module import DecisionTransformer


class Lengths(gym.Env):
    """An episode has 2 to 20 steps, drawn at reset; shows that length, the time, and the seed."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.length, self.t = int(self.np_random.integers(2, 21)), 0
        self.mark = 0.0 if seed is None else seed % 1000
        return self._obs(), {}

    def step(self, action: int) -> Any:
        self.t += 1
        return self._obs(), float(action), self.t >= self.length, False, {}

    def _obs(self) -> np.ndarray:
        return np.array([self.length, self.t, self.mark], np.float32)


class Always:
    """Takes action 2."""

    spec = Spec({"vector": ArraySpec((3,), "float32")}, ActionSpec("discrete", nvec=(3,)))

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {"steps": torch.zeros(batch_size)}

    def act(self, obs: Any, state: Any, *, explore: bool) -> Any:
        if not explore:  # greedily: action 1
            return torch.ones(len(obs["vector"]), dtype=torch.int64), state
        return torch.full((len(obs["vector"]),), 2), state


def make() -> gym.Env:
    return DictObservation(Lengths())


def record(path: Path, amount: Amount, *parts: Part, **options: Any) -> None:
    chosen = parts or (Part("random"),)
    collect(make, "Lengths", chosen, amount, path, **{"num_envs": 4, **options})


def lengths(path: Path) -> list[int]:
    return open_source(path).lengths.tolist()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "load", lambda source: Always())


def test_so_many_episodes_and_all_of_them_whole(tmp_path: Path) -> None:
    record(tmp_path / "a", Amount("episodes", 30))
    source = open_source(tmp_path / "a")
    assert source.num_episodes == 30
    assert source.env == "Lengths"
    assert source.spec == Always.spec
    for i in range(30):
        found = steps(source, i)
        assert found["obs/vector"][0, 0] == source.lengths[i], "recorded from reset to end"
        assert found["obs/vector"][:, 1].tolist() == list(range(len(found["reward"])))
        assert found["reward"][1:].tolist() == found["action"][:-1].tolist()
    assert source.notes == []


def test_short_episodes_are_not_preferred(tmp_path: Path) -> None:
    """The first to end of many side by side would have half of the mean length."""
    record(tmp_path / "a", Amount("episodes", 400), num_envs=64)
    assert abs(np.mean(lengths(tmp_path / "a")) - 11) < 4 * 5.5 / np.sqrt(400)


def test_so_many_steps_rounded_up_to_whole_episodes(tmp_path: Path) -> None:
    record(tmp_path / "a", Amount("steps", 100))
    found = lengths(tmp_path / "a")
    assert sum(found[:-1]) < 100 <= sum(found)


def test_collections_repeat_with_their_seed(tmp_path: Path) -> None:
    marks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        record(tmp_path / name, Amount("episodes", 8), seed=seed)
        source = open_source(tmp_path / name)
        found = [steps(source, i) for i in range(8)]
        marks.append([(s["obs/vector"][0, 2], s["action"].tolist()) for s in found])
    assert marks[0] == marks[1]
    assert marks[0] != marks[2]
    assert len({mark for mark, _ in marks[0]}) == 8, "each episode has a seed of its own"


@pytest.mark.usefixtures("always")
def test_a_mixture_in_its_shares(tmp_path: Path) -> None:
    parts = Part("random", 1), Part("run", 2), Part("run", 1, epsilon=0.6), Part("run", 1)
    record(tmp_path / "a", Amount("episodes", 50), *parts)
    with EpisodeStore.open(tmp_path / "a") as store:
        names = ["random", "run", "run (epsilon 0.6)", "run"]
        assert store.attributes["policies"] == names
        assert [e.stream for e in store.episodes()] == [0] * 10 + [1] * 20 + [2] * 10 + [3] * 10
        actions = [store.read(s, 0, store.bounds(s)[1]) for s in store.stream_ids]
    shares = [float((a["action"][~a["is_last"]] == 2).mean()) for a in actions]
    assert shares[1] == shares[3] == 1
    assert abs(shares[0] - 1 / 3) < 0.15
    assert abs(shares[2] - (0.4 + 0.6 / 3)) < 0.15


@pytest.mark.usefixtures("always")
def test_greedy(tmp_path: Path) -> None:
    record(tmp_path / "a", Amount("episodes", 2), Part("run", greedy=True))
    source = open_source(tmp_path / "a")
    assert (steps(source, 0)["action"][:-1] == 1).all()


@pytest.mark.parametrize("killed_after", [1, 20, 45])
def test_a_killed_collection_goes_on(
    killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "COMMIT_SECONDS", 0.0)
    calls = 0

    def tick(policy: str, done: int, wanted: int) -> None:
        nonlocal calls
        calls += 1
        if calls == killed_after:
            raise RuntimeError("killed")

    amount = Amount("episodes", 40)
    with pytest.raises(RuntimeError):
        record(tmp_path / "a", amount, tick=tick)
    with pytest.raises(UserError, match="is there already: add --resume"):
        record(tmp_path / "a", amount)
    record(tmp_path / "a", amount, resume=True)
    source = open_source(tmp_path / "a")
    assert source.num_episodes == 40
    assert source.notes == []
    firsts = [steps(source, i)["obs/vector"][0] for i in range(40)]
    assert len({float(first[2]) for first in firsts}) > 35, "no episode was played again"
    assert all(first[0] == length for first, length in zip(firsts, source.lengths, strict=True))


def test_what_was_not_committed_is_cut_off(tmp_path: Path) -> None:
    record(tmp_path / "a", Amount("episodes", 5))
    before = lengths(tmp_path / "a")
    with EpisodeStore.open(tmp_path / "a", writable=True) as store:
        row = {k: np.zeros(f.shape, f.dtype) for k, f in store.fields.items()}
        store.append(0, {**row, "is_first": np.array(True)})
    record(tmp_path / "a", Amount("episodes", 9), resume=True)
    found = lengths(tmp_path / "a")
    assert found[:5] == before
    assert len(found) == 9
    record(tmp_path / "a", Amount("episodes", 9), resume=True)
    assert lengths(tmp_path / "a") == found, "there was enough"


def test_policies_that_are_asked_for_a_return_hear_what_they_earn() -> None:
    model = DecisionTransformer(
        Spec({"vector": ArraySpec((2,), "float32")}, ActionSpec("discrete", nvec=(2,))), "nano"
    )
    rng = np.random.default_rng(0)
    acting: Any = collecting._Acting(model, Part("random"), model.spec, rng)
    state = acting.initial_state(3)
    left = acting.rewarded(state, torch.tensor([1.0, 2.0, 3.0]))["return_to_go"]
    assert torch.equal(state["return_to_go"] - left, torch.tensor([1.0, 2.0, 3.0]))
    other = collecting._Acting(RandomPolicy(model.spec, rng), Part("random"), model.spec, rng)
    assert not hasattr(other, "rewarded")


def test_another_collection_is_not_continued(tmp_path: Path) -> None:
    record(tmp_path / "a", Amount("episodes", 2))
    for options in ({"seed": 1}, {}, {"options": {"time_limit": 9}}):
        parts = (Part("random", epsilon=0.5),) if not options else ()
        with pytest.raises(UserError, match="another collection"):
            record(tmp_path / "a", Amount("episodes", 4), *parts, resume=True, **options)
    (tmp_path / "a" / PROGRESS).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        record(tmp_path / "a", Amount("episodes", 4), resume=True)


def test_a_policy_of_another_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Always()
    other.spec = Spec(Always.spec.obs, ActionSpec("discrete", nvec=(5,)))
    monkeypatch.setattr(collecting, "load", lambda source: other)
    with pytest.raises(UserError, match="policy 'run' was made for"):
        record(tmp_path / "a", Amount("episodes", 2), Part("run"))
    monkeypatch.setattr(collecting, "load", lambda source: object())
    with pytest.raises(UserError, match="which cannot act"):
        record(tmp_path / "a", Amount("episodes", 2), Part("run"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Part("random", share=0),
        lambda: Part("random", epsilon=1.5),
        lambda: Amount("steps", 0),
    ],
)
def test_bad_numbers(wrong: Any) -> None:
    with pytest.raises(UserError):
        wrong()


def test_shares_add_up() -> None:
    for count in (1, 7, 10, 100):
        shares = Amount("steps", count).shares([Part("random")] * 3)
        assert sum(shares) == count
        assert max(shares) - min(shares) <= 1


class TestSb3:
    @pytest.mark.parametrize("name", ["PPO", "A2C", "DQN"])
    def test_a_model_plays_its_own_actions(self, name: str, tmp_path: Path) -> None:
        sb3 = pytest.importorskip("stable_baselines3")
        agent = getattr(sb3, name)("MlpPolicy", Lengths(), seed=0, device="cpu")
        agent.save(tmp_path / "agent.zip")
        part = Part(f"sb3:{tmp_path / 'agent.zip'}", greedy=True)
        record(tmp_path / "a", Amount("episodes", 3), part)
        source = open_source(tmp_path / "a")
        for i in range(3):
            found = steps(source, i)
            expected, _ = agent.predict(found["obs/vector"], deterministic=True)
            assert found["action"][:-1].tolist() == expected[:-1].tolist()

    def test_mistakes(self, tmp_path: Path) -> None:
        sb3 = pytest.importorskip("stable_baselines3")
        sb3.DQN("MlpPolicy", "CartPole-v1", device="cpu", buffer_size=10).save(tmp_path / "dqn.zip")
        (tmp_path / "bad.zip").write_bytes(b"PK")
        for name, message in (
            ("dqn.zip", "it was trained on another one"),
            ("bad.zip", "is not a file that stable-baselines3 saved"),
            ("none.zip", "there is no file"),
        ):
            with pytest.raises(UserError, match=message):
                record(tmp_path / "a", Amount("episodes", 1), Part(f"sb3:{tmp_path / name}"))
