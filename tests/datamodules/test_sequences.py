"""Windows, pieces and contexts, against loops over the episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import VECTORS, memory

from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.sequences import Sequences
from datamodules.store import Field

LENGTHS = (5, 1, 9, 3)


def episodes(lengths: tuple[int, ...] = LENGTHS) -> Episodes:
    """Whose reward at row i is i, so that rows are recognised."""
    loaded = Episodes.load(memory(VECTORS, lengths))
    loaded.arrays["reward"] = np.arange(loaded.starts[-1], dtype=np.float32)
    loaded.arrays["reward"][loaded.starts[:-1]] = 0
    return loaded


def rows_of(data: Episodes, chosen: list[int]) -> np.ndarray:
    return np.concatenate([np.arange(data.starts[e], data.starts[e + 1]) for e in chosen])


def context(data: Episodes, episode: int, end: int, length: int) -> dict[str, np.ndarray]:
    """The context that ends with action `end` of an episode, in a loop."""
    start = int(data.starts[episode])
    reward = data.arrays["reward"][start : data.starts[episode + 1]].astype(np.float64)
    rows = []
    for t in range(end - length + 1, end + 1):
        if t < 0:
            zero = {"obs/vector": np.zeros(3), "action": 0, "reward": 0.0}
            rows.append(zero | {"return_to_go": 0.0, "timestep": 0, "mask": False})
            continue
        row: dict[str, Any] = {
            key: data.arrays[key][start + t] for key in ("obs/vector", "action", "reward")
        }
        rows.append(row | {"return_to_go": reward[t + 1 :].sum(), "timestep": t, "mask": True})
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple),
    length=st.integers(1, 15),
    data=st.data(),
)
def test_contexts_are_those_of_a_loop(
    lengths: tuple[int, ...], length: int, data: st.DataObject
) -> None:
    loaded = episodes(lengths)
    numbers = st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True)
    chosen = sorted(data.draw(numbers))
    sequences = Sequences(loaded, chosen, length, 0, "contexts")
    for place, episode in enumerate(chosen):
        for end in range(lengths[episode]):
            found = sequences.contexts(np.array([sequences.starts[place] + end]))
            expected = context(loaded, episode, end, length)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert np.array_equal(found[key][0], value), (key, episode, end)


def test_the_types_of_contexts() -> None:
    batch = Sequences(episodes(), range(4), 6, 0, "contexts").sample(8)
    kinds = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert kinds == {
        "obs/vector": ((8, 6, 3), "float32"),
        "action": ((8, 6), "int64"),
        "reward": ((8, 6), "float32"),
        "return_to_go": ((8, 6), "float32"),
        "timestep": ((8, 6), "int64"),
        "mask": ((8, 6), "bool"),
    }
    assert batch["mask"][:, -1].all()
    assert (np.diff(batch["mask"].astype(int), axis=1) >= 0).all(), "padding is on the left"


@pytest.mark.parametrize("length", [1, 2, 5, 30])
def test_contexts_have_every_step_with_an_action_equally_often(length: int) -> None:
    loaded = episodes()
    sequences = Sequences(loaded, range(4), length, 0, "contexts")
    draws = 20_000
    batch = sequences.sample(draws)
    assert batch["mask"][:, -1].all()
    steps, counts = np.unique(batch["obs/vector"][batch["mask"]][:, 0], return_counts=True)
    acting = ~loaded.arrays["is_last"]
    assert sorted(steps) == sorted(loaded.arrays["obs/vector"][acting, 0])
    windows = acting.sum() + 4 * (length - 1)
    expected = draws * length / windows
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_contexts_are_cut_at_both_ends_of_an_episode() -> None:
    sequences = Sequences(episodes((3,)), [0], 2, 0, "contexts")
    batch = sequences.sample(400)
    found = {tuple(t[m]) for t, m in zip(batch["timestep"], batch["mask"], strict=True)}
    assert found == {(0,), (0, 1), (1, 2), (2,)}
    assert (batch["timestep"][~batch["mask"]] == 0).all()


def test_a_long_sum_keeps_returns_to_go_exact() -> None:
    loaded = episodes((1000,) * 50)
    loaded.arrays["reward"] = np.where(loaded.arrays["is_first"], 0, 1e4).astype(np.float32)
    sequences = Sequences(loaded, range(50), 1, 0, "contexts")
    last = sequences.contexts(sequences.starts[1:] - 2)
    first = sequences.contexts(sequences.starts[:-1])
    assert (last["return_to_go"] == 1e4).all()
    assert (first["return_to_go"] == 1e7).all()


def test_all_contexts_hold_each_action_once() -> None:
    loaded = episodes()
    sequences = Sequences(loaded, range(4), 4, 0, "contexts")
    batches = list(sequences.all(3))
    assert [len(b["mask"]) for b in batches] == [3, 3, 1]
    seen = np.concatenate([b["obs/vector"][b["mask"]][:, 0] for b in batches])
    assert sorted(seen) == sorted(loaded.arrays["obs/vector"][~loaded.arrays["is_last"], 0])


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 2]])
def test_windows_are_consecutive_steps_of_the_chosen_episodes(chosen: list[int]) -> None:
    loaded = episodes()
    rows = rows_of(loaded, chosen)
    sequences = Sequences(loaded, chosen, 6)
    batch = sequences.sample(2000)
    starts = batch["step_id"][:, 0]
    assert set(starts.tolist()) == set(range(len(rows) - 5))
    assert np.array_equal(batch["step_id"], starts[:, None] + np.arange(6))
    for key, array in loaded.arrays.items():
        assert np.array_equal(batch[key], array[rows[batch["step_id"]]]), key
    counts = np.bincount(starts)
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_pieces_go_on_from_batch_to_batch() -> None:
    loaded = episodes((30, 40))
    sequences = Sequences(loaded, [0, 1], 7, 0, "pieces", context=1, piece_length=12)
    before = None
    begun = 0
    for _ in range(50):
        batch = sequences.sample(3)
        ids = batch["step_id"]
        jumps = np.diff(ids, axis=1) != 1
        assert (batch["is_first"][:, 1:] >= jumps).all(), "is_first is set where a piece begins"
        begun += int((batch["is_first"] & (ids % 31 != 0)).sum())
        if before is not None:
            goes_on = ids[:, 0] == before
            assert (goes_on | batch["is_first"][:, 0]).all(), "the context repeats the last step"
        before = ids[:, -1]
        rows = rows_of(loaded, [0, 1])
        assert np.array_equal(batch["obs/vector"], loaded.arrays["obs/vector"][rows[ids]])
    assert begun > 10


def test_a_part_of_a_batch() -> None:
    for sampling in ("windows", "pieces"):
        sequences = Sequences(episodes(), range(4), 6, 0, sampling)  # type: ignore[arg-type]
        batch = sequences.sample(3, steps=2, observations=())
        assert batch["step_id"].shape == batch["reward"].shape == (3, 2)
        assert "obs/vector" not in batch


def test_sweep_and_first_steps() -> None:
    loaded = episodes()
    sequences = Sequences(loaded, [0, 2], 6)
    batches = list(sequences.sweep(7))
    assert [b["reward"].shape for b in batches] == [(1, 7), (1, 7), (1, 2)]
    found = np.concatenate([b["obs/vector"][0] for b in batches])
    assert np.array_equal(found, loaded.arrays["obs/vector"][rows_of(loaded, [0, 2])])
    first = sequences.first_steps(10)
    assert first["is_first"].all()
    assert np.array_equal(first["obs/vector"][:, 0], loaded.arrays["obs/vector"][[0, 8]])
    assert sequences.first_steps(1)["step_id"].tolist() == [[0]]


def test_latents_are_kept_and_written_back() -> None:
    fields = {"h": Field((2,), "float32")}
    sequences = Sequences(episodes(), range(4), 5, latent_fields=fields)
    batch = sequences.sample(2)
    assert not batch["latents/h"].any()
    ids = np.array([[3, 4, 5]])
    sequences.write_back(ids, {"h": np.ones((1, 3, 2), np.float32)})
    (everything,) = sequences.sweep(100)
    assert everything["latents/h"][0, :, 0].nonzero()[0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("sampling", ["windows", "pieces", "contexts"])
def test_a_state_goes_on_bit_for_bit(sampling: Any) -> None:
    def make(seed: int) -> Sequences:
        fields = {"h": Field((2,), "float32")} if sampling != "contexts" else {}
        return Sequences(episodes(), range(4), 5, seed, sampling, latent_fields=fields)

    one, other = make(0), make(1)
    one.sample(3)
    if sampling != "contexts":
        one.write_back(np.array([[0, 1]]), {"h": np.ones((1, 2, 2), np.float32)})
    state = one.state_dict()
    other.load_state_dict(state)
    for _ in range(10):
        a, b = one.sample(3), other.sample(3)
        assert all(np.array_equal(a[key], b[key]) for key in a)
    with pytest.raises(UserError, match="number of steps of the data 22, this run 21"):
        Sequences(episodes((5, 1, 9, 2)), range(4), 5, 0, sampling).load_state_dict(state)
    with pytest.raises(UserError, match="sequence_length 5, this run 6"):
        Sequences(episodes(), range(4), 6, 0, sampling).load_state_dict(state)


def test_too_little_data_for_a_window() -> None:
    with pytest.raises(UserError, match="has 22 steps here, too few for one sequence of 23"):
        Sequences(episodes(), range(4), 23)
    assert Sequences(episodes(), range(4), 23, 0, "contexts").sample(2)["mask"].shape == (2, 23)
