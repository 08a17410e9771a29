"""The collector: the time-step contract, failing environments, lost lives and exact resuming."""

import io
import os
import sys
from functools import partial

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from datamodules.collector import Collector, FinishedEpisode, RandomPolicy, restart_rows
from datamodules.errors import UserError
from datamodules.replay import ReplayBuffer
from datamodules.store import Field
from datamodules.workers import EnvPool

# The tests' own classes are not importable in a worker.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPACES = {
    "discrete": Discrete(4),
    "box": Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
    "multi_discrete": MultiDiscrete([3, 5, 2]),
}
LATENTS = {"memory": Field((2,), "float32")}


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Only a power loss could tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class Show(gym.Env):
    """Shows the time, a random number and the last action, and pays for time and action.

    `resets` takes down the seeds it was given; `troubles` are met one after the other: "reset"
    fails the next reset ("go on" the next after a lost life), a number the step at that time.
    """

    def __init__(self, length=5, space="discrete", terminates=True, resets=None, troubles=None):
        self.action_space = SPACES[space]
        self.size = int(np.prod(self.action_space.shape))
        self.observation_space = Box(-np.inf, np.inf, (2 + self.size,), np.float32)
        self.length, self.terminates = length, terminates
        self.resets = [] if resets is None else resets
        self.troubles = [] if troubles is None else troubles

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append(seed)
        self._meet("reset", "it does not start")
        self.t = 0
        return self.show(np.zeros(self.size)), {}

    def step(self, action):
        self._meet(self.t, "the wheel came off")
        self.t += 1
        over = self.t >= self.length
        ends = (over and self.terminates, over and not self.terminates)
        return self.show(action), 10.0 * self.t + np.sum(action), *ends, {}

    def show(self, action):
        return np.array([self.t, self.np_random.random(), *np.ravel(action)], np.float32)

    def _meet(self, trouble, message):
        if self.troubles and self.troubles[0] == trouble:
            self.troubles.pop(0)
            raise RuntimeError(message)


class Lives(Show):
    """A game of three lives; each ends after `length` steps, and a reset without a seed goes on."""

    def reset(self, *, seed=None, options=None):
        if seed is None and self.resumable:
            self.resets.append(None)
            self._meet("go on", "the game is gone")
            self.resumable = False
            return self.show(np.zeros(self.size)), {}
        self.lives, self.resumable = 3, False
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *_ = super().step(action)
        lost = self.t % self.length == 0
        self.lives -= lost
        self.resumable = lost and self.lives > 0
        return obs, reward, lost, False, {"life_lost": self.resumable}


class Noisy(Show):
    """Ignores its seed, either in what it shows or in what it pays."""

    calls = 0

    def __init__(self, noise="obs", **options):
        super().__init__(**options)
        self.noise = noise

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if self.noise == "obs":
            Noisy.calls += 1
            obs[1] = Noisy.calls
        return obs, info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        Noisy.calls += 1
        return obs, reward + Noisy.calls * (self.noise == "reward"), *rest


class NoisyLives(Lives):
    """A game that never shows the same random number again."""

    def show(self, action):
        Noisy.calls += 1
        return np.array([self.t, Noisy.calls, *np.ravel(action)], np.float32)


class Exits(Show):
    """Its process dies of action 3."""

    def step(self, action):
        if action == 3:
            os._exit(7)
        return super().step(action)


class Planned:
    """Gives the actions it was told, one row a round."""

    def __init__(self, rounds):
        self.rounds = iter(rounds)

    def initial_state(self, batch_size):
        return {}

    def act(self, obs, state, *, explore):
        return torch.tensor(next(self.rounds)), state


class Memory:
    """Acts on a decaying memory of the random number and the time, which it also stores."""

    def initial_state(self, batch_size):
        return {"memory": torch.full((batch_size, 2), 0.25)}

    def act(self, obs, state, *, explore):
        assert explore
        memory = 0.5 * state["memory"] + obs["vector"][:, :2]
        return (memory.sum(1) * 1000).long() % 4, {"memory": memory}

    def latents(self, state):
        return state


class Reflex:
    """Acts on what it sees."""

    def initial_state(self, batch_size):
        return {}

    def act(self, obs, state, *, explore):
        return (obs["vector"].sum(1) * 1000).long() % 4, state


