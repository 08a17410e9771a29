"""Samplers: tapes of pieces go on and never mix episodes; recent episodes come more often.

The windows are tested with the replay, in test_replay.py.
"""

import io
import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.errors import UserError
from datamodules.replay import STREAM_SHIFT, ReplayBuffer
from datamodules.samplers import PieceSampler, RecentSampler
from datamodules.store import Field

FIELDS = {
    "obs/vector": Field((2,), "float32"),
    "is_first": Field((), "bool"),
    "is_last": Field((), "bool"),
}
LATENTS = {"h": Field((), "int64")}


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Only a power loss could tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def make(path, steps=4, context=1, piece_length=None, prioritize_ends=True, **options):
    """A replay whose sequences have `steps` steps beside the context."""
    sampler = partial(
        PieceSampler, context=context, piece_length=piece_length, prioritize_ends=prioritize_ends
    )
    defaults = {"capacity": 10_000, "seed": 1, "chunk_steps": 16}
    return ReplayBuffer(
        path,
        FIELDS,
        LATENTS,
        sequence_length=steps + context,
        sampler=sampler,
        **defaults | options,
    )


def end_of(replay, stream):
    return replay.store.bounds(stream)[1] if stream in replay.store.stream_ids else 0


def add(replay, stream, length, ended=True, begun=True):
    """Appends an episode, or a part of one."""
    for step in range(length):
        row = {
            "obs/vector": np.array([stream, end_of(replay, stream)], np.float32),
            "is_first": np.bool_(begun and step == 0),
            "is_last": np.bool_(ended and step == length - 1),
        }
        replay.add(stream, row)


