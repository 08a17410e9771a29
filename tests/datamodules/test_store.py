"""The store against a plain list, against crashes at every system call, and against damage."""

import copy
import errno
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from datamodules.errors import UserError
from datamodules.store import MAX_STREAMS, Episode, EpisodeStore, Field, StoreCorrupted

FIELDS = {
    "obs/image": Field((2, 3, 1), "uint8"),
    "obs/vector": Field((3,), "float32"),
    "action": Field((), "int64"),
    "reward": Field((), "float32"),
    "is_first": Field((), "bool"),
    "is_last": Field((), "bool"),
}
EPISODE = 5


def make_step(stream, row):
    """Every field tells its stream and row."""
    return {
        "obs/image": np.full((2, 3, 1), (31 * stream + row) % 256, np.uint8),
        "obs/vector": np.array([stream, row, -row], np.float32),
        "action": np.int64(stream << 40 | row),
        "reward": np.float32(row + stream / 8),
        "is_first": np.bool_(row % EPISODE == 0),
        "is_last": np.bool_(row % EPISODE == EPISODE - 1),
    }


def append(store, stream, count=1):
    for _ in range(count):
        row = store.bounds(stream)[1] if stream in store.stream_ids else 0
        store.append(stream, make_step(stream, row))


def check_rows(data, stream, start, length):
    steps = [make_step(stream, row) for row in range(start, start + length)]
    for key, values in data.items():
        expected = [step[key] for step in steps]
        assert np.array_equal(values, np.array(expected).reshape(values.shape)), key


def check_all(store):
    """Each row that the store claims to hold is the right one; returns the bounds."""
    bounds = {stream: store.bounds(stream) for stream in store.stream_ids}
    for stream, (first, end) in bounds.items():
        check_rows(store.read(stream, first, end - first), stream, first, end - first)
    assert store.num_steps == sum(end - first for first, end in bounds.values())
    assert store.num_appended == sum(end for _, end in bounds.values())
    return bounds


def files(path):
    """All bytes of a store but for its lock."""
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in sorted(Path(path).rglob("*"))
        if p.is_file() and p.name != "lock"
    }


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """Only a power loss could tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def store(tmp_path):
    with EpisodeStore.create(tmp_path / "store", FIELDS, chunk_steps=4) as store:
        yield store


class StoreMachine(RuleBasedStateMachine):
    """Random operations on a store and on the plain model: per stream a first row and an end."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.number = 0
        self.store = EpisodeStore.create(self.path, FIELDS, chunk_steps=3)
        self.model = {"chunks": [], "ends": {}}
        self.committed = copy.deepcopy(self.model)
        self.saved = []  # (position, model)

    @property
    def path(self):
        return self.root / str(self.number)

    def note_commit(self, model, before):
        if self.store.position() != before:
            self.committed = copy.deepcopy(model)

    @rule(stream=st.sampled_from([0, 1, 7]), count=st.integers(1, 5))
    def append(self, stream, count):
        for _ in range(count):
            before, position = copy.deepcopy(self.model), self.store.position()
            append(self.store, stream)
            self.note_commit(before, position)  # a full chunk commits the rows before this one
            row = self.model["ends"].get(stream, 0)
            chunks = [c for c in self.model["chunks"] if c[0] == stream]
            if chunks and chunks[-1][2] < 3:
                chunks[-1][2] += 1
            else:
                self.model["chunks"].append([stream, row, 1])
            self.model["ends"][stream] = row + 1

    @rule(durable=st.booleans())
    def flush(self, durable):
        self.store.flush(durable)
        self.committed = copy.deepcopy(self.model)
        self.saved.append((self.store.position(), copy.deepcopy(self.model)))

    @precondition(lambda self: self.model["chunks"])
    @rule()
    def evict(self):
        stream, *_ = self.model["chunks"].pop(0)
        assert self.store.evict_oldest() == stream

    @rule()
    def reopen(self):
        self.flush(durable=False)
        self.store.close()
        self.store = EpisodeStore.open(self.path, writable=True, verify=True)

    @rule(garbage=st.binary(max_size=80))
    def crash(self, garbage):
        old = self.path
        self.number += 1
        shutil.copytree(old, self.path)
        with open(self.path / "journal", "ab") as journal:
            journal.write(garbage)
        self.store = EpisodeStore.open(self.path, writable=True, verify=True)
        self.model = copy.deepcopy(self.committed)
        shutil.rmtree(old)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def rewind(self, data):
        index = data.draw(st.integers(0, len(self.saved) - 1))
        position, model = self.saved[index]
        self.store.rewind(position)
        self.model, self.committed = copy.deepcopy(model), copy.deepcopy(model)
        del self.saved[index + 1 :]

    @invariant()
    def same_as_model(self):
        bounds = check_all(self.store)
        expected = {}
        for stream, end in self.model["ends"].items():
            firsts = [first for s, first, _ in self.model["chunks"] if s == stream]
            expected[stream] = (firsts[0] if firsts else end, end)
        assert bounds == expected
        reader = EpisodeStore.open(self.path)
        assert check_all(reader).keys() == self.committed["ends"].keys()
        assert {s: reader.bounds(s)[1] for s in reader.stream_ids} == self.committed["ends"]

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.root)


