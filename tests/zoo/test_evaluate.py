"""The evaluation loop, on an environment that notices a wrong state, seed or order."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from datamodules import ActionSpec, ArraySpec, Spec
from datamodules.errors import UserError
from zoo.evaluate import evaluate

SPEC = Spec({"vector": ArraySpec((1,), "float32")}, ActionSpec("discrete", nvec=(1000,)))


class Counting(gym.Env):
    """Lasts a number of steps that its seed decides and pays 1 for an action equal to the step."""

    observation_space = gym.spaces.Dict({"vector": gym.spaces.Box(-1, 1, (1,))})
    action_space = gym.spaces.Discrete(1000)
    open = 0

    def __init__(self) -> None:
        Counting.open += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.t = int(self.np_random.integers(1, 12)), 0
        return {"vector": np.zeros(1, np.float32)}, {}

    def step(self, action):
        assert isinstance(action, int)
        reward = float(action == self.t)
        self.t, self.left = self.t + 1, self.left - 1
        return {"vector": np.zeros(1, np.float32)}, reward, self.left == 0, False, {}

    def close(self) -> None:
        Counting.open -= 1


class Counter(torch.nn.Module):
    """A policy that counts its own steps, and draws noise while it does."""

    spec = SPEC
    device = torch.device("cpu")

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {"t": torch.zeros(batch_size, dtype=torch.int64)}

    def act(self, obs, state, *, explore: bool):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert obs["vector"].shape == (len(state["t"]), 1)
        torch.rand(1)
        return state["t"] + int(explore), {"t": state["t"] + 1}


def test_each_episode_has_its_own_seed_and_state() -> None:
    result = evaluate(Counter(), Counting, episodes=9, seed=3, num_envs=4)
    assert result.returns == tuple(float(n) for n in result.lengths)
    assert len(set(result.lengths)) > 2
    assert Counting.open == 0


@pytest.mark.parametrize("num_envs", [1, 2, 9, 50])
def test_the_number_of_environments_changes_nothing(num_envs: int) -> None:
    wanted = evaluate(Counter(), Counting, episodes=9, seed=3, num_envs=4)
    assert evaluate(Counter(), Counting, episodes=9, seed=3, num_envs=num_envs) == wanted


def test_more_episodes_begin_with_the_same_ones() -> None:
    few = evaluate(Counter(), Counting, episodes=3, seed=3)
    many = evaluate(Counter(), Counting, episodes=9, seed=3)
    assert many.lengths[:3] == few.lengths
    assert evaluate(Counter(), Counting, episodes=9, seed=4) != many


class Listener(Counter):
    """A policy that keeps an account of its episode, and acts by it."""

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {**super().initial_state(batch_size), "earned": torch.zeros(batch_size)}

    def rewarded(self, state, reward):
        return {**state, "earned": state["earned"] + reward}

    def act(self, obs, state, *, explore: bool):
        # Right (one more each time) as long as all that was earned was heard, and once.
        return state["earned"].long(), {**state, "t": state["t"] + 1}


def test_a_policy_that_wants_to_hears_what_it_earned() -> None:
    result = evaluate(Listener(), Counting, episodes=9, seed=3, num_envs=4)
    assert result.returns == tuple(float(n) for n in result.lengths)


@pytest.mark.parametrize(
    ("observations", "actions", "fits"),
    [
        ({"vector": 1}, gym.spaces.Discrete(1000), True),
        ({"vector": 1, "unseen": 7}, gym.spaces.Discrete(1000), True),
        ({"vector": 2}, gym.spaces.Discrete(1000), False),
        ({"position": 1}, gym.spaces.Discrete(1000), False),
        ({"vector": 1}, gym.spaces.Discrete(999), False),
        ({"vector": 1}, gym.spaces.Box(-1, 1, (1,)), False),
    ],
)
def test_another_environment_is_refused(observations, actions, fits: bool) -> None:
    class Other(Counting):
        observation_space = gym.spaces.Dict(
            {key: gym.spaces.Box(-1, 1, (size,)) for key, size in observations.items()}
        )
        action_space = actions

    if fits:
        assert evaluate(Counter(), Other, episodes=2, seed=0) == evaluate(Counter(), Counting, 2, 0)
    else:
        with pytest.raises(UserError, match=r"made for .*\[1000\], but the environment Other has "):
            evaluate(Counter(), Other, episodes=2, seed=0)
    assert Counting.open == 0


@pytest.mark.parametrize(("high", "fits"), [(2 / 3, True), (1.0, False)])
def test_bounds_of_actions_may_be_rounded(high: float, fits: bool) -> None:
    ours, theirs = (ActionSpec("box", low=(-1.0,), high=(b,)) for b in (0.6666667, high))
    assert ours.agrees(theirs) == fits


class Seeker(Counter):
    """Keeps the observations that it gets."""

    goal_key = "goal"

    def act(self, obs, state, *, explore: bool):
        self.seen = obs
        return super().act(obs, state, explore=explore)


def test_a_policy_that_has_a_goal_is_shown_it_where_there_is_one() -> None:
    class Goals(Counting):
        def reset(self, **options):
            obs, info = super().reset(**options)
            return {**obs, "goal": np.full(2, 5.0), "other": np.zeros(1)}, info

        def step(self, action):
            obs, *rest = super().step(action)
            return {**obs, "goal": np.full(2, 5.0), "other": np.zeros(1)}, *rest

    seeker, keys = Seeker(), set(Counter.spec.obs)
    evaluate(seeker, Goals, episodes=3, seed=0)
    assert seeker.seen.keys() == keys | {"goal"}
    assert seeker.seen["goal"][0].tolist() == [5.0, 5.0]
    evaluate(seeker, Counting, episodes=3, seed=0)
    assert seeker.seen.keys() == keys


def test_exploring_is_passed_on() -> None:
    assert evaluate(Counter(), Counting, 5, 0, explore=True).return_mean == 0.0


def test_statistics() -> None:
    result = evaluate(Counter(), Counting, episodes=6, seed=1)
    assert result.return_mean == pytest.approx(sum(result.returns) / 6)
    assert result.return_std == pytest.approx(np.std(result.returns))


def test_the_random_state_and_the_mode_stay_as_they_were() -> None:
    model = Counter().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate(model, Counting, episodes=2, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_environments_are_closed_when_one_fails() -> None:
    class Broken(Counting):
        def step(self, action):
            raise RuntimeError("the motor burns")

    with pytest.raises(UserError, match=r"Broken failed in an evaluation .* the motor burns"):
        evaluate(Counter(), Broken, episodes=2, seed=0)
    assert Counting.open == 0


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"num_envs": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(Counter(), Counting, **{"episodes": 1, "seed": 0, **wrong})


def test_box_actions_arrive_as_arrays() -> None:
    class Arms(Counting):
        action_space = gym.spaces.Box(-1, 1, (2,))

        def step(self, action):
            assert action.shape == (2,)
            assert action.dtype == np.float32
            return super().step(int(action[0] * 0))

    class Still(Counter):
        spec = Spec(SPEC.obs, ActionSpec("box", low=(-1.0, -1.0), high=(1.0, 1.0)))

        def act(self, obs, state, *, explore: bool):
            return torch.zeros(len(state["t"]), 2), state

    assert min(evaluate(Still(), Arms, episodes=3, seed=0).returns) == 1.0