def rows_of(batch):
    return batch["step_id"] & ((1 << STREAM_SHIFT) - 1)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Checker:
    """Follows the tape of each row, and knows where the episodes are."""

    def __init__(self, replay, steps, context, piece_length):
        self.replay, self.steps, self.context = replay, steps, context
        self.longest = piece_length or steps
        self.shortest = min(steps, self.longest)
        self.tapes = {}  # of each row: the ids of its piece so far, and the span it was drawn from
        self.pieces = 0

    def episodes_held(self):
        """[first id, end id) of the held part of each episode, and whether it has ended."""
        held = []
        for episode in self.replay.store.episodes():
            first = episode.stream << STREAM_SHIFT | episode.start
            end = first + episode.length
            last = np.zeros(1, bool)
            row = episode.start + episode.length - 1
            self.replay.store.read(episode.stream, row, 1, {"is_last": last})
            later = end_of(self.replay, episode.stream) > row + 1
            held.append((first, end, bool(last[0]) or later))
        return held

    def begin(self, step_id):
        held = self.episodes_held()
        (span,) = (e for e in held if e[0] <= step_id < e[1])
        if any(ended for *_, ended in held):
            assert span[2], "a running episode was drawn although others have ended"
        else:
            assert span[1] - span[0] >= self.shortest
        self.pieces += 1
        return [step_id], span

    def close(self, piece, span, evicted=False):
        assert len(piece) <= self.longest
        whole = span[2] and (piece[0], piece[-1] + 1) == span[:2]
        assert len(piece) >= self.shortest or whole or evicted

    def check(self, batch):
        ids, begins = batch["step_id"], batch["is_first"]
        assert ids.shape == (len(ids), self.context + self.steps)
        stream, row = ids >> STREAM_SHIFT, rows_of(batch)
        assert np.array_equal(batch["obs/vector"], np.stack([stream, row], -1).astype(np.float32))
        for b in range(len(ids)):
            for t in range(self.context, ids.shape[1]):
                step_id, begun = int(ids[b, t]), bool(begins[b, t])
                piece, span = self.tapes.get(b, ([], ()))
                if begun:
                    if piece:
                        first, _ = self.replay.store.bounds(piece[-1] >> STREAM_SHIFT)
                        oldest = max(piece[0], piece[-1] + 1 - self.context)
                        lost = oldest & ((1 << STREAM_SHIFT) - 1) < first
                        self.close(piece, span, evicted=t == self.context and lost)
                    self.tapes[b] = self.begin(step_id)
                else:
                    assert step_id == piece[-1] + 1
                    piece.append(step_id)
                    assert step_id < span[1]
                if t == self.context:
                    start = self.tapes[b][0][0]
                    before = [max(start, step_id - 1 - i) for i in range(self.context)][::-1]
                    assert ids[b, : self.context].tolist() == before
                    assert begins[b, : self.context].tolist() == [i == start for i in before]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 8),
    context=st.integers(0, 2),
    piece_length=st.none() | st.integers(1, 20),
    prioritize_ends=st.booleans(),
    chunk=st.integers(1, 12),
    adds=st.lists(
        st.tuples(st.sampled_from([0, 1, 5]), st.integers(1, 25), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
)
def test_pieces_never_mix_steps(
    tmp_path_factory, steps, context, piece_length, prioritize_ends, chunk, adds
):
    options = {"steps": steps, "context": context, "piece_length": piece_length}
    replay = make(
        tmp_path_factory.mktemp("replay"),
        **options,
        prioritize_ends=prioritize_ends,
        chunk_steps=chunk,
        capacity=120,
    )
    checker = Checker(replay, **options)
    for stream, length, ended, begun in adds:
        add(replay, stream, length, ended, begun)
        assert replay._sampler._starts == replay._sampler._find_starts()
        held = checker.episodes_held()
        enough = any(ended or end - first >= checker.shortest for first, end, ended in held)
        assert replay.can_sample == enough
        for _ in range(3 if enough else 0):
            checker.check(replay.sample(3))
    replay.close()


def test_a_tape_goes_on_in_the_next_batch(tmp_path):
    options = {"steps": 4, "context": 1, "piece_length": 30}
    replay = make(tmp_path, **options)
    for length in (100, 23, 1, 64):
        add(replay, 0, length)
    checker, carried, last = Checker(replay, **options), 0, None
    for _ in range(200):
        batch = replay.sample(3)
        checker.check(batch)
        goes_on = ~batch["is_first"][:, 1]
        if last is not None:
            assert np.array_equal(batch["step_id"][goes_on, 0], last[goes_on])
            assert np.array_equal(batch["step_id"][goes_on, 1], last[goes_on] + 1)
            carried += goes_on.sum()
        last = batch["step_id"][:, -1]
    assert carried > 300
    assert 600 * 4 / checker.pieces < 30


def test_is_first_is_set_in_the_batch_only(tmp_path):
    replay = make(tmp_path, steps=4)
    add(replay, 0, 40)
    for _ in range(20):
        flags = replay.sample(5)["is_first"]
        assert flags[:, :2].all()  # with its length as piece length, each sequence is one piece
        assert not flags[:, 2:].any()
    stored = replay.store.read(0, 0, 40)["is_first"]
    assert stored.tolist() == [True] + [False] * 39


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_context_holds_the_latents_written_back(tmp_path, batch_size):
    replay = make(tmp_path, piece_length=11)
    for stream, length in [(0, 50), (1, 3), (1, 70), (0, 8)]:
        add(replay, stream, length)
    latest = {}
    last = None
    compared = 0
    for update in range(100):
        batch = replay.sample(batch_size)
        for step_id, value in zip(batch["step_id"][:, 0], batch["latents/h"][:, 0], strict=True):
            assert value == latest.get(int(step_id), 0)
        if last is not None and batch_size == 1 and not batch["is_first"][0, 1]:
            assert batch["latents/h"][0, 0] == last
            compared += 1
        ids = batch["step_id"][:, 1:]
        written = update * 1000 + np.arange(ids.size).reshape(ids.shape) + 1
        replay.write_back(ids, {"h": written})
        latest |= dict(zip(ids.ravel().tolist(), written.ravel().tolist(), strict=True))
        last = written[0, -1]
    assert compared > 20 or batch_size > 1


def frequencies(replay, draws):
    """How often each row of stream 0 was the first of a piece."""
    batch = replay.sample(draws)
    return np.bincount(rows_of(batch)[:, 1], minlength=end_of(replay, 0)) / draws


def test_starts_are_uniform_without_priority(tmp_path):
    replay = make(tmp_path, steps=4, prioritize_ends=False)
    add(replay, 0, 12)
    expected = np.array([1 / 9] * 9 + [0] * 3)
    np.testing.assert_allclose(frequencies(replay, 8000), expected, atol=0.016)


def test_ends_have_priority(tmp_path):
    replay = make(tmp_path, steps=4)
    add(replay, 0, 12)
    expected = np.array([1 / 13] * 8 + [5 / 13] + [0] * 3)
    np.testing.assert_allclose(frequencies(replay, 8000), expected, atol=0.022)


def test_episodes_are_drawn_uniformly_whatever_their_length(tmp_path):
    replay = make(tmp_path, steps=4, prioritize_ends=False)
    add(replay, 0, 4)
    add(replay, 0, 40)
    add(replay, 3, 9)
    add(replay, 3, 30, ended=False)
    batch = replay.sample(6000)
    stream, row = batch["step_id"][:, 1] >> STREAM_SHIFT, rows_of(batch)[:, 1]
    shares = [(stream == 0) & (row == 0), (stream == 0) & (row >= 4), (stream == 3) & (row < 9)]
    assert [abs(share.mean() - 1 / 3) < 0.03 for share in shares] == [True] * 3


def test_lengths_vary_so_that_rows_fall_out_of_step(tmp_path):
    replay = make(tmp_path, steps=4, context=0, piece_length=9)
    add(replay, 0, 50)
    lengths, run = [], 0
    for _ in range(2000):
        for begins in replay.sample(1)["is_first"][0]:
            if begins and run:
                lengths.append(run)
            run = 1 if begins else run + 1
    found, counts = np.unique(lengths, return_counts=True)
    assert found.tolist() == [6, 7, 8, 9]
    np.testing.assert_allclose(counts / len(lengths), 0.25, atol=0.06)


def test_every_step_of_an_episode_can_be_drawn(tmp_path):
    replay = make(tmp_path, steps=5, piece_length=7)
    for length in (3, 26, 1, 40):
        add(replay, 0, length)
    drawn = {row for _ in range(40) for row in rows_of(replay.sample(20))[:, 1:].ravel().tolist()}
    assert drawn == set(range(70))


def test_running_episodes_serve_until_one_has_ended(tmp_path):
    replay = make(tmp_path, steps=4)
    add(replay, 0, 3, ended=False)
    assert not replay.can_sample
    with pytest.raises(UserError, match="holds 3 steps, too few"):
        replay.sample(1)
    add(replay, 0, 6, ended=False, begun=False)
    assert set(rows_of(replay.sample(50)).ravel().tolist()) == set(range(9))
    add(replay, 1, 2)
    assert (replay.sample(50)["step_id"][:, 1:] >> STREAM_SHIFT == 1).all()


def test_a_row_whose_piece_was_evicted_draws_a_new_one(tmp_path):
    replay = make(tmp_path, steps=4, piece_length=40, capacity=64, chunk_steps=8)
    add(replay, 0, 50)
    replay.sample(6)
    add(replay, 0, 30)
    add(replay, 0, 30)
    first, _ = replay.store.bounds(0)
    assert first == 48  # two steps of the first episode are left
    batch = replay.sample(6)
    assert batch["is_first"][:, 1].all()
    assert (rows_of(batch) >= first).all()


@pytest.mark.parametrize("at", [40, 83])
def test_resume_equals_never_stopping(tmp_path, at):
    def work(replay, first, last):
        seen = []
        for time in range(first, last):
            length = 1 + time * 7 % 20
            add(replay, 2 - time % 3, length, ended=time % 4 != 0, begun=time % 5 != 0)
            if time > 10:
                batch = replay.sample(4)
                replay.write_back(batch["step_id"][:, 1:], {"h": batch["latents/h"][:, 1:] + time})
                seen.append(batch)
        return seen

    options = {"steps": 5, "piece_length": 13, "capacity": 200, "chunk_steps": 9}
    straight = make(tmp_path / "straight", **options)
    work(straight, 0, at)
    expected = work(straight, at, 120)
    stopped = make(tmp_path / "stopped", **options)
    work(stopped, 0, at)
    state = through_a_file(stopped.state_dict())
    work(stopped, at, at + 10)
    stopped.close()
    resumed = make(tmp_path / "stopped", **options, seed=99)
    resumed.load_state_dict(state)
    for one, other in zip(expected, work(resumed, at, 120), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert resumed.state_dict()["sampler"] == straight.state_dict()["sampler"]


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(UserError, match=r"context is 5: it must be in 0 \.\. 4"):
        make(tmp_path / "a", steps=0, context=5)
    with pytest.raises(UserError, match="piece_length is 0"):
        make(tmp_path / "b", piece_length=0)
    fields = {"is_first": FIELDS["is_first"]}
    with pytest.raises(UserError, match=r"lacks the fields \['is_last'\]"):
        ReplayBuffer(tmp_path / "c", fields, sequence_length=5, sampler=PieceSampler)
    replay = make(tmp_path / "d")
    add(replay, 0, 9)
    state = replay.state_dict()
    replay.close()
    windows = ReplayBuffer(tmp_path / "d", FIELDS, LATENTS, sequence_length=5)
    with pytest.raises(UserError, match=r"samples pieces and the replay windows: .*'pieces'"):
        windows.load_state_dict(state)


# Recent episodes


def recent(path, length=4, **options):
    """A replay of sequences of recent episodes."""
    sampler = partial(RecentSampler, **options)
    return ReplayBuffer(
        path, FIELDS, capacity=10_000, sequence_length=length, seed=1, chunk_steps=16,
        sampler=sampler,
    )  # fmt: skip


def test_the_newest_quarter_has_its_share(tmp_path):
    """Of 9 episodes the parts are 2, 2, 2 and 3; they were played in two streams in turn."""
    replay = recent(tmp_path, length=1, lead=0)
    lengths = [3, 8, 5, 4, 7, 9, 6, 2, 4]
    for index, length in enumerate(lengths):
        add(replay, index % 2, length)
    # In the order in which they began, by their rows.
    begins = [sum(lengths[index % 2 : index : 2]) for index in range(9)]
    order = sorted(range(9), key=lambda i: (begins[i], i % 2))
    ids = replay.sample(40_000)["step_id"][:, 0]
    shares = []
    for index in order:
        first = (index % 2 << STREAM_SHIFT) + begins[index]
        inside = (ids >= first) & (ids < first + lengths[index])
        shares.append(inside.mean())
        counts = np.bincount(ids[inside] - first, minlength=lengths[index])
        assert counts.min() > 0.7 * counts.mean()  # of an episode all steps are alike
    wanted = [0.05] * 6 + [0.7 / 3] * 3
    assert shares == pytest.approx(wanted, abs=0.01)


def test_with_few_episodes_lengths_decide(tmp_path):
    replay = recent(tmp_path, length=1, lead=0)
    for length in (30, 3, 7):
        add(replay, 0, length)
    rows = rows_of(replay.sample(9000))
    shares = [(rows < 30).mean(), ((rows >= 30) & (rows < 33)).mean(), (rows >= 33).mean()]
    assert shares == pytest.approx([0.75, 0.075, 0.175], abs=0.02)


def test_short_windows_reach_the_newest_rows(tmp_path):
    """Of sequences of 19 rows a model reads 6, which may begin where 19 would not fit."""
    replay = recent(tmp_path, length=19)
    for _ in range(5):
        add(replay, 0, 10)
    short = rows_of(replay.sample(4000, steps=6))
    assert short.shape == (4000, 6)
    assert short.max() == 49
    # The last two episodes are the newest part; of the 14 first rows of the last, 10 are in it.
    newest = (short[:, 0] >= 40).mean()
    assert newest == pytest.approx(0.35 * 10 / 14, abs=0.03)
    counts = np.bincount(short[:, 0], minlength=50)
    assert counts[45:].sum() == 0  # all are whole
    whole = rows_of(replay.sample(400))
    assert whole.shape == (400, 19)
    assert whole[:, 0].max() == 31


def test_new_rows_are_drawn_at_once(tmp_path):
    replay = recent(tmp_path, length=2, lead=0)
    for length in (4, 3, 5):
        add(replay, 0, length)
        assert rows_of(replay.sample(200)).max() == end_of(replay, 0) - 1


def test_windows_begin_up_to_a_history_before_the_episode(tmp_path):
    replay = recent(tmp_path, length=4, weights=(0.0, 1.0), lead=2)
    add(replay, 0, 10)
    add(replay, 0, 6, ended=False)
    starts = rows_of(replay.sample(500))[:, 0]
    assert set(starts.tolist()) == {8, 9, 10, 11, 12}  # the last window is the last that is whole
    batch = replay.sample(50)
    assert (batch["is_first"] == (rows_of(batch) == 10)).all()


def test_recent_episodes_after_eviction_and_resuming(tmp_path):
    def fill(replay, episodes):
        for _ in range(episodes):
            add(replay, 0, 7)

    sampler = RecentSampler
    options = {"capacity": 60, "sequence_length": 3, "chunk_steps": 8, "sampler": sampler}
    replay = ReplayBuffer(tmp_path, FIELDS, seed=1, **options)
    fill(replay, 30)
    first, end = replay.store.bounds(0)
    rows = rows_of(replay.sample(400))
    assert first == rows.min()
    assert rows.max() == end - 1
    state = through_a_file(replay.state_dict())
    expected = replay.sample(20)
    fill(replay, 1)
    replay.close()
    resumed = ReplayBuffer(tmp_path, FIELDS, seed=5, **options)
    resumed.load_state_dict(state)
    found = resumed.sample(20)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_wrong_weights_are_named(tmp_path):
    for index, weights in enumerate([(), (0.5, 0.6), (-0.5, 1.5)]):
        with pytest.raises(UserError, match="must be at least 0 and have the sum 1"):
            recent(tmp_path / str(index), weights=weights)
    with pytest.raises(UserError, match="lacks the field is_first"):
        ReplayBuffer(
            tmp_path / "flagless", {"x": Field((), "bool")}, sequence_length=2,
            sampler=RecentSampler,
        )  # fmt: skip