TestAgainstModel = StoreMachine.TestCase
TestAgainstModel.settings = settings(
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_reads_across_chunks_and_only_the_fields_asked(store):
    append(store, 3, 11)
    check_rows(store.read(3, 2, 8), 3, 2, 8)
    out = {"reward": np.zeros(6, np.float32)}
    assert store.read(3, 5, 6, out) is out
    check_rows(out, 3, 5, 6)
    with pytest.raises(UserError, match=r"rows 5 to 12 of stream 3 .* holds 0 to 11"):
        store.read(3, 5, 7)
    with pytest.raises(UserError, match="no stream 4"):
        store.read(4, 0, 1)


def test_episodes_follow_the_flags(store):
    append(store, 0, 12)
    append(store, 2, 5)
    assert store.episodes() == [
        Episode(0, 0, 5, True),
        Episode(0, 5, 5, True),
        Episode(0, 10, 2, False),
        Episode(2, 0, 5, True),
    ]
    store.evict_oldest()
    assert store.episodes()[0] == Episode(0, 4, 1, False)


def test_without_flags_each_stream_is_one_episode(tmp_path):
    with EpisodeStore.create(tmp_path, {"x": Field((2,), "uint8")}) as store:
        for _ in range(3):
            store.append(1, {"x": np.zeros(2, np.uint8)})
        assert store.episodes() == [Episode(1, 0, 3, True)]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("reward", None, "lacks .'reward'"),
        ("extra", np.float32(0), "unknown .'extra'"),
        ("reward", 1.0, r"'reward' .* float64\[\], .* float32\[\]"),
        ("obs/vector", np.zeros(4, np.float32), r"'obs/vector' .* float32\[4\], .* float32\[3\]"),
        ("action", np.int32(1), r"'action' .* int32\[\], .* int64"),
        ("reward", np.float32("nan"), "NaN in 'reward' at row 3 of stream 1"),
        ("obs/vector", np.array([0, np.inf, 0], np.float32), "infinity in 'obs/vector' at row 3"),
    ],
)
def test_a_wrong_step_is_named_and_nothing_is_stored(store, key, value, words):
    append(store, 1, 3)
    step = {**make_step(1, 3), key: value}
    if value is None:
        del step[key]
    with pytest.raises(UserError, match=words):
        store.append(1, step)
    assert store.bounds(1) == (0, 3)
    append(store, 1)
    check_all(store)


def test_wrong_arguments_are_named(tmp_path, store):
    with pytest.raises(UserError, match=f"stream number {MAX_STREAMS}"):
        store.append(MAX_STREAMS, make_step(0, 0))
    with pytest.raises(UserError, match="chunk_steps is 0"):
        EpisodeStore.create(tmp_path / "new", FIELDS, chunk_steps=0)
    with pytest.raises(UserError, match="at least one field"):
        EpisodeStore.create(tmp_path / "new", {})
    with pytest.raises(UserError, match="field 'x' is object"):
        EpisodeStore.create(tmp_path / "new", {"x": Field((), "object")})
    with pytest.raises(UserError, match="no episode store"):
        EpisodeStore.open(tmp_path / "new")
    with pytest.raises(UserError, match="nothing to evict"):
        store.evict_oldest()
    store.close()
    with pytest.raises(UserError, match="already holds a store"):
        EpisodeStore.create(store.path, FIELDS)


