"""Environments behind a datamodule: replay ratio, batches, budgets, refusals and resuming."""

import io
import os
from fractions import Fraction
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

import zoo
from datamodules.env_datamodule import EnvDataModule
from datamodules.errors import UserError
from datamodules.spec import Spec
from datamodules.store import EpisodeStore

SPACES = {
    "discrete": Discrete(3),
    "box": Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
    "multi_discrete": MultiDiscrete([3, 5, 2]),
}


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Only a power loss could tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class Endless(gym.Env):
    """Shows the time and a random number, with an image if asked; NaN at one time, if asked."""

    made = 0
    frames = 0  # of all of them

    def __init__(self, space="discrete", image=False, nan_at=None, frames_per_step=1):
        Endless.made += 1
        self.number = Endless.made
        self.action_space, self.image, self.nan_at = SPACES[space], image, nan_at
        self.frames_per_step = frames_per_step
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        if image:
            camera = Box(0, 255, (4, 6, 3), np.uint8)
            self.observation_space = Dict({"camera": camera, "state": self.observation_space})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        Endless.frames += self.frames_per_step
        return self.show(), float(self.t), False, False, {}

    def show(self):
        time = np.nan if self.t == self.nan_at else self.t
        state = np.array([time, self.np_random.random()], np.float32)
        camera = np.full((4, 6, 3), self.t, np.uint8)
        return {"camera": camera, "state": state} if self.image else state


class Actor:
    """Random actions by torch's generator; counts its calls."""

    device = torch.device("cpu")

    def __init__(self, spec, replay_context=0):
        self.spec, self.replay_context, self.calls = spec, replay_context, 0

    def initial_state(self, batch_size):
        return {"steps": torch.zeros(batch_size, 1)}

    def act(self, obs, state, *, explore):
        self.calls += 1
        rng = np.random.default_rng(int(torch.randint(1 << 30, ())))
        actions = np.stack([self.spec.action.sample(rng) for _ in state["steps"]])
        return torch.from_numpy(actions), {"steps": state["steps"] + 1}

    def latent_fields(self):
        return {"steps": ((1,), "float32")}

    def latents(self, state):
        return state


@pytest.fixture
def build(tmp_path):
    """Builds datamodules that a trainer would hold; closes them in the end."""
    built = []

    def build(env=Endless, replay_context=0, **options):
        defaults = {
            "num_envs": 2,
            "batch_size": 2,
            "sequence_length": 4,
            "prefill": 8,
            "directory": tmp_path / "replay",
        }
        data = EnvDataModule(env, **{**defaults, **options})
        actor = Actor(data.spec, replay_context)
        data.trainer = SimpleNamespace(
            lightning_module=actor, logger=None, world_size=1, global_rank=0
        )
        built.append(data)
        return data

    yield build
    for data in built:
        data.on_exception(KeyboardInterrupt())