@pytest.fixture
def build(tmp_path):
    """Builds collectors; closes them in the end."""
    built = []

    def build(env_fns, actor=None, folder="replay", seed=0, rank=0, workers="sync"):
        pool = EnvPool(env_fns, workers=workers)
        fields = {f"obs/{key}": Field(a.shape, a.dtype) for key, a in pool.spec.obs.items()}
        fields["action"] = Field(pool.spec.action.shape, pool.spec.action.dtype)
        fields["reward"] = Field((), "float32")
        fields |= {key: Field((), "bool") for key in ("is_first", "is_last", "is_terminal")}
        replay = ReplayBuffer(
            tmp_path / folder,
            fields,
            latent_fields=LATENTS if hasattr(actor, "latents") else {},
            sequence_length=3,
        )
        built.append(Collector(pool, pool.spec, replay, seed, rank))
        return built[-1]

    yield build
    for collector in built:
        close(collector)


def close(collector):
    collector.pool.close()
    collector.replay.close()


def run(collector, actor, rounds):
    for _ in range(rounds):
        collector.advance(actor)


def random_policy(collector, seed=0):
    return RandomPolicy(collector.spec, np.random.default_rng(seed))


def stored(collector, stream):
    """All rows of a stream by key."""
    if stream not in collector.replay.store.stream_ids:
        return {"is_first": np.zeros(0, bool)}
    first, end = collector.replay.store.bounds(stream)
    return collector.replay.store.read(stream, first, end - first)


def episodes(collector, stream):
    """The rows of each episode by key."""
    rows = stored(collector, stream)
    starts = np.flatnonzero(rows["is_first"]).tolist()
    bounds = zip(starts, [*starts[1:], len(rows["is_first"])], strict=True)
    return [{key: value[a:b] for key, value in rows.items()} for a, b in bounds]


def assert_same_rows(rows, others):
    assert rows.keys() == others.keys()
    for key, value in rows.items():
        np.testing.assert_array_equal(value, others[key], err_msg=key)


def assert_truncated(episode, length):
    """It has n + 1 steps for n actions, and its recording ended there without the task."""
    np.testing.assert_array_equal(episode["obs/vector"][:, 0], np.arange(length + 1))
    np.testing.assert_array_equal(episode["is_last"], np.arange(length + 1) == length)
    assert not episode["is_terminal"].any()
    assert not episode["action"][-1].any()


# The time step


@pytest.mark.parametrize("terminates", [True, False], ids=["terminated", "truncated"])
@pytest.mark.parametrize("space", SPACES)
def test_a_step_holds_what_arrived_and_the_action_chosen_there(build, space, terminates):
    lengths = (3, 5)
    collector = build([partial(Show, n, space, terminates) for n in lengths])
    run(collector, random_policy(collector), 20)
    # A reset and n steps are n + 1 rounds; the last step of a running episode is not stored yet.
    assert [len(stored(collector, s)["reward"]) for s in (0, 1)] == [20, 19]
    assert collector.agent_steps == 15 + 16
    assert collector.episodes == len(collector.finished) == 5 + 3
    for stream, length in enumerate(lengths):
        complete = [e for e in episodes(collector, stream) if e["is_last"].any()]
        assert len(complete) == 20 // (length + 1)
        for episode in complete:
            steps = np.arange(length + 1)
            vector = episode["obs/vector"]
            action = episode["action"].reshape(length + 1, -1)
            np.testing.assert_array_equal(vector[:, 0], steps)
            np.testing.assert_array_equal(episode["is_first"], steps == 0)
            np.testing.assert_array_equal(episode["is_last"], steps == length)
            np.testing.assert_array_equal(
                episode["is_terminal"], (steps == length) & np.bool_(terminates)
            )
            np.testing.assert_array_equal(vector[1:, 2:], action[:-1])
            assert not action[-1].any()
            assert episode["reward"][0] == 0
            earned = 10 * steps[1:] + action[:-1].sum(1, dtype=np.float64)
            np.testing.assert_allclose(episode["reward"][1:], earned, rtol=1e-6)
        assert len({float(e["obs/vector"][0, 1]) for e in complete}) == len(complete)
        assert any(e["action"][:-1].any() for e in complete)