def test_attributes_are_kept_and_cost_nothing_where_there_are_none(tmp_path):
    about = {"env": "Walk", "spec": {"n": [1, 2]}}
    EpisodeStore.create(tmp_path / "a", FIELDS, attributes=about).close()
    EpisodeStore.create(tmp_path / "b", FIELDS).close()
    assert EpisodeStore.open(tmp_path / "a").attributes == about
    assert EpisodeStore.open(tmp_path / "b").attributes == {}
    assert "attributes" not in (tmp_path / "b" / "store.json").read_text()


def test_a_reader_cannot_write(store):
    append(store, 0)
    store.flush()
    reader = EpisodeStore.open(store.path)
    for write in (
        lambda: reader.append(0, make_step(0, 1)),
        lambda: reader.append(9, make_step(9, 0)),
        reader.flush,
        reader.evict_oldest,
        lambda: reader.rewind(store.position()),
    ):
        with pytest.raises(UserError, match="not open for writing"):
            write()


def test_only_one_writer(store):
    with pytest.raises(UserError, match="already open for writing"):
        EpisodeStore.open(store.path, writable=True)

    def other_process(queue):
        os.environ.clear()
        type(store._lock)._held.clear()  # as if it had not been forked
        try:
            EpisodeStore.open(store.path, writable=True)
        except UserError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=other_process, args=(queue,))
    process.start()
    process.join(30)
    assert "by another process" in queue.get()
    store.close()
    EpisodeStore.open(store.path, writable=True).close()


def test_an_abandoned_writer_lets_go_of_the_lock(tmp_path):
    store = EpisodeStore.create(tmp_path, FIELDS)
    append(store, 0, 2)
    del store
    with EpisodeStore.open(tmp_path, writable=True) as store:
        assert store.num_steps == 0


def test_a_reader_follows_the_writer(store):
    append(store, 0, 3)
    reader = EpisodeStore.open(store.path)
    assert reader.num_steps == 0
    store.flush()
    assert reader.num_steps == 0
    reader.refresh()
    assert check_all(reader) == {0: (0, 3)}
    start = store.position()
    append(store, 0, 6)
    store.flush()
    reader.refresh()
    assert check_all(reader) == {0: (0, 9)}
    # The writer goes back and on: the reader must not believe what it saw.
    store.rewind(start)
    store.append(0, {**make_step(0, 3), "reward": np.float32(99)})
    append(store, 0, 7)
    store.flush()
    reader.refresh()
    assert reader.read(0, 3, 1)["reward"] == 99
    late_reader = EpisodeStore.open(store.path)
    store.evict_oldest()
    store.flush()
    store.delete_evicted(store.position())
    assert reader.read(0, 3, 1)["reward"] == 99  # mapped before
    with pytest.raises(UserError, match=r"evicted by the writer .* refresh"):
        late_reader.read(0, 0, 2)
    late_reader.refresh()
    assert late_reader.bounds(0) == (4, 11)


def test_a_reader_checks_rows_again_that_were_written_again(store):
    append(store, 0, 3)
    store.flush()
    start = store.position()
    append(store, 0)
    store.flush()
    reader = EpisodeStore.open(store.path)
    check_all(reader)
    store.rewind(start)
    store.append(0, {**make_step(0, 3), "reward": np.float32(99)})
    store.close()
    path = store.path / "chunks" / "00000000.bin"
    data = bytearray(path.read_bytes())
    data[6 * 4 - 1] ^= 1  # the image of row 3
    path.write_bytes(data)
    reader.refresh()
    with pytest.raises(StoreCorrupted, match="rows 3 to 3 of stream 0"):
        reader.read(0, 0, 4)


def test_rewinding_and_repeating_gives_the_same_bytes(tmp_path):
    def first_half(store):
        append(store, 0, 6)
        append(store, 1, 3)
        store.evict_oldest()
        store.flush()

    def second_half(store):
        append(store, 1, 6)
        append(store, 2, 2)
        store.evict_oldest()
        store.flush()

    with EpisodeStore.create(tmp_path / "straight", FIELDS, 4) as straight:
        first_half(straight)
        second_half(straight)
    with EpisodeStore.create(tmp_path / "detour", FIELDS, 4) as detour:
        first_half(detour)
        position = detour.position()
        append(detour, 0, 20)
        detour.evict_oldest()
        detour.flush(durable=True)
        append(detour, 5, 2)
        detour.rewind(position)
        second_half(detour)
    assert files(tmp_path / "straight") == files(tmp_path / "detour")


