"""The replay: right windows, uniform draws, fresh windows first, latents by id, exact resume."""

import io
import os
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.replay import STREAM_SHIFT, ReplayBuffer
from datamodules.store import EpisodeStore, Field

FIELDS = {
    "obs/vector": Field((2,), "float32"),
    "action": Field((), "int64"),
    "reward": Field((), "float32"),
    "is_first": Field((), "bool"),
}
LATENTS = {"deter": Field((3,), "float32"), "stoch": Field((2,), "int64")}


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Only a power loss could tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def make_step(stream, row):
    return {
        "obs/vector": np.array([stream, row], np.float32),
        "action": np.int64(stream << STREAM_SHIFT | row),
        "reward": np.float32(-row),
        "is_first": np.bool_(row % 7 == 0),
    }


def make_latents(step_ids):
    """Latents that tell their step, (...,) ids to (..., n)."""
    step_ids = np.asarray(step_ids)
    return {
        "deter": (step_ids[..., None] % 1009 + np.arange(3)).astype(np.float32),
        "stoch": step_ids[..., None] + np.arange(2),
    }


def add(replay, stream, count=1, latents=False):
    for _ in range(count):
        row = replay.store.bounds(stream)[1] if stream in replay.store.stream_ids else 0
        given_latents = make_latents(stream << STREAM_SHIFT | row) if latents else None
        replay.add(stream, make_step(stream, row), given_latents)


def make(path, **options):
    defaults = {"capacity": 200, "sequence_length": 5, "seed": 1, "chunk_steps": 16}
    return ReplayBuffer(path, FIELDS, **{"latent_fields": LATENTS, **defaults, **options})


def check_batch(batch, size):
    """All fields of each place belong to its step id, and the ids follow each other."""
    ids = batch["step_id"]
    assert ids.shape == size
    assert ids.dtype == np.int64
    assert (np.diff(ids) == 1).all()
    stream, row = ids >> STREAM_SHIFT, ids & ((1 << STREAM_SHIFT) - 1)
    assert np.array_equal(batch["obs/vector"], np.stack([stream, row], -1).astype(np.float32))
    assert np.array_equal(batch["action"], ids)
    assert np.array_equal(batch["reward"], -row.astype(np.float32))
    assert np.array_equal(batch["is_first"], row % 7 == 0)
    assert all(value.flags.c_contiguous and value.flags.owndata for value in batch.values())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 20),
    chunk=st.integers(1, 24),
    adds=st.lists(
        st.tuples(st.sampled_from([0, 1, 5]), st.integers(1, 60)), min_size=1, max_size=8
    ),
    fresh=st.booleans(),
)
def test_windows_never_mix_steps(tmp_path_factory, length, chunk, adds, fresh):
    replay = make(
        tmp_path_factory.mktemp("replay"),
        sequence_length=length,
        chunk_steps=chunk,
        fresh_first=fresh,
        capacity=240,
    )
    for stream, count in adds:
        add(replay, stream, count, latents=True)
        assert replay.num_steps <= 240
        if replay.can_sample:
            batch = replay.sample(6)
            check_batch(batch, (6, length))
            for key, expected in make_latents(batch["step_id"]).items():
                assert np.array_equal(batch[f"latents/{key}"], expected)
    replay.close()


def test_draws_are_uniform_over_all_windows(tmp_path):
    replay = make(tmp_path, fresh_first=False, capacity=60, chunk_steps=7)
    add(replay, 0, 40)
    add(replay, 3, 4)  # too short for a window
    add(replay, 1, 25)
    bounds = {s: replay.store.bounds(s) for s in (0, 1, 3)}
    assert bounds[0][0] == 14  # two chunks have left
    windows = [s << STREAM_SHIFT | r for s, (a, b) in bounds.items() for r in range(a, b - 4)]
    drawn = replay.sample(200 * len(windows))["step_id"][:, 0]
    found, counts = np.unique(drawn, return_counts=True)
    assert sorted(windows) == found.tolist()  # each window, and nothing else
    chi_square = ((counts - 200) ** 2 / 200).sum()
    freedom = len(windows) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_fresh_windows_come_once_first_and_in_order(tmp_path):
    replay = make(tmp_path)
    add(replay, 0, 7)
    add(replay, 1, 5)
    add(replay, 0, 4)
    stream_1 = 1 << STREAM_SHIFT
    assert replay.sample(2)["step_id"][:, 0].tolist() == [0, stream_1]
    assert replay.sample(4)["step_id"][0, 0] == 5
    add(replay, 0, 4)
    assert replay.sample(1)["step_id"][0, 0] == 10
    before = replay._rng.bit_generator.state
    replay.sample(1)  # nothing fresh is left: a random draw
    assert replay._rng.bit_generator.state != before
    assert replay.num_sampled == 8 * 5