def test_finished_episodes_tell_return_length_and_time(build):
    collector = build([partial(Show, 3), partial(Show, 5)])
    run(collector, Planned([[1, 2]] * 10), 10)
    assert list(collector.finished) == [
        FinishedEpisode(60.0 + 3, 3, 6),
        FinishedEpisode(150.0 + 10, 5, 9),
        FinishedEpisode(60.0 + 3, 3, 12),
    ]


class Accountant(Memory):
    """Stores the sum of what it heard that it earned in the episode."""

    def rewarded(self, state, reward):
        return {"memory": state["memory"] + reward[:, None]}

    def act(self, obs, state, *, explore):
        return obs["vector"][:, 0].long() % 4, state


def test_an_actor_that_wants_to_hears_what_it_earned(build):
    actor = Accountant()
    collector = build([partial(Show, 4), partial(Show, 7)], actor)
    run(collector, actor, 30)
    batch = collector.replay.sample(64)
    account, first = batch["latents/memory"][..., 0], batch["is_first"]
    assert first.any()
    assert (account[first] == 0.25).all()
    heard = np.where(first[:, 1:], 0.25, account[:, :-1] + batch["reward"][:, 1:])
    np.testing.assert_allclose(account[:, 1:], heard)


def test_latents_belong_to_their_step(build):
    actor = Memory()
    collector = build([partial(Show, 4), partial(Show, 7, troubles=[2, 5])], actor)
    with pytest.warns(UserWarning, match="the wheel came off"):
        run(collector, actor, 30)
    batch = collector.replay.sample(64)
    memory, seen = batch["latents/memory"], batch["obs/vector"][..., :2]
    np.testing.assert_array_equal(
        memory[:, 1:],
        np.where(batch["is_first"][:, 1:, None], 0.125, 0.5 * memory[:, :-1]).astype(np.float32)
        + seen[:, 1:],
    )
    acted = np.where(batch["is_last"], 0, (torch.from_numpy(memory).sum(2) * 1000).long() % 4)
    np.testing.assert_array_equal(batch["action"], acted)
    assert batch["is_last"].any()
    assert batch["is_first"][:, 1:].any()


# Seeds


def seeds_of(build, **options):
    """The seeds of each environment's episodes."""
    logs = [[], []]
    collector = build([partial(Show, 2, resets=log) for log in logs], **options)
    run(collector, Reflex(), 13)
    return logs


def test_no_two_episodes_environments_or_ranks_share_a_seed(build):
    seeds = (
        seeds_of(build) + seeds_of(build, folder="1", rank=1) + seeds_of(build, folder="2", seed=1)
    )
    assert [len(log) for log in seeds] == [5] * 6
    assert len({seed for log in seeds for seed in log}) == 30
    assert seeds_of(build, folder="again") == seeds[:2]


# Failures


def test_a_failed_step_truncates_its_episode_and_no_other(build):
    seeds, troubles = [], [3]
    healthy = build([Show, partial(Show, 4)], folder="healthy")
    run(healthy, random_policy(healthy), 12)
    collector = build([partial(Show, resets=seeds, troubles=troubles), partial(Show, 4)])
    with pytest.warns(UserWarning, match=r"environment 0 .*RuntimeError: the wheel came off"):
        run(collector, random_policy(collector), 12)
    assert collector.failures == 1
    failed, following, *_ = episodes(collector, 0)
    assert_truncated(failed, 3)
    before = episodes(healthy, 0)[0]
    assert_same_rows(
        {key: value[:3] for key, value in failed.items()},
        {key: value[:3] for key, value in before.items()},
    )
    np.testing.assert_array_equal(following["obs/vector"][:, 0], np.arange(6))
    np.testing.assert_array_equal(following["is_last"], np.arange(6) == 5)
    assert following["reward"][0] == 0
    assert len(set(seeds)) == len(seeds) == 3
    assert collector.finished[0] == FinishedEpisode(failed["reward"].sum(), 3, 7 - 1)
    assert_same_rows(stored(collector, 1), stored(healthy, 1))