def test_rewind_needs_the_evicted_files_and_the_same_history(store, tmp_path):
    append(store, 0, 9)
    store.flush()
    early = store.position()
    store.evict_oldest()
    store.flush()
    late = store.position()
    store.evict_oldest()
    store.flush()
    store.delete_evicted(before=late)
    with pytest.raises(UserError, match=r"00000000\.bin"):
        store.rewind(early)
    assert store.bounds(0) == (8, 9)  # nothing changed
    store.rewind(late)
    assert check_all(store) == {0: (4, 9)}
    with EpisodeStore.create(tmp_path / "other", FIELDS) as other:
        append(other, 1, 9)
        other.flush()
        with pytest.raises(UserError, match="not the one that this position belongs to"):
            other.rewind(late)
        with pytest.raises(UserError, match="not the one that this position belongs to"):
            other.rewind(early)


class Killed(BaseException):
    """The process dies here."""


class Disk:
    """Counts the calls that change files, and stops at one of them, in the middle of its bytes."""

    def __init__(self, monkeypatch, stop=None, part=0.0, error=Killed):
        self.count, self.stop, self.part, self.error = 0, stop, part, error
        for name in ("pwrite", "replace", "ftruncate", "truncate"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, function):
        def call(*args):
            self.count += 1
            if self.count - 1 != self.stop:
                return function(*args)
            if name == "pwrite":
                descriptor, data, offset = args
                function(descriptor, data[: int(len(data) * self.part)], offset)
            elif self.part == 1:
                function(*args)
            raise self.error()

        return call


def grow(stream, end):
    def call(store, saved):
        append(store, stream, end - (store.bounds(stream)[1] if stream in store.stream_ids else 0))

    return call


# Each operation can be called again after an error.
SCRIPT = [
    grow(0, 3),
    lambda store, saved: store.flush(),
    lambda store, saved: saved.append(store.position()),
    grow(1, 6),
    lambda store, saved: store.evict_oldest(),
    grow(0, 7),
    lambda store, saved: store.flush(),
    lambda store, saved: store.rewind(saved[0]),
    grow(0, 6),
    grow(2, 1),
    lambda store, saved: store.flush(durable=True),
]
AFTER_REWIND = 8


def committed_bounds(path):
    return check_all(EpisodeStore.open(path, verify=True))


def ends_of(bounds):
    return {stream: end for stream, (_, end) in bounds.items()}


@pytest.fixture
def whole(tmp_path):
    """What readers find before and after each operation of an undisturbed run, and its files."""
    states = [{}]
    with EpisodeStore.create(tmp_path / "whole", FIELDS, chunk_steps=4) as store:
        saved = []
        for call in SCRIPT:
            call(store, saved)
            states.append(committed_bounds(store.path))
    return states, files(tmp_path / "whole")


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_a_crash_at_any_call_loses_and_doubles_nothing(tmp_path, whole, part):
    states, expected_files = whole
    for stop in range(1000):
        path = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patch:
            store, saved = EpisodeStore.create(path, FIELDS, chunk_steps=4), []
            disk, number = Disk(patch, stop, part), -1
            try:
                for call in SCRIPT:
                    number += 1
                    call(store, saved)
            except Killed:
                pass
            else:
                assert disk.count == stop > 20
                break
        found = committed_bounds(path)
        if found not in (states[number], states[number + 1]):  # an append committed in between
            assert number in (3, 5, 8)
            low, high = ends_of(states[number]), ends_of(check_all(store))
            for stream, end in ends_of(found).items():
                assert low.get(stream, 0) <= end <= high[stream]
        del store
        if saved:  # there is a checkpoint: resume from it
            with EpisodeStore.open(path, writable=True) as store:
                store.rewind(saved[0])
                assert check_all(store) == {0: (0, 3)}
                for call in SCRIPT[AFTER_REWIND:]:
                    call(store, saved)
            assert files(path) == expected_files
        shutil.rmtree(path)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, whole):
    states, expected_files = whole
    for stop in range(1000):
        path = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patch:
            store, saved = EpisodeStore.create(path, FIELDS, chunk_steps=4), []
            disk = Disk(patch, stop, 0.4, lambda: OSError(errno.ENOSPC, "No space left on device"))
            for number, call in enumerate(SCRIPT):
                try:
                    call(store, saved)
                except UserError as error:
                    message = str(error)
                    assert "No space left on device" in message
                    check_all(store)
                    assert number in (3, 5, 8) or committed_bounds(path) in states[number:][:2]
                    call(store, saved)
            store.close()
        assert files(path) == expected_files
        shutil.rmtree(path)
        if disk.count <= stop:
            break
    assert stop > 20