def test_fresh_windows_that_were_evicted_are_not_served(tmp_path):
    replay = make(tmp_path, capacity=40, chunk_steps=4, sequence_length=6)
    add(replay, 0, 100)
    first = replay.store.bounds(0)[0]
    starts = replay.sample(5)["step_id"][:, 0].tolist()
    assert starts == list(range(-(-first // 6) * 6, 100, 6))[:5]


def test_latents_are_written_back_by_id(tmp_path):
    replay = make(tmp_path, capacity=64, chunk_steps=8)
    add(replay, 0, 30)
    add(replay, 2, 30, latents=True)
    batch = replay.sample(12)
    zeros = (batch["step_id"] >> STREAM_SHIFT) == 0
    assert not batch["latents/deter"][zeros].any()
    assert batch["latents/stoch"][~zeros].all()
    ids = batch["step_id"][:, 2:]  # a part of the windows, as with context rows
    replay.write_back(ids, make_latents(ids))
    written = set(ids.ravel().tolist())
    for _ in range(10):
        batch = replay.sample(12)
        known = np.isin(batch["step_id"], list(written)) | (batch["step_id"] >= 2 << STREAM_SHIFT)
        for key, expected in make_latents(batch["step_id"]).items():
            expected = np.where(known[..., None], expected, 0)
            assert np.array_equal(batch[f"latents/{key}"], expected)


def test_latents_of_steps_evicted_meanwhile_are_left_out(tmp_path):
    replay = make(tmp_path, capacity=32, chunk_steps=4)
    add(replay, 0, 20)
    ids = np.arange(20)[None]
    add(replay, 0, 20)
    first = replay.store.bounds(0)[0]
    assert 0 < first < 20
    replay.write_back(ids, make_latents(ids))
    replay.write_back(ids[:, :2], make_latents(ids[:, :2]))
    kept = replay.state_dict()["latents"][0]["stoch"].numpy()
    assert np.array_equal(kept[: 20 - first], make_latents(np.arange(first, 20))["stoch"])
    assert not kept[20 - first :].any()


@pytest.mark.parametrize("saves", [(30,), (30, 60, 61, 95)])
def test_resume_equals_never_stopping(tmp_path, saves):
    def work(replay, first, last, saves=()):
        seen, states = [], {}
        for time in range(first, last):
            add(replay, time % 3, 2, latents=time % 2 == 0)
            if time >= 12 and time % 2:
                batch = replay.sample(3)
                ids = batch["step_id"][:, 1:]
                latents = {key: value + time for key, value in make_latents(ids).items()}
                replay.write_back(ids, latents)
                seen.append(batch)
            if time + 1 in saves:
                states[time + 1] = through_a_file(replay.state_dict())
        return seen, states

    straight = make(tmp_path / "straight", capacity=96, chunk_steps=6)
    expected, _ = work(straight, 0, 120, saves)
    expected_state = straight.state_dict()

    stopped = make(tmp_path / "stopped", capacity=96, chunk_steps=6)
    _, states = work(stopped, 0, 110, saves)
    stopped.close()
    at = saves[-1]
    resumed = make(tmp_path / "stopped", capacity=96, chunk_steps=6, seed=99)
    resumed.load_state_dict(states[at])
    found, _ = work(resumed, at, 120)
    for one, other in zip(expected[-len(found) :], found, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    state = resumed.state_dict()
    assert state.pop("latents").keys() == expected_state["latents"].keys()
    for stream, latents in resumed.state_dict()["latents"].items():
        assert all(torch.equal(v, expected_state["latents"][stream][k]) for k, v in latents.items())
    assert state == {key: value for key, value in expected_state.items() if key != "latents"}


def test_checkpoints_of_late_stay_loadable_and_older_files_go(tmp_path):
    replay = make(tmp_path, capacity=64, chunk_steps=8)
    states = []
    for _ in range(8):
        add(replay, 0, 20)
        states.append(replay.state_dict())
        replay.state_dict()  # a second callback at the same step
        for state in states[-2:]:
            assert all((tmp_path / name).exists() for name in state["chunks"])
    assert not (tmp_path / states[0]["chunks"][0]).exists()
    assert len(list((tmp_path / "chunks").iterdir())) < 16
    replay.close()
    replay = make(tmp_path, capacity=64, chunk_steps=8)
    with pytest.raises(UserError, match="chunk files are gone"):
        replay.load_state_dict(states[0])
    for state in reversed(states[-2:]):
        replay.load_state_dict(state)
        assert replay.num_appended == 20 * (states.index(state) + 1)
        check_batch(replay.sample(8), (8, 5))


def test_without_checkpoints_evicted_files_go_at_once(tmp_path):
    replay = make(tmp_path, capacity=64, chunk_steps=8)
    add(replay, 0, 500)
    assert len(list((tmp_path / "chunks").iterdir())) <= 9
    replay.close()
    assert EpisodeStore.open(tmp_path, verify=True).num_steps == replay.num_steps


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(UserError, match="capacity 4 is smaller than one sequence of 5"):
        make(tmp_path, capacity=4)
    with pytest.raises(UserError, match="sequence_length is 0"):
        make(tmp_path, sequence_length=0)
    replay = make(tmp_path)
    with pytest.raises(UserError, match="holds 0 steps, too few"):
        replay.sample(1)
    add(replay, 0, 4)
    with pytest.raises(UserError, match="holds 4 steps, too few for one sequence of 5"):
        replay.sample(1)
    with pytest.raises(UserError, match=r"latent 'deter' has shape \(2,\), expected \(3,\)"):
        replay.add(0, make_step(0, 4), {"deter": np.zeros(2), "stoch": np.zeros(2)})
    with pytest.raises(UserError, match=r"latents are \['deter', 'stoch'\], but got \['deter'\]"):
        replay.add(0, make_step(0, 4), {"deter": np.zeros(3)})
    assert replay.num_steps == 4
    ids = np.array([[0, 1, 2]])
    with pytest.raises(UserError, match=r"'stoch' has shape \(1, 2, 2\), expected \(1, 3, 2\)"):
        replay.write_back(ids, {"deter": np.zeros((1, 3, 3)), "stoch": np.zeros((1, 2, 2))})
    with pytest.raises(UserError, match=r"step_ids of shape \(3,\) must be \(B, T\)"):
        replay.write_back(ids[0], make_latents(ids[0]))
    with pytest.raises(UserError, match="step 4 of stream 0 does not exist"):
        replay.write_back(ids * 2, make_latents(ids))
    with pytest.raises(UserError, match="step 5 of stream 0 does not exist"):
        replay.write_back(ids + 3, make_latents(ids))
    state = replay.state_dict()
    replay.close()
    with pytest.raises(UserError, match="sequence_length as it was"):
        make(tmp_path, sequence_length=3).load_state_dict(state)
    with pytest.raises(UserError, match="latents are"):
        make(tmp_path, latent_fields={}).load_state_dict(state)
    with pytest.raises(UserError, match="not the one that this position belongs to"):
        make(tmp_path / "other").load_state_dict(state)
    with pytest.raises(UserError, match=r"holds the fields .* are asked for"):
        ReplayBuffer(tmp_path, {"x": Field((), "int64")}, sequence_length=5)


def test_a_capacity_too_small_for_its_streams_is_named(tmp_path):
    replay = make(tmp_path, capacity=32, sequence_length=20)
    for stream in range(4):
        add(replay, stream, 8)
    with pytest.raises(UserError, match="capacity 32 is too small for 4 streams"):
        add(replay, 0)


def test_memory_stays_flat(tmp_path):
    replay = make(tmp_path, capacity=400, chunk_steps=32)
    add(replay, 0, 5)

    def work(count):
        for _ in range(count):
            add(replay, 0, 2, latents=True)
            add(replay, 1, 2)
            batch = replay.sample(4)
            replay.write_back(batch["step_id"], make_latents(batch["step_id"]))

    tracemalloc.start()
    try:
        work(600)
        before, _ = tracemalloc.get_traced_memory()
        work(900)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert before > 20_000  # the latents alone
    assert abs(after - before) < 20_000  # 50 bytes kept for each step would be 180 kB
