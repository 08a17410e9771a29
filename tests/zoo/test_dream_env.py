"""Dreams as environments: on a dream whose every number is known, and on models of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from latent_models import images, sequences, vectors
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from torch import Tensor

from datamodules.errors import MissingExtra, UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import EpisodeStore, Field
from zoo.__main__ import main
from zoo.base import Imagined, State
from zoo.dream_env import DreamEnv, DreamVectorEnv, as_sb3, from_run, replayed
from zoo.dreamer_v3.module import DreamerV3
from zoo.genie.module import Genie
from zoo.planet.module import PlaNet

LINE = Spec({"vector": ArraySpec((1,), "float32")}, ActionSpec("box", low=(-1.0,), high=(1.0,)))
NANO = {"deter": 16, "hidden": 8, "stoch": 2, "classes": 4, "units": 8, "depth": 2}


class Line(torch.nn.Module):
    """A point x that moves by the action, earns its place, and goes on with probability 1 - x.

    `where` is also in the state, so that there are two parts; noise of size `noise` is drawn.
    """

    spec, device = LINE, torch.device("cpu")

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.batches: list[int] = []

    def observe(self, batch: Any) -> State:
        x = batch["obs"]["vector"]
        return {"x": x, "where": torch.cat([2 * x, 3 * x], -1)}

    def imagine(self, state: State, actions: Any, horizon: int) -> Imagined:
        assert not self.training
        assert horizon == 1
        self.batches.append(len(actions))
        x = state["x"].unsqueeze(1) + actions + self.noise * torch.randn(len(actions), 1, 1)
        after = {"x": x, "where": torch.cat([2 * x, 3 * x], -1)}
        return Imagined(x[..., 0], (1 - x[..., 0]).clamp(0, 1), after, actions)

    def decode(self, state: State) -> dict[str, Tensor]:
        return {"vector": state["x"]}


class Tempered(Line):
    def imagine(  # type: ignore[override]
        self, state: State, actions: Any, horizon: int, temperature: float = 1.0
    ) -> Imagined:
        self.noise = temperature
        return super().imagine(state, actions, horizon)


def line(*places: float, first: int | None = 0, last: int | None = None) -> dict[str, Any]:
    """One real sequence through the places."""
    steps = torch.arange(len(places))
    return {
        "obs": {"vector": torch.tensor(places)[None, :, None]},
        "action": torch.zeros(1, len(places), 1),
        "reward": torch.zeros(1, len(places)),
        "is_first": (steps == (-1 if first is None else first))[None],
        "is_last": (steps == (-1 if last is None else last))[None],
        "is_terminal": torch.zeros(1, len(places), dtype=torch.bool),
    }


def starts_of(env: DreamVectorEnv) -> set[float]:
    obs, _ = env.reset(seed=0)
    return {round(float(x), 3) for x in obs[:, -1]}


def nano(spec: Spec, cls: type = DreamerV3) -> Any:
    torch.manual_seed(0)
    widths = {k: v for k, v in NANO.items() if cls is DreamerV3 or k != "classes"}
    planner = {} if cls is DreamerV3 else {"iterations": 1, "candidates": 4, "elites": 2}
    return cls(spec, size="nano", **widths, **planner).eval()


def play(env: Any, actions: list[Any], seed: int | None) -> list[Any]:
    """Everything that came back, as nested lists."""
    steps: list[Any] = [env.reset(seed=seed)[0]]
    for action in actions:
        steps += env.step(action)[:4]
    return [s.tolist() if isinstance(s, np.ndarray) else s for s in steps]


@pytest.mark.parametrize("observations", ["latent", "decoded"])
@pytest.mark.parametrize("action", ["discrete", "box", "multi_discrete"])
@pytest.mark.parametrize("see", [vectors, images])
@pytest.mark.filterwarnings("error:.*not equal although similar")
def test_gymnasium_finds_no_fault(see: Any, action: str, observations: Any) -> None:
    spec = see(action)
    env = DreamEnv(nano(spec), sequences(spec), observations=observations)
    check_env(env, skip_render_check=True)
    assert Spec.from_spaces(env.observation_space, env.action_space).action == spec.action
    if observations == "decoded":
        described = Spec.from_spaces(env.observation_space, env.action_space)
        assert described == spec
    else:
        assert env.observation_space.shape == (NANO["deter"] + NANO["stoch"] * NANO["classes"],)


def test_scalars_and_keys_stay_as_they_are() -> None:
    obs = {"position": ArraySpec((3,), "float32"), "height": ArraySpec((), "float32")}
    spec = Spec(obs, ActionSpec("discrete", (2,)))
    env = DreamEnv(nano(spec), sequences(spec), observations="decoded")
    check_env(env, skip_render_check=True)
    assert Spec.from_spaces(env.observation_space, env.action_space) == spec


def test_planet_dreams_without_an_end() -> None:
    spec = vectors("box")
    env = DreamVectorEnv(nano(spec, PlaNet), sequences(spec), 3, horizon=4)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(4)]
    assert not any(terminated.any() for terminated, _ in ends)
    assert [bool(truncated.all()) for _, truncated in ends] == [False, False, False, True]


class TestSteps:
    def test_are_those_of_the_model(self) -> None:
        env = DreamVectorEnv(Line(), line(0.0), 2, continue_threshold=0.2)
        obs, _ = env.reset(seed=0)
        np.testing.assert_allclose(obs, [[0, 0, 0]] * 2)
        obs, reward, terminated, truncated, infos = env.step(np.array([[0.5], [0.9]], np.float32))
        # "where" comes before "x"
        np.testing.assert_allclose(obs, [[1, 1.5, 0.5], [1.8, 2.7, 0.9]], rtol=1e-6)
        np.testing.assert_allclose(reward, [0.5, 0.9], rtol=1e-6)
        assert reward.dtype == np.float64
        assert terminated.tolist() == [False, True]
        assert truncated.tolist() == [False, False]
        assert infos == {}

    def test_one_call_of_the_model_for_all_environments(self) -> None:
        model = Line()
        env = DreamVectorEnv(model, line(0.0), 7)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        assert model.batches == [7]

    def test_box_actions_are_clipped(self) -> None:
        env = DreamEnv(Line(), line(0.0), observations="decoded", continue_threshold=0)
        env.reset(seed=0)
        assert env.step(np.array([5.0]))[0] == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("kind", "wrong"), [("discrete", 3), ("discrete", -1), ("multi_discrete", [1, 4])]
    )
    def test_actions_that_do_not_exist_are_refused(self, kind: str, wrong: Any) -> None:
        spec = vectors(kind)
        env = DreamEnv(nano(spec), sequences(spec))
        env.reset(seed=0)
        with pytest.raises(UserError, match="not in the action space"):
            env.step(wrong)

    @pytest.mark.parametrize("wrong", [[np.nan], [0.0, 0.0]])
    def test_arrays_that_are_no_actions_are_refused(self, wrong: list[float]) -> None:
        env = DreamEnv(Line(), line(0.0))
        env.reset(seed=0)
        with pytest.raises(UserError, match="not in the action space"):
            env.step(np.array(wrong))

    def test_need_a_reset(self) -> None:
        with pytest.raises(gym.error.ResetNeeded):
            DreamVectorEnv(Line(), line(0.0)).step([[0.0]])
        env = DreamEnv(Line(), line(0.0), horizon=1)
        with pytest.raises(gym.error.ResetNeeded):
            env.step([0.0])
        env.reset(seed=0)
        env.step([0.0])
        with pytest.raises(gym.error.ResetNeeded):
            env.step([0.0])

    def test_images_come_back_as_bytes(self) -> None:
        spec = Spec({"image": ArraySpec((64, 64, 3), "uint8")}, ActionSpec("discrete", (2,)))
        model = nano(spec)
        env = DreamVectorEnv(model, sequences(spec), 2, observations="decoded")
        assert env.single_observation_space == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        obs, _ = env.reset(seed=0)
        state = {key: value.unsqueeze(1) for key, value in env._dream.start(2, _again(env)).items()}
        wanted = model.decode(state)["image"][:, 0] * 255
        assert np.abs(obs.astype(float) - wanted.numpy()).max() <= 0.5 + 1e-4
        assert obs.std() > 0


def _again(env: DreamVectorEnv) -> np.random.Generator:
    """The generator of an environment as `reset(seed=0)` found it."""
    return gym.utils.seeding.np_random(0)[0]


class TestEnds:
    def test_come_as_often_as_predicted(self) -> None:
        env = DreamVectorEnv(Line(), line(0.0), 4000)
        env.reset(seed=0)
        _, _, terminated, _, _ = env.step(np.full((4000, 1), 0.3, np.float32))
        assert terminated.mean() == pytest.approx(0.3, abs=0.03)

    @pytest.mark.parametrize(("place", "ends"), [(-1.0, False), (1.0, True)])
    def test_are_certain_where_the_model_is(self, place: float, ends: bool) -> None:
        env = DreamVectorEnv(Line(), line(0.0), 100)
        env.reset(seed=0)
        _, _, terminated, _, _ = env.step(np.full((100, 1), place, np.float32))
        assert (terminated == ends).all()

    def test_the_horizon_truncates(self) -> None:
        env = DreamEnv(Line(), line(-5.0), horizon=3)
        env.reset(seed=0)
        assert [env.step([0.0])[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]
        env.reset()
        assert env.step([0.0])[3] is False


class TestAutoreset:
    """Environment 0 goes to 0.9 in its second step, which is an end; environment 1 stays."""

    ACTIONS = ([[0.1], [0.1]], [[0.8], [0.1]], [[0.6], [0.1]], [[0.1], [0.1]])

    def roll(self, mode: str) -> list[Any]:
        env = DreamVectorEnv(
            Line(),
            line(0.0),
            2,
            observations="decoded",
            continue_threshold=0.2,
            horizon=3,
            autoreset_mode=mode,
        )
        assert env.metadata["autoreset_mode"] is AutoresetMode(mode)
        env.reset(seed=0)
        return [env.step(np.array(a, np.float32)) for a in self.ACTIONS]

    def test_next_step_ignores_the_action_and_earns_nothing(self) -> None:
        steps = self.roll("NextStep")
        obs, reward = np.array([s[0][:, 0] for s in steps]), np.array([s[1] for s in steps])
        np.testing.assert_allclose(obs[:, 0], [0.1, 0.9, 0.0, 0.1], rtol=1e-6)
        np.testing.assert_allclose(reward[:, 0], [0.1, 0.9, 0.0, 0.1], rtol=1e-6)
        np.testing.assert_allclose(obs[:, 1], [0.1, 0.2, 0.3, 0.0], rtol=1e-6)
        np.testing.assert_allclose(reward[:, 1], [0.1, 0.2, 0.3, 0.0], rtol=1e-6)
        assert [s[2].tolist() for s in steps] == [[i == 1, False] for i in range(4)]
        assert [s[3].tolist() for s in steps] == [[False, i == 2] for i in range(4)]
        assert all(s[4] == {} for s in steps)

    def test_same_step_begins_anew_and_tells_the_last_observation(self) -> None:
        steps = self.roll("SameStep")
        obs, reward = np.array([s[0][:, 0] for s in steps]), np.array([s[1] for s in steps])
        np.testing.assert_allclose(obs[:, 0], [0.1, 0.0, 0.6, 0.7], rtol=1e-6)
        np.testing.assert_allclose(reward[:, 0], [0.1, 0.9, 0.6, 0.7], rtol=1e-6)
        np.testing.assert_allclose(obs[:, 1], [0.1, 0.2, 0.0, 0.1], rtol=1e-6)
        np.testing.assert_allclose(reward[:, 1], [0.1, 0.2, 0.3, 0.1], rtol=1e-6)
        assert [s[2].tolist() for s in steps] == [[i == 1, False] for i in range(4)]
        assert [s[3].tolist() for s in steps] == [[False, i == 2] for i in range(4)]
        assert steps[0][4] == {}
        assert steps[1][4]["_final_obs"].tolist() == [True, False]
        assert steps[1][4]["final_obs"][0] == pytest.approx(0.9)
        assert steps[1][4]["final_obs"][1] is None
        assert steps[2][4]["final_obs"][1] == pytest.approx(0.3)

    @pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
    def test_is_that_of_gymnasiums_own_vector_environment(self, mode: str) -> None:
        options: dict[str, Any] = {"continue_threshold": 0.2, "horizon": 3}
        ours = DreamVectorEnv(Line(), line(0.0), 1, autoreset_mode=mode, **options)
        theirs = gym.vector.SyncVectorEnv(
            [lambda: DreamEnv(Line(), line(0.0), **options)], autoreset_mode=AutoresetMode(mode)
        )
        ours.reset(seed=0)
        theirs.reset(seed=0)
        for action in (0.1, 0.1, 0.1, 0.5, 0.9, 0.9, 0.2):
            one, other = (env.step(np.full((1, 1), action, np.float32)) for env in (ours, theirs))
            for a, b in zip(one[:4], other[:4], strict=True):
                np.testing.assert_array_equal(a, b)
            assert one[4].keys() == other[4].keys()
            if "final_obs" in one[4]:
                np.testing.assert_array_equal(one[4]["final_obs"][0], other[4]["final_obs"][0])

    def test_wrappers_of_vector_environments_fit(self) -> None:
        env = DreamVectorEnv(Line(), line(0.0), 2, horizon=2, continue_threshold=0)
        counted = gym.wrappers.vector.RecordEpisodeStatistics(env)
        counted.reset(seed=0)
        counted.step(np.full((2, 1), 0.5, np.float32))
        infos = counted.step(np.full((2, 1), 0.25, np.float32))[4]
        np.testing.assert_allclose(infos["episode"]["r"], [1.25, 1.25])

    @pytest.mark.parametrize("mode", ["Disabled", "never"])
    def test_other_modes_are_refused(self, mode: str) -> None:
        with pytest.raises(UserError, match="choose NextStep or SameStep"):
            DreamVectorEnv(Line(), line(0.0), autoreset_mode=mode)


class TestReproducible:
    @pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
    @pytest.mark.parametrize("observations", ["latent", "decoded"])
    def test_seed_and_actions_make_the_dream(self, mode: str, observations: Any) -> None:
        spec = vectors("box")
        model, batch = nano(spec), sequences(spec)
        options: dict[str, Any] = {"horizon": 3, "observations": observations}
        env = DreamVectorEnv(model, batch, 3, autoreset_mode=mode, **options)
        env.action_space.seed(0)
        actions = [env.action_space.sample() for _ in range(8)]
        first = play(env, actions, seed=1)
        torch.rand(5)
        assert play(env, actions, seed=1) == first
        torch.manual_seed(99)
        again = DreamVectorEnv(model, batch, 3, autoreset_mode=mode, **options)
        assert play(again, actions, seed=1) == first
        assert play(env, actions, seed=2) != first
        assert play(env, actions, seed=None) != play(env, actions, seed=None)

    def test_the_noise_is_new_at_each_step_and_differs_between_environments(self) -> None:
        env = DreamVectorEnv(Line(noise=1.0), line(0.0), 2, continue_threshold=0.0)
        env.reset(seed=0)
        still = np.zeros((2, 1), np.float32)
        places = np.concatenate([[0, 0], *(env.step(still)[1] for _ in range(3))]).reshape(-1, 2)
        assert len({round(float(step), 4) for step in np.diff(places, axis=0).flat}) == 6

    def test_the_global_generators_and_the_model_stay_as_they_were(self) -> None:
        spec = images("box")
        model = nano(spec).train()
        torch.manual_seed(5)
        np.random.seed(5)
        wanted = torch.rand(3), np.random.rand(3)
        torch.manual_seed(5)
        np.random.seed(5)
        env = DreamVectorEnv(model, sequences(spec), 2, observations="decoded")
        env.reset(seed=0)
        env.step(env.action_space.sample())
        assert torch.equal(torch.rand(3), wanted[0])
        assert (np.random.rand(3) == wanted[1]).all()
        assert model.training

    def test_what_is_done_to_observations_does_not_reach_the_dream(self) -> None:
        for observations in ("latent", "decoded"):
            env = DreamVectorEnv(Line(), line(0.5), 2, observations=observations, horizon=9)
            obs, _ = env.reset(seed=0)
            obs[:] = 7.0
            assert env.step(np.zeros((2, 1), np.float32))[1].tolist() == [0.5, 0.5]


class TestStarts:
    def test_are_all_steps_with_context_that_do_not_end(self) -> None:
        middle = line(0.0, 0.1, 0.2, 0.3, 0.4, first=None, last=4)
        assert starts_of(DreamVectorEnv(Line(), middle, 200, context=3)) == {0.2, 0.3}

    def test_a_beginning_needs_no_context(self) -> None:
        batch = line(0.0, 0.1, 0.2, 0.3, first=1)
        assert starts_of(DreamVectorEnv(Line(), batch, 200)) == {0.1, 0.2, 0.3}

    def test_only_beginnings(self) -> None:
        batch = line(0.0, 0.1, 0.2, 0.3, first=1)
        assert starts_of(DreamVectorEnv(Line(), batch, 200, first_only=True)) == {0.1}

    def test_padding_is_left_out(self) -> None:
        batch = line(0.0, 0.1, 0.2) | {"mask": torch.tensor([[1.0, 1.0, 0.0]])}
        assert starts_of(DreamVectorEnv(Line(), batch, 200)) == {0.0, 0.1}

    def test_of_many_batches_or_a_function(self) -> None:
        batches = [line(0.0, 0.1), line(0.2, 0.3, 0.4)]
        wanted = {0.0, 0.1, 0.2, 0.3, 0.4}
        assert starts_of(DreamVectorEnv(Line(), iter(batches), 200)) == wanted
        assert starts_of(DreamVectorEnv(Line(), lambda: batches, 200)) == wanted
        assert starts_of(DreamVectorEnv(Line(), lambda: batches[0], 200)) == {0.0, 0.1}

    @pytest.mark.parametrize(
        ("starts", "options"),
        [
            (line(0.0, 0.1, first=None), {}),
            (line(0.0, first=0, last=0), {}),
            (line(0.0, 0.1, 0.2, first=None), {"context": 1, "first_only": True}),
            ([], {}),
        ],
    )
    def test_where_there_is_none(self, starts: Any, options: Any) -> None:
        with pytest.raises(UserError, match=r"no dream can start .* give longer or more"):
            DreamEnv(Line(), starts, **options)

    def test_of_another_task(self) -> None:
        with pytest.raises(UserError, match=r"lack the observations \['image'\]"):
            DreamEnv(nano(images()), sequences(vectors()))


class TestTemperature:
    def test_reaches_models_that_know_it(self) -> None:
        spread = []
        for temperature in (0.01, 1.0, 100.0):
            env = DreamVectorEnv(Tempered(), line(0.0), 500, temperature=temperature)
            env.reset(seed=0)
            spread.append(env.step(np.zeros((500, 1), np.float32))[1].std())
        assert spread == pytest.approx([0.01, 1.0, 100.0], rel=0.1)

    def test_is_refused_by_those_that_do_not(self) -> None:
        with pytest.raises(UserError, match=r"temperature is 1\.15, but the dreams of Line have"):
            DreamEnv(Line(), line(0.0), temperature=1.15)

    def test_is_above_zero(self) -> None:
        with pytest.raises(UserError, match="above 0"):
            DreamEnv(Tempered(), line(0.0), temperature=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs >= 1"),
        ({"horizon": 0}, "horizon >= 1"),
        ({"context": 0}, "context >= 1"),
        ({"observations": "pixels"}, "no observations 'pixels'"),
        ({"continue_threshold": 1.5}, "continue_threshold is 1.5"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DreamVectorEnv(Line(), line(0.0), **options)


def test_models_that_do_not_dream() -> None:
    with pytest.raises(UserError, match="an Imaginer, which Linear is not"):
        DreamEnv(torch.nn.Linear(1, 1), line(0.0))


class TestRuns:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        """A run directory of two ranks; row t of rank r holds 10 r + t / 100."""
        spec = vectors("discrete")
        model = nano(spec)
        (tmp_path / "checkpoints").mkdir()
        checkpoint = {
            "state_dict": model.state_dict(),
            "hyper_parameters": dict(model.hparams),
            "zoo": model.identity,
        }
        torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
        fields = {"obs/vector": Field((4,), "float32"), "action": Field((), "int64")}
        fields["reward"] = Field((), "float32")
        fields |= {key: Field((), "bool") for key in ("is_first", "is_last", "is_terminal")}
        for rank in range(2):
            path = tmp_path / "replay" / f"rank{rank}"
            with EpisodeStore.create(path, fields) as store:
                for t in range(40):
                    step = {key: np.zeros(f.shape, f.dtype) for key, f in fields.items()}
                    step["obs/vector"][:] = 10 * rank + t / 100
                    step["is_first"], step["is_last"] = np.bool_(t % 20 == 0), np.bool_(t == 39)
                    store.append(0, step)
        return tmp_path

    def test_sequences_come_from_all_ranks(self, run: Path) -> None:
        batch = replayed(run, sequences=8, length=6, seed=1)
        assert batch["reward"].shape == (8, 6)
        assert batch["is_first"].dtype == torch.bool
        value = batch["obs"]["vector"][..., 0]
        assert (value[:, 0] >= 10).sum() == 4
        torch.testing.assert_close(value.diff(dim=1), torch.full((8, 5), 0.01), atol=1e-5, rtol=0)
        assert torch.equal(value, replayed(run, 8, 6, seed=1)["obs"]["vector"][..., 0])
        assert not torch.equal(value, replayed(run, 8, 6, seed=2)["obs"]["vector"][..., 0])

    def test_are_made_by_their_registered_name(self, run: Path) -> None:
        env = gym.make("zoo/Dream-v0", run=str(run), length=10, horizon=4)
        assert isinstance(env.unwrapped, DreamEnv)
        check_env(env.unwrapped, skip_render_check=True)
        envs = gym.make_vec("zoo/Dream-v0", num_envs=3, run=str(run), length=10)
        assert isinstance(envs, DreamVectorEnv)
        assert envs.num_envs == 3
        direct = from_run(run, 3, length=10)
        actions = [np.array([0, 1, 2])] * 3
        assert play(direct, actions, 0) == play(envs, actions, 0)

    def test_too_short_a_replay(self, run: Path) -> None:
        with pytest.raises(UserError, match=r"no 41 steps in a row: shorten them"):
            from_run(run, length=41)

    def test_no_replay(self, run: Path, tmp_path: Path) -> None:
        (run / "replay").rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match="has no replay to start dreams from"):
            from_run(run)


class TestStableBaselines:
    @pytest.mark.parametrize("action", ["discrete", "box", "multi_discrete"])
    def test_ppo_learns_in_a_dream_as_it_is(self, action: str) -> None:
        spec = vectors(action)
        env = DreamEnv(nano(spec), sequences(spec), horizon=20)
        agent = PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
        agent.learn(128)
        assert agent.num_timesteps == 128
        assert agent.ep_info_buffer
        assert all(episode["l"] <= 20 for episode in agent.ep_info_buffer)

    @pytest.mark.parametrize("observations", ["latent", "decoded"])
    def test_ppo_learns_in_a_batch_of_dreams(self, observations: Any) -> None:
        spec = images("discrete")
        envs = DreamVectorEnv(nano(spec), sequences(spec), 4, observations=observations, horizon=9)
        policy = "MlpPolicy" if observations == "latent" else "MultiInputPolicy"
        agent = PPO(policy, as_sb3(envs), n_steps=16, batch_size=32, n_epochs=1, device="cpu")
        agent.learn(64)
        assert agent.num_timesteps == 64

    def test_ppo_finds_the_end_of_the_line(self) -> None:
        """Reward is the place, and going right is all there is to learn."""
        envs = as_sb3(DreamVectorEnv(Line(), line(-9.0), 16, horizon=8, observations="decoded"))
        settings: dict[str, Any] = {"n_steps": 32, "batch_size": 128, "learning_rate": 3e-3}
        agent = PPO("MlpPolicy", envs, **settings, seed=0, device="cpu")
        before, _ = evaluate_policy(agent, envs, 16, warn=False)
        agent.learn(6000)
        after, _ = evaluate_policy(agent, envs, 16, warn=False)
        assert before < -50  # standing still earns -72
        assert after > -40  # going right all the way -36

    def test_the_view_tells_why_episodes_ended(self) -> None:
        options: dict[str, Any] = {"continue_threshold": 0.2, "horizon": 2}
        dreams = DreamVectorEnv(Line(), line(0.0), 2, observations="decoded", **options)
        envs = as_sb3(dreams)
        envs.seed(3)
        envs.reset()
        assert envs.step(np.array([[0.9], [0.1]]))[3] == [
            {"TimeLimit.truncated": False, "terminal_observation": pytest.approx(0.9)},
            {"TimeLimit.truncated": False},
        ]
        obs, reward, done, infos = envs.step(np.array([[0.3], [0.1]]))
        np.testing.assert_allclose(obs, [[0.3], [0.0]], rtol=1e-6)
        np.testing.assert_allclose(reward, [0.3, 0.2], rtol=1e-6)
        assert done.tolist() == [False, True]
        assert infos[1] == {
            "TimeLimit.truncated": True,
            "terminal_observation": pytest.approx(0.2),
        }
        assert envs.get_attr("horizon") == [2, 2]
        assert envs.env_is_wrapped(gym.Wrapper) == [False, False]
        assert dreams.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP

    def test_the_view_is_seeded_and_leaves_the_dreams_alone(self) -> None:
        dreams = DreamVectorEnv(Line(noise=1.0), line(0.0), 2)
        dreams.reset(seed=0)
        rewards = []
        for seed in (3, 3, 4):
            envs = as_sb3(dreams)
            envs.seed(seed)
            envs.reset()
            rewards.append(envs.step(np.zeros((2, 1)))[1].tolist())
        assert rewards[0] == rewards[1] != rewards[2]
        untouched = DreamVectorEnv(Line(noise=1.0), line(0.0), 2)
        untouched.reset(seed=0)
        still = np.zeros((2, 1), np.float32)
        assert dreams.step(still)[1].tolist() == untouched.step(still)[1].tolist()

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "zoo.dream_sb3", None)
        with pytest.raises(MissingExtra, match=r"world-model-zoo\[baselines\]"):
            as_sb3(DreamVectorEnv(Line(), line(0.0)))

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    def test_ppo_trained_in_dreams_alone_balances_the_real_pole(self, tmp_path: Path) -> None:
        fit = ["fit", "dreamer-v3/cartpole", "--run", str(tmp_path / "run"), "--env-steps", "5000"]
        assert main(fit) == 0
        dreams = from_run(tmp_path / "run", num_envs=32, observations="decoded", horizon=200)
        agent = PPO("MlpPolicy", as_sb3(dreams), n_steps=64, batch_size=256, seed=0, device="cpu")
        agent.learn(150_000)
        real = Monitor(gym.make("CartPole-v1"))
        score, _ = evaluate_policy(agent, real, 20)
        print(f"PPO, trained in dreams, earns {score} in CartPole-v1")
        assert score > 200  # a random policy earns 23


@pytest.mark.parametrize("action", [None, ActionSpec("box", low=(-1.0,), high=(1.0,))])
def test_dreams_of_latent_actions_are_played_by_these(action: ActionSpec | None) -> None:
    image = ArraySpec((16, 16, 3), "uint8")
    parts = ("tokenizer_encoder", "tokenizer_decoder", "action_encoder", "action_decoder")
    tiny = {"layers": 1, "width": 16, "heads": 2, "head": 8, "hidden": 32}
    sizes: Any = dict.fromkeys((*parts, "dynamics", "policy"), tiny)
    model = Genie(Spec({"image": image}, action), "nano", **sizes, frames=4, num_actions=5, steps=2)
    video = torch.randint(256, (2, 6, *image.shape)).to(torch.uint8)
    flags = torch.zeros(2, 6, dtype=torch.bool)
    starts = {"obs": {"image": video}, "is_first": flags, "is_last": flags}
    env = DreamEnv(model, starts, observations="decoded", horizon=3)
    assert env.action_space == gym.spaces.Discrete(5)
    check_env(env, skip_render_check=True)
    envs = DreamVectorEnv(model, starts, 2, observations="decoded", horizon=3)
    envs.reset(seed=0)
    obs, *_ = envs.step(np.array([0, 4]))
    assert obs.shape == (2, *image.shape)
    with pytest.raises(UserError, match="are not in the action space"):
        envs.step(np.array([0, 5]))
    with pytest.raises(UserError, match=r"\[0.0, 1.9\] are no whole numbers"):
        envs.step(np.array([0.0, 1.9]))
    with pytest.raises(UserError, match=r"float32 of shape .* was made for \(B, T\) of uint8"):
        DreamEnv(model, {**starts, "obs": {"image": video.float() / 255}})
    with pytest.raises(UserError, match="take sequences of its task"):
        DreamEnv(model, {**starts, "obs": {"image": video[:, :, 1:]}})