def test_a_durable_flush_waits_for_the_disk_in_the_right_order(store, monkeypatch):
    synced, replaced = [], []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(source, target):
        replaced.append((Path(target).name, len(synced)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    append(store, 0, 6)
    store.flush()
    assert synced == []
    store.flush(durable=True)
    assert synced == ["00000000.bin", "00000001.bin", "chunks", "journal", "seal.tmp", "store"]
    assert replaced[-1] == ("seal.json", 5)


def damaged_store(path):
    with EpisodeStore.create(path, FIELDS, chunk_steps=4) as store:
        for _ in range(3):
            append(store, 0, 3)
            append(store, 1, 2)
            store.flush()
    return files(path)


def test_any_flipped_bit_is_found_and_named(tmp_path):
    original = damaged_store(tmp_path)
    rng = random.Random(0)
    found = harmless = 0
    for name, data in original.items():
        for _ in range(60):
            at = rng.randrange(len(data))
            broken = bytearray(data)
            broken[at] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(broken)
            try:
                assert committed_bounds(tmp_path) == {0: (0, 9), 1: (0, 6)}
            except StoreCorrupted as error:
                found += 1
                message = str(error)
                assert Path(name).name in message
                assert not name.startswith("chunks") or "its episodes" in message
            else:  # only where no committed row is
                harmless += 1
                assert name.startswith("chunks")
                assert data[at] == 0
            (tmp_path / name).write_bytes(data)
    assert found > 200
    assert harmless > 10


def test_any_truncation_is_found_and_named(tmp_path):
    original = damaged_store(tmp_path)
    for name, data in original.items():
        for length in {*range(0, len(data), 7), len(data) - 1}:
            (tmp_path / name).write_bytes(data[:length])
            with pytest.raises(StoreCorrupted, match=Path(name).name):
                EpisodeStore.open(tmp_path, verify=True)
        (tmp_path / name).unlink()
        with pytest.raises(StoreCorrupted, match=Path(name).name):
            EpisodeStore.open(tmp_path, verify=True)
        (tmp_path / name).write_bytes(data)
    assert committed_bounds(tmp_path) == {0: (0, 9), 1: (0, 6)}


def test_damage_is_noticed_when_read_and_tells_where(tmp_path):
    damaged_store(tmp_path)
    path = tmp_path / "chunks" / "00000002.bin"  # rows 4 to 7 of stream 0
    data = bytearray(path.read_bytes())
    data[6 * 3] ^= 1  # the image of row 7
    path.write_bytes(data)
    store = EpisodeStore.open(tmp_path)
    check_rows(store.read(0, 0, 4), 0, 0, 4)
    words = (
        r"00000002.bin is damaged: rows 6 to 7 of stream 0 \(its episodes 1 to 1 .*\) do not fit"
    )
    with pytest.raises(StoreCorrupted, match=words):
        store.read(0, 2, 4)
    path.unlink()
    with pytest.raises(StoreCorrupted, match=r"00000002.bin .* rows 4 to 7 .* are missing"):
        EpisodeStore.open(tmp_path).read(0, 2, 4)


def test_sigkill_keeps_what_was_committed(tmp_path):
    def write_forever(path, queue):
        store = EpisodeStore.open(path, writable=True)
        while True:
            append(store, 0, 3)
            append(store, 1, 1)
            store.flush()
            queue.put({s: store.bounds(s)[1] for s in store.stream_ids})

    EpisodeStore.create(tmp_path, FIELDS, chunk_steps=16).close()
    context = multiprocessing.get_context("fork")
    ends = {}
    for delay in (0.02, 0.05, 0.11):
        queue = context.SimpleQueue()
        process = context.Process(target=write_forever, args=(tmp_path, queue))
        process.start()
        reported = queue.get()
        stop = time.monotonic() + delay
        while time.monotonic() < stop:
            reported = queue.get()
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        found = committed_bounds(tmp_path)
        new_ends = {stream: end for stream, (_, end) in found.items()}
        assert all(new_ends[s] >= reported[s] > ends.get(s, 0) for s in (0, 1))
        assert new_ends[0] < reported[0] + 3000
        ends = new_ends
    with EpisodeStore.open(tmp_path, writable=True) as store:
        append(store, 0, 40)
    committed_bounds(tmp_path)