def test_a_failed_reset_is_tried_with_another_seed(build):
    seeds = []
    collector = build([Show, partial(Show, 2, resets=seeds, troubles=["reset", 1, "reset"])])
    with pytest.warns(UserWarning, match="it does not start"):
        run(collector, random_policy(collector), 12)
    assert collector.failures == 3
    assert_truncated(episodes(collector, 1)[0], 1)
    assert all(e["is_terminal"][-1] and len(e["reward"]) == 3 for e in episodes(collector, 1)[1:4])
    assert len(set(seeds)) == len(seeds)
    assert collector.episodes == 2 + 4


def test_a_dead_worker_truncates_its_episode_and_no_other(build):
    collector = build([Exits, Exits], workers="async")
    plan = [[0, 1], [1, 2], [2, 3], [1, 0], [2, 2], [1, 1]]
    with pytest.warns(UserWarning, match=r"environment 1 .*exited with code 7"):
        run(collector, Planned(plan), 6)
    assert collector.failures == 1
    np.testing.assert_array_equal(stored(collector, 0)["obs/vector"][:, 0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(stored(collector, 0)["action"], [0, 1, 2, 1, 2, 0])
    failed, following = episodes(collector, 1)
    assert_truncated(failed, 2)
    np.testing.assert_array_equal(failed["action"], [1, 2, 0])
    np.testing.assert_array_equal(following["action"], [0, 2])
    np.testing.assert_array_equal(following["obs/vector"][:, 2], [0, 0])


@pytest.mark.parametrize(
    ("troubles", "length", "message"),
    [
        (["reset"] * 3, None, "it does not start"),
        ([3, "reset", "reset"], 3, "it does not start"),
        ([2, 0, 0], 2, "the wheel came off"),
    ],
)
@pytest.mark.filterwarnings("ignore:environment 1 failed")
def test_three_failures_in_a_row_stop_with_the_environments_message(
    build, troubles, length, message
):
    collector = build([Show, partial(Show, troubles=list(troubles))])
    with pytest.raises(UserError, match=rf"environment 1 failed 3 times in a row.*{message}"):
        run(collector, random_policy(collector), 12)
    assert collector.failures == 3
    if length is not None:
        assert_truncated(episodes(collector, 1)[0], length)


@pytest.mark.filterwarnings("ignore:environment")
def test_a_success_in_between_and_other_environments_do_not_count(build):
    collector = build(
        [
            partial(Show, troubles=[0, 0, 1, 0, 1, 0, 1]),
            partial(Show, troubles=[0, 0]),
        ]
    )
    run(collector, random_policy(collector), 20)
    assert collector.failures == 9
    assert [not c.troubles for c in (s._env.unwrapped for s in collector.pool._slots)] == [True] * 2


# Lost lives


def test_the_game_goes_on_after_a_lost_life(build):
    seeds = []
    collector = build([partial(Lives, 2, resets=seeds)])
    run(collector, random_policy(collector), 18)
    assert [seed is None for seed in seeds] == [False, True, True] * 2
    assert seeds[0] != seeds[3]
    lives = episodes(collector, 0)
    times = [[0, 1, 2], [2, 3, 4], [4, 5, 6]] * 2
    assert [e["obs/vector"][:, 0].tolist() for e in lives] == times
    for episode in lives:
        assert episode["is_first"].tolist() == [True, False, False]
        assert episode["is_last"].tolist() == [False, False, True]
        assert episode["is_terminal"].tolist() == [False, False, True]
        assert episode["reward"][0] == 0
        assert episode["action"][-1] == 0
    assert collector.finished[1].return_ == lives[1]["reward"].sum()


def test_a_failure_after_a_lost_life_starts_a_new_game(build):
    seeds = []
    collector = build([partial(Lives, 2, resets=seeds, troubles=[3])])
    with pytest.warns(UserWarning, match="the wheel came off"):
        run(collector, random_policy(collector), 9)
    assert [seed is None for seed in seeds] == [False, True, False, True]
    times = [e["obs/vector"][:, 0].tolist() for e in episodes(collector, 0)]
    assert times == [[0, 1, 2], [2, 3], [0, 1, 2]]
    assert episodes(collector, 0)[1]["is_last"].tolist() == [False, True]
    assert not episodes(collector, 0)[1]["is_terminal"].any()


def test_a_failure_to_go_on_starts_a_new_game(build):
    seeds = []
    collector = build([partial(Lives, 2, resets=seeds, troubles=["go on"])])
    with pytest.warns(UserWarning, match="the game is gone"):
        run(collector, random_policy(collector), 6)
    assert [seed is None for seed in seeds] == [False, True, False]
    assert [e["obs/vector"][:, 0].tolist() for e in episodes(collector, 0)] == [[0, 1, 2]] * 2
    assert collector.episodes == 2


# Resuming


def saved(collector):
    """The state of a collector and its replay, as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save([collector.state_dict(), collector.replay.state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restore(collector, state):
    collector.replay.load_state_dict(state[1])
    collector.load_state_dict(state[0])


def assert_same(a, b, path="state"):
    """Two nested structures are equal, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key, value in a.items():
            assert_same(value, b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


WORLDS = {
    "episodes": lambda: [partial(Show, 3), partial(Show, 6, terminates=False)],
    "lives": lambda: [partial(Lives, 2), partial(Lives, 3)],
    "failures": lambda: [partial(Show, 4, troubles=TROUBLES), partial(Lives, 2)],
}
TROUBLES: list = []


@pytest.mark.parametrize("actor", [Memory(), Reflex()], ids=["memory", "reflex"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.filterwarnings("ignore:environment 0 failed")
def test_resuming_at_any_step_goes_on_exactly(build, world, actor, recwarn):
    rounds = 24
    TROUBLES[:] = [2, "reset", 1] if world == "failures" else []
    collector = build(WORLDS[world](), actor)
    collector.advance(actor)
    states = [saved(collector)]
    for _ in range(rounds):
        collector.advance(actor)
        states.append(saved(collector))
    failed_until = max(k for k, s in enumerate(states) if s[0]["failures"] < 3) + 1
    rows = [stored(collector, s) for s in (0, 1)]
    sample = collector.replay.sample(16)
    close(collector)
    recwarn.clear()
    # Backwards, for the store can only go back to what it still knows.
    first = failed_until if world == "failures" else 0
    assert first < rounds
    for done in range(rounds, first - 1, -1):
        resumed = build(WORLDS[world](), actor)
        restore(resumed, states[done])
        run(resumed, actor, rounds - done)
        assert_same(saved(resumed)[0], states[rounds][0])
        for stream in (0, 1):
            assert_same_rows(stored(resumed, stream), rows[stream])
        assert_same_rows(resumed.replay.sample(16), sample)
        close(resumed)
    assert not recwarn.list


def test_resuming_before_the_first_step(build):
    actor = Memory()
    whole = build([Show, Lives], actor, folder="whole")
    run(whole, actor, 10)
    collector = build([Show, Lives], actor)
    restore(collector, saved(collector))
    run(collector, actor, 10)
    for stream in (0, 1):
        assert_same_rows(stored(collector, stream), stored(whole, stream))


@pytest.mark.parametrize("noise", ["obs", "reward"])
def test_an_environment_that_does_not_repeat_is_truncated_on_resume(build, noise):
    seeds, fns = [], [partial(Noisy, noise), partial(Show, 9)]
    whole = build(fns, folder="whole")
    run(whole, Reflex(), 9)
    collector = build(fns)
    run(collector, Reflex(), 4)
    state = saved(collector)
    close(collector)
    fns[0] = partial(Noisy, noise, resets=seeds)
    resumed = build(fns)
    with pytest.warns(UserWarning, match="environment 0 does not repeat its recorded episode"):
        restore(resumed, state)
    assert_truncated(episodes(resumed, 0)[0], 3)
    assert resumed.episodes == 1
    assert resumed.finished[-1].length == 3
    run(resumed, Reflex(), 5)
    np.testing.assert_array_equal(episodes(resumed, 0)[1]["obs/vector"][:, 0], np.arange(4))
    assert len(set(seeds)) == len(seeds) == 2
    assert resumed.failures == 0
    assert_same_rows(stored(resumed, 1), stored(whole, 1))


def test_between_episodes_nothing_has_to_repeat(build, recwarn):
    collector = build([partial(Noisy, length=3)])
    run(collector, Reflex(), 4)
    state = saved(collector)
    close(collector)
    resumed = build([partial(Noisy, length=3)])
    restore(resumed, state)
    run(resumed, Reflex(), 4)
    assert [len(e["reward"]) for e in episodes(resumed, 0)] == [4, 4]
    assert not recwarn.list


def test_a_game_that_does_not_repeat_begins_anew_after_a_lost_life(build):
    collector = build([partial(NoisyLives, 2)])
    run(collector, Reflex(), 3)  # a life was just lost
    state = saved(collector)
    close(collector)
    seeds = []
    resumed = build([partial(NoisyLives, 2, resets=seeds)])
    with pytest.warns(UserWarning, match="does not repeat"):
        restore(resumed, state)
    run(resumed, Reflex(), 3)
    assert [e["obs/vector"][:, 0].tolist() for e in episodes(resumed, 0)] == [[0, 1, 2]] * 2
    assert None not in seeds
    assert len(set(seeds)) == 2


def test_an_environment_that_fails_on_resume_is_truncated(build):
    collector = build([Show, Show])
    run(collector, Reflex(), 5)
    state = saved(collector)
    close(collector)
    resumed = build([partial(Show, troubles=[2]), Show])
    with pytest.warns(UserWarning, match="environment 0 does not repeat"):
        restore(resumed, state)
    assert_truncated(episodes(resumed, 0)[0], 4)
    run(resumed, Reflex(), 4)
    assert resumed.failures == 0
    assert len(episodes(resumed, 0)) == 2
    assert episodes(resumed, 1)[0]["is_terminal"][5]


@pytest.mark.filterwarnings("ignore:environment 0 failed")
def test_failures_in_a_row_are_counted_across_a_resume(build):
    collector = build([partial(Show, troubles=[2, "reset"])])
    run(collector, Reflex(), 4)
    state = saved(collector)
    close(collector)
    resumed = build([partial(Show, troubles=[0])])
    restore(resumed, state)
    with pytest.raises(UserError, match="environment 0 failed 3 times in a row"):
        resumed.advance(Reflex())


def test_another_number_of_environments_is_refused(build):
    state = build([Show, Show]).state_dict()
    with pytest.raises(UserError, match=r"2 environments, this run 1.*num_envs=2"):
        build([Show], folder="other").load_state_dict(state)


# Policy states


def test_restart_rows():
    class Actor:
        def initial_state(self, batch_size):
            return {
                "a": torch.full((batch_size,), 7),
                "b": torch.arange(6.0).reshape(1, 2, 3).repeat(batch_size, 1, 1),
            }

    actor, state = Actor(), {"a": torch.tensor([1, 2, 3]), "b": torch.full((3, 2, 3), -1.0)}
    first = torch.tensor([True, False, True])
    restarted = restart_rows(state, actor, first)
    assert restarted["a"].tolist() == [7, 2, 7]
    assert restarted["a"].dtype == torch.int64
    assert restarted["b"][:, 1, 2].tolist() == [5.0, -1.0, 5.0]
    assert state["a"].tolist() == [1, 2, 3]
    for key, value in restart_rows(None, actor, first).items():
        assert torch.equal(value, actor.initial_state(3)[key])
    assert restart_rows(state, actor, torch.zeros(3, dtype=torch.bool))["b"].eq(-1).all()


@pytest.mark.parametrize("space", SPACES)
def test_random_actions_fill_the_space(build, space):
    policy = random_policy(build([partial(Show, space=space)]))
    actions, state = policy.act({"vector": torch.zeros(300, 3)}, {}, explore=True)
    assert state == {}
    rows = actions.reshape(300, -1)
    if space == "box":
        assert actions.dtype == torch.float32
        low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
        assert ((rows >= low) & (rows <= high)).all()
        assert (rows.amin(0) < low + 0.2).all()
        assert (rows.amax(0) > high - 0.2).all()
    else:
        assert actions.dtype == torch.int64
        counts = [4] if space == "discrete" else [3, 5, 2]
        assert [sorted(set(column.tolist())) for column in rows.T] == [[*range(n)] for n in counts]