def saved(data):
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(data.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stored(folder):
    """All rows in a folder, by stream and key."""
    with EpisodeStore.open(folder / "rank0", verify=True) as store:
        return {s: dict(store.read(s, *store.bounds(s))) for s in store.stream_ids}


def flat(batch):
    """{"obs": {"image": tensor}} to {"obs/image": tensor}."""
    groups = {key: value for key, value in batch.items() if isinstance(value, dict)}
    single = {key: value for key, value in batch.items() if key not in groups}
    return single | {
        f"{g}/{key}": value for g, group in groups.items() for key, value in group.items()
    }


def assert_same_batch(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


# Updates and steps


@pytest.mark.parametrize(
    "options",
    [
        {"replay_ratio": 8},
        {"replay_ratio": 1, "pretrain": 5, "prefill": 11},
        {"replay_ratio": 0.75, "num_envs": 1, "prefill": 0, "pretrain": 0},
        {"replay_ratio": 40, "num_envs": 3, "prefill": 0},
        {"replay_ratio": 2.5, "replay_context": 2},
        {"replay_ratio": 3, "num_envs": 5, "batch_size": 3, "sequence_length": 7, "pretrain": 2},
    ],
    ids=str,
)
def test_updates_follow_the_steps_of_the_agent_exactly(build, options):
    data = build(**options)
    num_envs, pretrain = data.num_envs, data.pretrain
    replayed = data.batch_size * data.sequence_length
    # Nothing can be sampled before one environment has written a window, one row a round.
    rows = data.sequence_length + options.get("replay_context", 0)
    steps = num_envs * max(rows, -(-data.prefill // num_envs))
    for update in range(40):
        data.next_batch()
        due = Fraction(update + 1 - pretrain) * replayed / Fraction(options["replay_ratio"])
        while steps - data.prefill < due:
            steps += num_envs
        assert data.collector.agent_steps == data.env_steps == steps, update
        assert data.served == update + 1


def test_the_agent_acts_in_blocks_and_no_more_at_its_limit(build):
    """After 8 steps two updates, then 6 steps and three updates at a time, up to 20 steps."""
    data = build(replay_ratio=4, prefill=8, pretrain=2, collect_steps=6, collect_limit=20)
    steps = []
    for _ in range(12):
        data.next_batch()
        steps.append(data.collector.agent_steps)
    assert steps == [8] * 2 + [14] * 3 + [20] * 7


def test_the_model_may_say_how_many_updates_are_due(build):
    """In epochs of its own; batches that are no updates (accumulated ones) do not count."""
    data = build(replay_ratio=4, prefill=8, pretrain=7, collect_steps=6, collect_limit=20)
    model = data.trainer.lightning_module
    model.updates_due = lambda blocks: 1 + 2 * blocks
    steps = []
    for batch in range(14):
        model.updates = batch // 2
        data.next_batch()
        steps.append(data.collector.agent_steps)
    assert steps == [8] * 2 + [14] * 4 + [20] * 8


def test_the_agent_may_collect_in_another_environment(build):
    made = []

    class Watched(Endless):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self.frames_per_step)

    data = build(Watched, collect_kwargs={"frames_per_step": 2})
    data.next_batch()
    assert made == [1, 2, 2]  # the first is for the spec
    data.make_env()
    assert made[3:] == [1]


def test_env_steps_count_frames(build):
    Endless.frames = 0
    data = build(action_repeat=3, env_kwargs={"frames_per_step": 4}, time_limit=5)
    data.next_batch()
    assert data.env_steps == Endless.frames == 12 * data.collector.agent_steps > 0
    data.teardown("fit")
    assert data.env_steps == Endless.frames


def test_env_steps_of_a_checkpoint_count_frames(build):
    data = build(env_kwargs={"frames_per_step": 4})
    data.next_batch()
    fresh = EnvDataModule(Endless, num_envs=2, env_kwargs={"frames_per_step": 4})
    fresh.load_state_dict(saved(data))
    assert fresh.env_steps == data.env_steps


def test_progress_is_told_of_every_round(build):
    data, seen = build(), []
    data.progress = lambda: seen.append(data.env_steps)
    data.next_batch()
    assert seen == [0, 2, 4, 6, 8]


# Batches


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_batches_are_as_the_contract_says(build, space, image):
    env_kwargs = {"space": space, "image": image}
    data = build(env_kwargs=env_kwargs, replay_context=1, time_limit=3, prefill=20)
    batch = data.next_batch()
    shape, dtype = {
        "discrete": ((), torch.int64),
        "box": ((2,), torch.float32),
        "multi_discrete": ((3,), torch.int64),
    }[space]
    expected = {
        "action": (shape, dtype),
        "reward": ((), torch.float32),
        "is_first": ((), torch.bool),
        "is_last": ((), torch.bool),
        "is_terminal": ((), torch.bool),
        "step_id": ((), torch.int64),
        "latents/steps": ((1,), torch.float32),
    }
    if image:
        expected |= {"obs/camera": ((4, 6, 3), torch.uint8), "obs/state": ((2,), torch.float32)}
    else:
        expected["obs/vector"] = ((2,), torch.float32)
    assert flat(batch).keys() == expected.keys()
    for key, value in flat(batch).items():
        assert value.shape == (2, 5, *expected[key][0]), key
        assert value.dtype == expected[key][1], key
    time = batch["obs"]["state" if image else "vector"][..., 0]
    assert torch.equal(batch["is_first"], time == 0)
    assert torch.equal(batch["is_last"], time == 3)
    assert torch.equal(batch["reward"], time)
    assert torch.equal(batch["latents"]["steps"][..., 0], time + 1)
    assert not batch["is_terminal"].any()


def test_written_back_latents_are_served_again(build):
    data = build(replay_ratio=0.1, num_envs=1, prefill=5, pretrain=50, fresh_first=False)
    batch = data.next_batch()
    written = batch["step_id"][..., None].float() + 0.5
    data.write_back(batch["step_id"], {"steps": written})
    known = set(batch["step_id"].flatten().tolist())
    again = data.next_batch()
    for step_id, value in zip(
        again["step_id"].flatten().tolist(), again["latents"]["steps"].flatten(), strict=True
    ):
        assert value == (step_id + 0.5 if step_id in known else step_id + 1)
    assert known & set(again["step_id"].flatten().tolist())


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        (None, None, "windows"),
        ("windows", None, "windows"),
        ("pieces", None, "pieces"),
        ("windows", "pieces", "pieces"),
        ("pieces", "windows", "windows"),
    ],
)
def test_the_model_chooses_the_sampling_unless_it_is_given(build, wanted, given, expected):
    data = build(sampling=given, time_limit=9, prefill=40, replay_context=1, fresh_first=False)
    if wanted:
        data._module = data.trainer.lightning_module
        data._module.replay_sampling = wanted
    batches = [data.next_batch() for _ in range(20)]
    in_pieces = all((batch["is_first"][:, 1]).all() for batch in batches)
    assert in_pieces == (expected == "pieces")


def test_a_model_may_want_recent_episodes(build):
    data = build(prefill=40)
    data.trainer.lightning_module.replay_sampling = "recent"
    data.next_batch()
    assert data.state_dict()["ranks"][0]["replay"]["sampling"] == "recent"


def test_a_model_of_whole_episodes_is_refused(build):
    data = build(prefill=40)
    data.trainer.lightning_module.replay_sampling = "contexts"
    with pytest.raises(UserError, match="use an OfflineDataModule"):
        data.next_batch()


def test_the_replay_says_what_it_holds(build):
    data = build(prefill=40)
    data.next_batch()
    about = data.replay.store.attributes
    assert Spec.from_dict(about["spec"]) == data.spec
    assert about["policy"] == "model"


def test_options_of_pieces_reach_the_sampler(build):
    options = {"sampling": "pieces", "replay_context": 1, "time_limit": 9, "prefill": 40}
    data = build(**options, piece_length=8, prioritize_ends=False, batch_size=1)
    steps = []  # of the same tape
    for _ in range(50):
        batch = data.next_batch()
        steps += zip(batch["is_first"][0, 1:].tolist(), batch["step_id"][0, 1:], strict=True)
    assert data.replay._sampler.prioritize_ends is False
    starts = [i for i, (begins, _) in enumerate(steps) if begins]
    assert {b - a for a, b in pairwise(starts)} == {5, 6, 7, 8}


def test_an_epoch_has_its_length_and_the_next_goes_on(build):
    data = build(updates_per_epoch=3)
    loader = data.train_dataloader()
    assert len(loader) == 3
    assert len(list(loader)) == 3
    assert len(list(data.train_dataloader())) == 3
    assert data.served == 6


@pytest.mark.parametrize(("num_envs", "episodes"), [(1, 5), (2, 4), (3, 3)])
def test_random_episodes_are_collected_once(build, num_envs, episodes):
    data = build(
        policy="random", episodes=episodes, num_envs=num_envs, time_limit=6, prefill=10_000
    )
    batches = [data.next_batch() for _ in range(5)]
    assert data.collector.episodes == episodes
    assert data.env_steps == 6 * episodes
    assert data._module.calls == 0
    for _ in range(200):
        batches.append(data.next_batch())
    assert data.collector.episodes == episodes
    assert data.env_steps == 6 * episodes
    data.teardown("fit")
    with EpisodeStore.open(data.directory / "rank0") as store:
        assert [(e.length, e.complete) for e in store.episodes()] == [(7, True)] * episodes
    actions = torch.cat([batch["action"][~batch["is_last"]] for batch in batches])
    assert actions.unique().tolist() == [0, 1, 2]


def test_random_episodes_that_end_together_all_count(build):
    data = build(policy="random", episodes=3, num_envs=2, time_limit=6)
    data.next_batch()
    assert data.collector.episodes == 4


def test_metrics(build):
    data = build(time_limit=3, prefill=30)
    assert data.metrics() == {}
    data.next_batch()
    expected = {"env/episodes": 10.0, "env/failures": 0.0, "env/return": 6.0, "env/length": 3.0}
    assert data.metrics() == expected


def test_metrics_count_failures(build):
    troubles = [2]

    class Fragile(Endless):
        def step(self, action):
            if troubles and self.t == troubles[0]:
                troubles.pop()
                raise RuntimeError("the wheel came off")
            return super().step(action)

    data = build(Fragile)
    with pytest.warns(UserWarning, match="the wheel came off"):
        data.next_batch()
    assert data.metrics()["env/failures"] == 1.0
    assert data.metrics()["env/length"] == 2.0


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs > 0, got 0"),
        ({"batch_size": -1}, "batch_size > 0, got -1"),
        ({"capacity": 0}, "capacity > 0, got 0"),
        ({"replay_ratio": 0.0}, "replay_ratio > 0, got 0.0"),
        ({"action_repeat": 0}, "action_repeat > 0, got 0"),
        ({"updates_per_epoch": 0}, "updates_per_epoch > 0, got 0"),
        ({"sequence_length": 1}, "sequence_length >= 2, got 1"),
        ({"sampling": "episodes"}, "no sampling 'episodes'.*'windows', 'pieces' or 'recent'"),
        ({"piece_length": 0}, "piece_length >= 1, got 0"),
        ({"collect_steps": 0}, "collect_steps > 0, got 0"),
        ({"prefill": 9, "collect_limit": 8}, "collect_limit 8 must be at least prefill 9"),
        ({"policy": "greedy"}, "no policy 'greedy'.*'model' or 'random'"),
        ({"policy": "random"}, "episodes > 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        EnvDataModule(Endless, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "threads"}, "workers='threads'"),
        ({"capacity": 3}, "capacity 3 .* 4 steps"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_the_start(build, options, message):
    with pytest.raises(UserError, match=message):
        build(**options).next_batch()


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("CartPoole-v1", {}, "unknown environment 'CartPoole-v1'.*CartPole-v1"),
        (Endless, {"time_limit": 0}, "time_limit=0"),
        (Endless, {"size": 8}, "size=8"),
    ],
)
def test_bad_environments_are_refused_by_name(env, options, message):
    with pytest.raises(UserError, match=message):
        _ = EnvDataModule(env, **options).spec


def test_the_replay_of_another_run_is_refused(build):
    first = build()
    first.next_batch()
    first.teardown("fit")
    before = stored(first.directory)
    with pytest.raises(UserError, match=rf"{first.directory}.* earlier run"):
        build().next_batch()
    np.testing.assert_equal(stored(first.directory), before)


# Environments


def test_spec(build):
    data = build(env_kwargs={"space": "box", "image": True}, size=8)
    assert {k: (v.shape, v.dtype) for k, v in data.spec.obs.items()} == {
        "camera": ((8, 8, 3), "uint8"),
        "state": ((2,), "float32"),
    }
    assert data.spec.action.low == (-2.0, 0.0)
    assert data.spec.action.high == (2.0, 1.0)


def test_environments_for_evaluation_are_alike_and_leave_the_collector_alone(build, tmp_path):
    rows = []
    for evaluate in (False, True):
        data = build(directory=tmp_path / str(evaluate), time_limit=3, prefill=12)
        data.next_batch()
        if evaluate:
            env = data.make_env()
            other = data.make_env()
            assert Spec.from_spaces(env.observation_space, env.action_space) == data.spec
            assert env.unwrapped.number != other.unwrapped.number
            env.reset(seed=0)
            overs = [env.step(0)[3] for _ in range(3)]
            assert overs == [False, False, True]
        for _ in range(4):
            data.next_batch()
        data.teardown("fit")
        rows.append(stored(data.directory))
    np.testing.assert_equal(rows[0], rows[1])


# Resuming


@pytest.mark.parametrize("sampling", ["windows", "pieces", "recent"])
def test_resuming_goes_on_exactly(build, tmp_path, sampling):
    options = {"time_limit": 5, "replay_ratio": 4, "directory": tmp_path / "run"}
    options |= {"sampling": sampling, "piece_length": 6, "replay_context": 1}
    torch.manual_seed(1)
    data = build(**options)
    for _ in range(6):
        batch = data.next_batch()
    data.write_back(batch["step_id"], {"steps": batch["latents"]["steps"] + 100})
    state = saved(data)
    expected = [data.next_batch() for _ in range(8)]
    steps, metrics = data.env_steps, data.metrics()
    assert any((batch["latents"]["steps"] > 100).any() for batch in expected)
    data.teardown("fit")
    rows = stored(data.directory)
    torch.manual_seed(2)
    resumed = build(**options)
    resumed.load_state_dict(state)
    assert resumed.env_steps == state["ranks"][0]["collector"]["agent_steps"]
    for batch in expected:
        assert_same_batch(resumed.next_batch(), batch)
    assert (resumed.env_steps, resumed.metrics()) == (steps, metrics)
    resumed.teardown("fit")
    np.testing.assert_equal(stored(resumed.directory), rows)


def test_after_teardown_it_goes_on_where_it_was(build):
    data = build(replay_ratio=4)
    first = [data.next_batch() for _ in range(3)]
    steps = data.env_steps
    data.teardown("fit")
    assert data.env_steps == steps
    assert saved(data)["ranks"][0]["served"] == 3
    data.next_batch()
    assert data.served == 4
    assert data.env_steps == steps + 2
    assert len(first) == 3


def test_another_number_of_processes_is_refused(build):
    data = build()
    data.next_batch()
    state = saved(data)
    state["ranks"] *= 2
    with pytest.raises(UserError, match=r"of 2 processes, this run has 1.*devices=2"):
        build().load_state_dict(state)


def test_a_replay_elsewhere_is_found_but_not_cut_back(build, tmp_path):
    data = build(directory=tmp_path / "old")
    data.next_batch()
    state = saved(data)
    data.teardown("fit")
    moved = build(directory=tmp_path / "new")
    moved.load_state_dict(state)
    moved.next_batch()
    assert moved.served == 2
    assert not (tmp_path / "new").exists()
    moved.teardown("fit")
    before = stored(tmp_path / "old")
    late = build(directory=tmp_path / "new")
    late.load_state_dict(state)
    with pytest.raises(UserError, match="has gone on since the checkpoint"):
        late.next_batch()
    np.testing.assert_equal(stored(tmp_path / "old"), before)


def test_nan_stops_with_its_place_and_keeps_what_was_stored(build, tmp_path):
    made = iter([None, None, 7, None])  # the spec's, then one for each environment
    data = build(lambda: Endless(nan_at=next(made)), num_envs=3, prefill=8, replay_ratio=1)
    message = r"environment 1 \(Endless\) returned NaN or infinity in observation 'vector'"
    served = 0
    with pytest.raises(UserError, match=message) as raised:  # noqa: PT012
        while True:
            data.next_batch()
            served += 1
    assert served > 0
    data.on_exception(raised.value)
    # Step 6 awaited its outcome.
    for stream, rows in stored(data.directory).items():
        np.testing.assert_array_equal(rows["obs/vector"][:, 0], np.arange(6), err_msg=str(stream))
        np.testing.assert_array_equal(rows["reward"], np.arange(6), err_msg=str(stream))


# With a trainer


def fit(directory, data, updates, checkpoint=None):
    torch.manual_seed(0)
    sizes = {"size": "nano", "deter": 16, "hidden": 16, "stoch": 4, "classes": 4, "units": 16}
    model = zoo.create("dreamer-v3", data.spec, **sizes, bins=41, imagine_length=3)
    trainer = pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        default_root_dir=directory,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return trainer, model


def small(directory, **options):
    return EnvDataModule(
        partial(Endless, space="box"),
        num_envs=2,
        batch_size=2,
        sequence_length=4,
        replay_ratio=4,
        prefill=12,
        time_limit=7,
        directory=directory / "replay",
        **options,
    )


def test_a_checkpoint_saved_after_fit_resumes_exactly(tmp_path):
    _, whole = fit(tmp_path, small(tmp_path / "whole"), 6)
    trainer, model = fit(tmp_path, small(tmp_path / "halves"), 3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other = fit(tmp_path, small(tmp_path / "halves"), 6, tmp_path / "half.ckpt")
    assert (model.updates, other.updates, resumed.global_step) == (3, 6, 6)
    assert other.env_steps == whole.env_steps > model.env_steps
    for key, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    np.testing.assert_equal(
        stored(tmp_path / "halves" / "replay"), stored(tmp_path / "whole" / "replay")
    )


def test_nan_in_a_fit_leaves_an_intact_replay(tmp_path):
    data = small(tmp_path, env_kwargs={"nan_at": 6})
    with pytest.raises(UserError, match=r"environment 0 .*'vector'"):
        fit(tmp_path, data, 100)
    for rows in stored(tmp_path / "replay").values():
        np.testing.assert_array_equal(rows["obs/vector"][:, 0], np.arange(5))
