"""Split, statistics, sharding, resuming, and data that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fitting import Model, Validated, as_rank, fit, same
from recordings import BOX, VECTORS, Memory, d4rl_at, memory, recorded, store_at

from datamodules import OfflineDataModule, UserError
from datamodules.episodes import Episodes
from datamodules.sources.opening import open_source
from datamodules.sources.writing import write
from datamodules.spec import ActionSpec, Spec

LENGTHS = tuple(3 + i % 7 for i in range(20))


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(store_at(tmp_path / "data", memory(VECTORS, LENGTHS)))


def test_a_batch_of_contexts(source: str) -> None:
    data, model = OfflineDataModule(source, batch_size=4, sequence_length=6), Model()
    assert data.spec == VECTORS
    fit(model, data, 2)
    batch = model.batches[0]
    kinds = {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if k != "obs"}
    assert kinds == {
        "action": ((4, 6), torch.int64),
        "reward": ((4, 6), torch.float32),
        "return_to_go": ((4, 6), torch.float32),
        "timestep": ((4, 6), torch.int64),
        "mask": ((4, 6), torch.bool),
    }
    assert batch["obs"]["vector"].shape == (4, 6, 3)


@pytest.mark.parametrize("sampling", ["windows", "pieces", "recent"])
def test_the_model_or_the_user_says_what_a_batch_is(source: str, sampling: Any) -> None:
    model = Model(sampling)
    model.replay_context = 1  # type: ignore[assignment]
    fit(model, OfflineDataModule(source, batch_size=4, sequence_length=6), 1)
    assert set(model.batches[0]) == {
        *("obs", "action", "reward", "is_first", "is_last", "is_terminal", "step_id")
    }
    assert model.batches[0]["reward"].shape == (4, 7)
    fit(model, OfflineDataModule(source, batch_size=4, sampling="contexts"), 1)
    assert model.batches[-1]["mask"].shape == (4, 20)


def test_an_epoch_has_a_length(source: str) -> None:
    loader = OfflineDataModule(source, updates_per_epoch=7).train_dataloader()
    assert len(loader) == 7


class TestSplit:
    def test_validation_is_by_episode(self, source: str) -> None:
        data = OfflineDataModule(source, validation=0.25)
        assert len(data.val_episodes) == 5
        assert sorted([*data.val_episodes, *data.train_episodes]) == list(range(20))
        again = OfflineDataModule(source, validation=0.25)
        other = OfflineDataModule(source, validation=0.25, seed=1)
        assert np.array_equal(data.val_episodes, again.val_episodes)
        assert not np.array_equal(data.val_episodes, other.val_episodes)
        everything = OfflineDataModule(source)
        assert np.array_equal(everything.train_episodes, np.arange(20))
        assert len(everything.val_episodes) == 0
        assert everything.val_dataloader() == []

    def test_training_never_sees_what_is_held_out(self, source: str) -> None:
        data, model = OfflineDataModule(source, validation=0.25, batch_size=64), Validated()
        fit(model, data, 20, limit_val_batches=1.0, val_check_interval=20)
        rows = [range(*data.episodes.starts[[e, e + 1]]) for e in data.val_episodes]
        held = data.episodes.arrays["obs/vector"][np.concatenate(rows)][:, 0].tolist()
        seen = torch.cat([b["obs"]["vector"][b["mask"]][:, 0] for b in model.batches]).tolist()
        assert len(set(seen)) > 50
        assert set(seen).isdisjoint(held)
        validated = torch.cat([b["obs"]["vector"][b["mask"]][:, 0] for b in model.validated])
        assert set(validated.tolist()) <= set(held)
        assert len(set(validated.tolist())) == data.episodes.lengths[data.val_episodes].sum()

    @pytest.mark.parametrize("validation", [0.01, 0.99])
    def test_a_side_without_an_episode_is_refused(self, source: str, validation: float) -> None:
        with pytest.raises(UserError, match="both sides need at least one"):
            _ = OfflineDataModule(source, validation=validation).train_episodes

    def test_the_best_episodes_up_to_a_share_of_the_actions(self, tmp_path: Path) -> None:
        episodes = recorded(BOX, (10, 20, 30, 40))
        returns = (3.0, 9.0, 7.0, 1.0)
        episodes = [
            e._replace(reward=np.full(len(e.reward), r / len(e.reward), np.float32))
            for e, r in zip(episodes, returns, strict=True)
        ]
        path = str(store_at(tmp_path / "a", Memory(BOX, episodes)))
        for share, expected in ((1, [0, 1, 2, 3]), (0.6, [0, 1, 2]), (0.55, [1, 2]), (0.1, [1])):
            data = OfflineDataModule(path, top_fraction=share)
            assert data.train_episodes.tolist() == expected, share
            assert data.returns.tolist() == pytest.approx([returns[i] for i in expected])

    def test_held_out_episodes_to_dream_on(self, source: str) -> None:
        data = OfflineDataModule(source, validation=0.25)
        found = data.validation_episodes(3, 4)
        assert found is not None
        assert found.batch["obs"]["vector"].shape == (3, 5, 3)
        chosen = data.val_episodes[[0, 2, 4]]
        lengths = data.episodes.lengths[chosen] + 1
        assert found.length.tolist() == np.minimum(lengths, 5).tolist()
        for i, episode in enumerate(chosen):
            start, n = data.episodes.starts[episode], int(found.length[i])
            expected = data.episodes.arrays["obs/vector"][start : start + n]
            assert np.array_equal(found.batch["obs"]["vector"][i, :n], expected)
            assert not found.batch["obs"]["vector"][i, n:].any()
            whole = lengths[i] <= 5
            assert bool(found.terminal[i]) == bool(whole and episode % 2)
        assert OfflineDataModule(source).validation_episodes(3, 4) is None

    def test_some_episodes_are_held_out_ones_if_there_are_any(self, source: str) -> None:
        data = OfflineDataModule(source, validation=0.25)
        found, expected = data.some_episodes(3, 4), data.validation_episodes(3, 4)
        assert expected is not None
        assert torch.equal(found.batch["obs"]["vector"], expected.batch["obs"]["vector"])
        data = OfflineDataModule(source)
        found = data.some_episodes(2, 4)
        for i, episode in enumerate(data.train_episodes[[0, -1]]):
            start, n = data.episodes.starts[episode], int(found.length[i])
            expected_rows = data.episodes.arrays["obs/vector"][start : start + n]
            assert np.array_equal(found.batch["obs"]["vector"][i, :n], expected_rows)


class TestStatistics:
    def test_of_the_training_steps_that_have_an_action(self, source: str) -> None:
        data = OfflineDataModule(source, validation=0.25)
        rows = np.concatenate(
            [np.arange(*(data.episodes.starts[[e, e + 1]] - [0, 1])) for e in data.train_episodes]
        )
        values = torch.from_numpy(data.episodes.arrays["obs/vector"][rows])
        mean, std = data.statistics["vector"]
        torch.testing.assert_close(mean, values.mean(0))
        torch.testing.assert_close(std, values.std(0, correction=0))
        assert mean.dtype == std.dtype == torch.float32

    def test_are_exact_far_from_zero(self, tmp_path: Path) -> None:
        episodes = recorded(VECTORS, (50, 50))
        for episode in episodes:
            episode.obs["vector"][:] = 1e4 + episode.obs["vector"] * 1e-1  # type: ignore[index]
        path = str(store_at(tmp_path / "a", Memory(VECTORS, episodes)))
        values = np.concatenate([e.obs["vector"][:-1] for e in episodes]).astype(np.float64)
        _, std = OfflineDataModule(path).statistics["vector"]
        torch.testing.assert_close(std, torch.from_numpy(values.std(0)).float())

    def test_returns(self, source: str) -> None:
        data = OfflineDataModule(source)
        expected = [float(e.reward.sum()) for e in recorded(VECTORS, LENGTHS)]
        assert data.returns.tolist() == expected
        assert data.returns.dtype == torch.float32


class TestResume:
    @pytest.mark.parametrize("sampling", ["windows", "pieces", "contexts"])
    def test_goes_on_bit_for_bit(self, source: str, sampling: str, tmp_path: Path) -> None:
        def data() -> OfflineDataModule:
            return OfflineDataModule(source, batch_size=3, sequence_length=5)

        whole, first, second = Model(sampling), Model(sampling), Model(sampling)
        fit(whole, data(), 9)
        fit(first, data(), 4).save_checkpoint(tmp_path / "4.ckpt")
        fit(second, data(), 9, ckpt_path=tmp_path / "4.ckpt")
        assert len(second.batches) == 5
        for mine, expected in zip([*first.batches, *second.batches], whole.batches, strict=True):
            assert same(mine, expected)
        assert [*first.noise, *second.noise] == whole.noise

    def test_another_seed_draws_others(self, source: str) -> None:
        one, other = Model(), Model()
        fit(one, OfflineDataModule(source), 1)
        fit(other, OfflineDataModule(source, seed=1), 1)
        assert not same(one.batches[0], other.batches[0])

    def test_of_other_data_or_of_an_environment_is_refused(
        self, source: str, tmp_path: Path
    ) -> None:
        fit(Model(), OfflineDataModule(source), 1).save_checkpoint(tmp_path / "1.ckpt")
        other = str(store_at(tmp_path / "other", memory(VECTORS, (4, 4))))
        with pytest.raises(UserError, match="number of steps of the data"):
            fit(Model(), OfflineDataModule(other), 2, ckpt_path=tmp_path / "1.ckpt")
        with pytest.raises(UserError, match="a training in an environment"):
            OfflineDataModule(source).load_state_dict({"ranks": [{"collector": {}}]})
        with pytest.raises(UserError, match="of 2 processes, this run has 1"):
            OfflineDataModule(source).load_state_dict({"ranks": [{}, {}]})


class TestRanks:
    def test_each_draws_from_a_share_of_its_own(self, source: str) -> None:
        seen = []
        for rank in range(3):
            data = as_rank(OfflineDataModule(source, sequence_length=4), rank, 3)
            batches = [batch["obs"]["vector"][..., 0] for batch in data.sweep(5)]
            seen.append(set(torch.cat(batches, 1).flatten().tolist()))
        assert all(seen)
        assert not seen[0] & seen[1]
        assert not seen[1] & seen[2]
        everything = open_source(source)
        assert sum(map(len, seen)) == everything.num_actions + everything.num_episodes

    def test_statistics_and_returns_are_of_all(self, source: str) -> None:
        alone = OfflineDataModule(source)
        ranked = as_rank(OfflineDataModule(source), 1, 3)
        assert torch.equal(alone.returns, ranked.returns)
        assert torch.equal(alone.statistics["vector"][0], ranked.statistics["vector"][0])

    def test_more_ranks_than_episodes_share_all(self, tmp_path: Path) -> None:
        path = str(store_at(tmp_path / "a", memory(VECTORS, (9, 9))))
        ranks = [as_rank(OfflineDataModule(path, sequence_length=4), r, 3) for r in range(3)]
        batches = [data.next_batch()["step_id"] for data in ranks]
        assert not torch.equal(batches[0], batches[1])
        assert all(data.steps_seen == 20 for data in ranks)


class TestFitting:
    def test_data_of_another_environment_than_the_model(self, source: str) -> None:
        model = Model(spec=BOX)
        with pytest.raises(UserError, match=r"data has .* but the model has .* belong together"):
            fit(model, OfflineDataModule(source), 1)

    def test_the_model_knows_what_the_data_only_suggests(self, tmp_path: Path) -> None:
        wide = Spec(BOX.obs, ActionSpec("box", low=(-3.0,), high=(3.0,)))
        data = OfflineDataModule(str(d4rl_at(tmp_path / "a.hdf5", memory(BOX))))
        assert data.spec == BOX
        model = Model(spec=wide)
        fit(model, data, 1)
        assert data.spec == wide

    def test_an_environment_settles_the_spec_and_is_there_to_play_in(self, tmp_path: Path) -> None:
        pendulum = Spec(BOX.obs, ActionSpec("box", low=(-2.0,), high=(2.0,)))
        path = str(d4rl_at(tmp_path / "a.hdf5", memory(pendulum)))
        data = OfflineDataModule(path, env="Pendulum-v1", time_limit=5)
        assert data.spec == pendulum
        env = data.make_env()
        env.reset(seed=0)
        assert [env.step(np.zeros(1, np.float32))[3] for _ in range(5)] == [False] * 4 + [True]
        with pytest.raises(UserError, match="the environment CartPole-v1 has"):
            _ = OfflineDataModule(path, env="CartPole-v1").spec

    def test_training_builds_no_environment(self, source: str) -> None:
        data = OfflineDataModule(source, env=lambda: pytest.fail("it was built"))
        assert data.spec == VECTORS
        fit(Model(), data, 1)

    def test_without_an_environment_nothing_is_there_to_play_in(self, source: str) -> None:
        data = OfflineDataModule(source)
        assert not hasattr(data, "make_env")
        assert not hasattr(data, "env_steps")

    def test_bad_data_is_named_when_it_is_read(self, tmp_path: Path) -> None:
        write(memory(), tmp_path / "a.hdf5", "hdf5")
        with h5py.File(tmp_path / "a.hdf5", "a") as file:
            file["rewards"][6] = np.nan
        data = OfflineDataModule(str(tmp_path / "a.hdf5"))
        assert data.spec == VECTORS
        with pytest.raises(UserError, match=r"a\.hdf5, episode 2: NaN or infinity in 'reward'"):
            fit(Model(), data, 1)

    def test_notes_are_said_once(self, tmp_path: Path) -> None:
        path = str(d4rl_at(tmp_path / "a.hdf5", memory(BOX), after=False))
        data = OfflineDataModule(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _ = data.episodes, data.returns, data.statistics
        told = [str(w.message) for w in caught if "a.hdf5" in str(w.message)]
        assert len(told) == 2
        assert any("no next_observations" in text for text in told)

    def test_notes_are_said_of_cached_data_too(self, tmp_path: Path) -> None:
        path = str(d4rl_at(tmp_path / "a.hdf5", memory(BOX), after=False))
        cache = str(tmp_path / "cache")
        notes = [OfflineDataModule(path, cache=cache).episodes.notes for _ in range(2)]
        assert notes[0] == notes[1]
        assert any("no next_observations" in note for note in notes[0])


class TestCache:
    def test_is_mapped_and_found_again(self, source: str, tmp_path: Path) -> None:
        plain = OfflineDataModule(source).episodes
        cache = str(tmp_path / "cache")
        first = OfflineDataModule(source, cache=cache).episodes
        (folder,) = Path(cache).iterdir()
        times = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
        second = OfflineDataModule(source, cache=cache).episodes
        assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == times
        for found in (first, second):
            assert isinstance(found.arrays["obs/vector"].base, np.memmap)
            assert np.array_equal(found.starts, plain.starts)
            assert all(np.array_equal(found.arrays[k], v) for k, v in plain.arrays.items())

    def test_changed_data_is_read_again(self, tmp_path: Path) -> None:
        write(memory(), tmp_path / "a.hdf5", "hdf5")
        path, cache = str(tmp_path / "a.hdf5"), str(tmp_path / "cache")
        before = OfflineDataModule(path, cache=cache).returns
        with h5py.File(path, "a") as file:
            file["rewards"][0] += 1
        os.utime(path, (0, 0))
        after = OfflineDataModule(path, cache=cache).returns
        assert (after - before).tolist() == [1, 0, 0, 0]

    def test_a_broken_cache_is_made_again(self, source: str, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        expected = OfflineDataModule(source, cache=str(cache)).returns
        (folder,) = cache.iterdir()
        (folder / "reward.npy").write_bytes(b"")
        assert torch.equal(OfflineDataModule(source, cache=str(cache)).returns, expected)
        assert [p.name for p in cache.iterdir()] == [folder.name]

    def test_processes_that_begin_together_share_one_reading(
        self, source: str, tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        # Each process tells which file it maps: all the same one, though none was there before.
        code = (
            "import os, sys; from datamodules.episodes import Episodes;"
            "from datamodules.sources.opening import open_source;"
            "print('ready', flush=True); sys.stdin.readline();"
            "found = Episodes.load(open_source(sys.argv[1]), cache=sys.argv[2]);"
            "print(os.stat(found.arrays['reward'].base.filename).st_ino)"
        )
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, source, str(cache)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        told = [process.communicate(timeout=100)[0] for process in started]
        (folder,) = cache.iterdir()
        assert told == [f"{(folder / 'reward.npy').stat().st_ino}\n"] * 2

    def test_bad_data_leaves_nothing_behind(self, tmp_path: Path) -> None:
        bad = memory()
        bad.episodes[1].reward[0] = np.nan
        with pytest.raises(UserError, match="episode 1"):
            Episodes.load(bad, cache=tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"sequence_length": 0}, "sequence_length >= 1"),
        ({"top_fraction": 0.0}, "top_fraction"),
        ({"top_fraction": 1.5}, "top_fraction"),
        ({"validation": 1.0}, "validation"),
        ({"sampling": "random"}, "no sampling 'random'"),
        ({"piece_length": 0}, "piece_length"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OfflineDataModule("anything", **options)
