"""Recorded data of every kind comes in by the time-step convention, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    BOX,
    IMAGES,
    VECTORS,
    Memory,
    buffers,
    d4rl_at,
    edit_metadata,
    memory,
    minari_at,
    recorded,
    steps_of,
    store_at,
)

from datamodules.episodes import Episodes
from datamodules.errors import UserError
from datamodules.sources.opening import open_source
from datamodules.sources.source import Joined, Source, said, steps
from datamodules.sources.writing import action_space, minari_id, observation_space, write
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import EpisodeStore


def assert_same(found: Source, expected: Source) -> None:
    assert found.num_episodes == expected.num_episodes
    for episode in range(found.num_episodes):
        got, wanted = steps(found, episode), steps_of(expected.read(episode), expected.spec)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert got[key].dtype == value.dtype, key
            assert np.array_equal(got[key], value), (episode, key)


def broken(source: Source) -> str:
    """What reading all of it complains about."""
    with pytest.raises(UserError) as caught:
        Episodes.load(source)
    return str(caught.value)


def refused(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_source(*arguments)
    return str(caught.value)


class TestEveryKind:
    @pytest.mark.parametrize("spec", [VECTORS, BOX, IMAGES], ids=["vectors", "box", "images"])
    @pytest.mark.parametrize("kind", ["store", "minari", "hdf5"])
    def test_what_is_written_comes_back(self, spec: Spec, kind: str, tmp_path: Path) -> None:
        given = memory(spec)
        given.env = "CartPole-v1"
        path = tmp_path / ("data.hdf5" if kind == "hdf5" else "data")
        write(given, path, kind)
        found = open_source(path)
        assert found.spec == spec
        assert found.env == "CartPole-v1"
        assert_same(found, given)
        assert said(found) == []
        assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing else is left there"

    def test_a_source_of_every_kind_can_be_joined(self, tmp_path: Path) -> None:
        one, two = memory(BOX, (4, 2)), memory(BOX, (3,), seed=1)
        write(one, tmp_path / "a", "store")
        write(two, tmp_path / "b.hdf5", "hdf5")
        joined = open_source([tmp_path / "a", str(tmp_path / "b.hdf5")])
        assert_same(joined, Memory(BOX, [*one.episodes, *two.episodes]))
        assert joined.where(2).endswith("b.hdf5, episode 0")
        loaded = Episodes.load(joined)
        assert loaded.lengths.tolist() == [4, 2, 3]
        assert loaded.returns.tolist() == [e.reward.sum() for e in [*one.episodes, *two.episodes]]

    def test_unlike_data_is_not_joined(self, tmp_path: Path) -> None:
        write(memory(BOX), tmp_path / "a", "store")
        write(memory(VECTORS), tmp_path / "b", "store")
        assert "must look alike" in refused([tmp_path / "a", tmp_path / "b"])

    def test_nothing_is_overwritten_and_an_error_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "there").write_text("mine")
        with pytest.raises(UserError, match="is there already"):
            write(memory(), tmp_path / "there", "store")
        bad = memory()
        bad.episodes[2].obs["vector"][4, 1] = np.nan
        for kind in ("store", "minari", "hdf5"):
            with pytest.raises(UserError, match="memory, episode 2: NaN"):
                write(bad, tmp_path / "new", kind)
        assert [p.name for p in tmp_path.iterdir()] == ["there"]


class TestMinari:
    @pytest.mark.parametrize("kind", ["hdf5", "arrow", "parquet"])
    @pytest.mark.parametrize("spec", [VECTORS, IMAGES], ids=["box", "dict of image and box"])
    def test_what_minari_writes(self, kind: str, spec: Spec, tmp_path: Path) -> None:
        if kind != "hdf5":
            pytest.importorskip("pyarrow")
        given = memory(spec)
        found = buffers(given, "vector" if spec is VECTORS else None)
        spaces = observation_space(spec), action_space(spec.action)
        source = open_source(minari_at(tmp_path, "a-v0", *spaces, found, kind, jpeg=False))
        assert source.spec == spec
        assert_same(source, given)

    @pytest.mark.parametrize("kind", ["hdf5", "arrow"])
    def test_jpeg_images(self, kind: str, tmp_path: Path) -> None:
        if kind != "hdf5":
            pytest.importorskip("pyarrow")
        given = memory(IMAGES, (3, 2))
        for episode in given.episodes:  # flat colours survive JPEG nearly
            episode.obs["image"][:] = episode.obs["image"][:, :1, :1]
        spaces = observation_space(IMAGES), action_space(IMAGES.action)
        source = open_source(minari_at(tmp_path, "a-v0", *spaces, buffers(given), kind))
        for i, episode in enumerate(given.episodes):
            got = steps(source, i)["obs/image"].astype(int)
            assert np.abs(got - episode.obs["image"]).max() <= 4

    def test_what_we_write_minari_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import minari

        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        given = memory(IMAGES)
        write(given, tmp_path / "tests" / "walk-v3", "minari")
        found = minari.load_dataset("tests/walk-v3")
        assert (found.total_episodes, found.total_steps) == (4, 18)
        for wanted, got in zip(given.episodes, found.iterate_episodes(), strict=True):
            assert np.array_equal(got.observations["image"], wanted.obs["image"])
            assert np.array_equal(got.actions, wanted.action)
            assert np.array_equal(got.rewards, wanted.reward)
            assert got.terminations.tolist() == [False] * (len(got) - 1) + [wanted.terminal]
            assert got.truncations.tolist() == [False] * (len(got) - 1) + [not wanted.terminal]
        assert "tests/walk-v3" in minari.list_local_datasets()

    def test_ids_are_found_below_the_root(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        write(memory(), tmp_path / "tests" / "walk-v3", "minari")
        source = open_source("tests/walk-v3")
        assert source.name == "tests/walk-v3"
        assert_same(source, memory())
        message = refused("tests/wlak-v3")
        assert "did you mean 'tests/walk-v3'" in message
        assert "minari download" in message
        assert minari_id(tmp_path / "tests" / "walk-v3") == "tests/walk-v3"
        assert minari_id(Path("somewhere/else.x")) == "else-x-v0"

    def test_unusual_spaces(self, tmp_path: Path) -> None:
        """Nested dicts, numbers, texts, grey images, channels first, actions that start at 2."""
        rng = np.random.default_rng(0)
        space = gym.spaces.Dict(
            {
                "goal": gym.spaces.Dict({"slide door": gym.spaces.Box(-1, 1, (2,))}),
                "direction": gym.spaces.Discrete(4),
                "mission": gym.spaces.Text(20),
                "grey": gym.spaces.Box(0, 255, (12, 10), np.uint8),
                "first": gym.spaces.Box(0, 255, (3, 12, 10), np.uint8),
                "height": gym.spaces.Box(-1, 1, ()),
            }
        )
        obs = {
            "goal": {"slide door": rng.uniform(-1, 1, (4, 2)).astype(np.float32)},
            "direction": np.array([0, 3, 1, 2]),
            "mission": ["go"] * 4,
            "grey": rng.integers(0, 256, (4, 12, 10), dtype=np.uint8),
            "first": rng.integers(0, 256, (4, 3, 12, 10), dtype=np.uint8),
            "height": rng.uniform(-1, 1, 4).astype(np.float32),
        }
        episode = {
            "observations": obs,
            "actions": np.array([2, 4, 3]),
            "rewards": np.ones(3),
            "terminations": np.zeros(3, bool),
            "truncations": np.arange(3) == 2,
        }
        folder = minari_at(tmp_path, "a-v0", space, gym.spaces.Discrete(3, start=2), [episode])
        source = open_source(folder)
        found = steps(source, 0)
        assert source.spec.action.n == 3
        assert found["action"].tolist() == [0, 2, 1, 0]
        assert np.array_equal(found["obs/goal_slide door"], obs["goal"]["slide door"])
        assert found["obs/direction"].argmax(1).tolist() == [0, 3, 1, 2]
        assert found["obs/grey"].shape == (4, 12, 10, 1)
        assert np.array_equal(found["obs/first"][..., 1], obs["first"][:, 1])
        assert found["obs/height"].shape == (4, 1)
        assert "obs/mission" not in found
        notes = said(source)
        assert any("texts ['mission'] are left out" in note for note in notes)
        assert any("reward (float64) is kept as float32" in note for note in notes)
        small = open_source(folder, ["grey", "direction"], 6)
        assert small.spec.obs["grey"].shape == (6, 6, 1)
        assert set(small.spec.obs) == {"grey", "direction"}
        expected = obs["grey"].reshape(4, 6, 2, 10).mean(2)
        assert steps(small, 0)["obs/grey"].shape == (4, 6, 6, 1)
        assert abs(steps(small, 0)["obs/grey"].mean() - expected.mean()) < 1
        assert "'weight'" in refused(folder, ["weight"])

    def test_bounds_that_are_not_there_are_found_in_the_data(self, tmp_path: Path) -> None:
        given = memory(BOX)
        space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        source = open_source(
            minari_at(tmp_path, "a-v0", observation_space(BOX), space, buffers(given, "vector"))
        )
        assert source.spec.action == BOX.action
        assert "look like 1 actions in [-1, 1]" in said(source)[0]

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        spaces = observation_space(VECTORS), action_space(VECTORS.action)
        return minari_at(tmp_path, "a-v0", *spaces, buffers(memory(), "vector"))

    @pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminations"])
    def test_missing_keys(self, folder: Path, key: str) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file["episode_2"][key]
        with pytest.raises(UserError, match=f"a-v0, episode 2 lacks '{key}'"):
            Episodes.load(open_source(folder))

    def test_a_missing_episode(self, folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file["episode_3"]
        assert "episode 3 is missing" in refused(folder)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("observations", np.zeros((10, 2), np.float32), "its space says (3,)"),
            ("observations", np.zeros((9, 3), np.float32), "has 9 rows and there are 9 rewards"),
            ("observations", np.full((10, 3), np.nan, np.float32), "NaN or infinity in 'vector'"),
            ("observations", np.full((10, 3), 1e300), "infinity in 'vector' at step 0"),
            ("actions", np.zeros(8, np.int64), "there are 8 actions and 9 rewards"),
            ("actions", np.full(9, 4), "the action 4 at step 0 is out of its bounds 0 to 3"),
            ("actions", np.full(9, 0.5), "not whole numbers"),
            ("rewards", np.full(9, np.inf), "NaN or infinity in 'reward' at step 0"),
            ("rewards", np.zeros((9, 2)), "has the shape (9, 2)"),
            ("terminations", np.ones(9, bool), "the task ends at step 0, but the episode goes on"),
        ],
    )
    def test_bad_arrays(self, folder: Path, key: str, value: np.ndarray, message: str) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file["episode_2"][key]
            file["episode_2"][key] = value
        text = broken(open_source(folder))
        assert message in text
        assert "a-v0, episode 2" in text

    def test_episodes_without_an_action_are_counted_and_named(self, folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            for key, rows in (("observations", 1), ("actions", 0), ("rewards", 0)):
                value = file["episode_1"][key][:rows]
                del file["episode_1"][key]
                file["episode_1"][key] = value
        source = open_source(folder)
        (note,) = said(source)
        assert "1 of 4 episodes have no action" in note
        assert "the first is episode 1" in note
        assert source.where(1).endswith("episode 2")
        assert source.lengths.tolist() == [5, 9, 3]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"observation_space": "{}"}, "observation_space"),
            ({"action_space": '{"type": "Graph"}'}, "action_space"),
            ({"data_format": "zarr"}, "data format 'zarr'"),
            ({"total_episodes": "four"}, "total_episodes"),
        ],
    )
    def test_bad_metadata(self, folder: Path, change: dict[str, Any], message: str) -> None:
        edit_metadata(folder, **change)
        assert message in refused(folder)

    def test_metadata_that_is_cut_off(self, folder: Path) -> None:
        path = folder / "data" / "metadata.json"
        path.write_text(path.read_text()[:50])
        assert "metadata.json' is not readable as JSON" in refused(folder)

    def test_an_environment_that_is_not_there_is_only_named(self, folder: Path) -> None:
        edit_metadata(folder, env_spec=json.dumps({"id": "Nowhere-v0"}))
        assert open_source(folder).env == "Nowhere-v0"
        path = folder / "data" / "metadata.json"
        about = json.loads(path.read_text())
        del about["action_space"]
        path.write_text(json.dumps(about))
        assert "its environment Nowhere-v0 cannot be built" in refused(folder)

    def test_a_missing_arrow_episode(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        spaces = observation_space(VECTORS), action_space(VECTORS.action)
        folder = minari_at(tmp_path, "a-v0", *spaces, buffers(memory(), "vector"), "arrow")
        (part,) = (folder / "data" / "2").glob("*.arrow")
        part.write_bytes(part.read_bytes()[:100])
        assert "a-v0, episode 2 cannot be read" in broken(open_source(folder))
        shutil.rmtree(folder / "data" / "2")
        assert "a-v0, episode 2: " in refused(folder)


class TestHdf5:
    def test_d4rl(self, tmp_path: Path) -> None:
        given = memory(BOX)
        source = open_source(d4rl_at(tmp_path / "a.hdf5", given))
        assert source.spec == BOX
        assert_same(source, given)
        assert "look like 1 actions in [-1, 1]" in said(source)[0]

    def test_without_next_observations_the_last_one_is_the_one_before(self, tmp_path: Path) -> None:
        given = memory(BOX)
        source = open_source(d4rl_at(tmp_path / "a.hdf5", given, after=False))
        for i, episode in enumerate(given.episodes):
            found = steps(source, i)
            assert np.array_equal(found["obs/vector"][:-1], episode.obs["vector"][:-1])
            assert np.array_equal(found["obs/vector"][-1], episode.obs["vector"][-2])
            assert np.array_equal(found["reward"][1:], episode.reward)
        assert any("no next_observations" in note for note in said(source))

    def test_without_timeouts_next_observations_show_the_cuts(self, tmp_path: Path) -> None:
        given = memory(BOX)
        source = open_source(d4rl_at(tmp_path / "a.hdf5", given, timeouts=None))
        assert_same(source, given)

    def test_the_tail_that_does_not_end_is_left_out_and_said(self, tmp_path: Path) -> None:
        given = memory(BOX)
        ends = np.zeros(18, bool)
        ends[[4, 5, 14]] = True
        path = d4rl_at(tmp_path / "a.hdf5", given, after=False, terminals=ends, timeouts=ends)
        source = open_source(path)
        assert source.lengths.tolist() == [5, 1, 9]
        assert any("its 3 rows are left out" in note for note in said(source))

    def test_float64_is_said_once(self, tmp_path: Path) -> None:
        given = memory(BOX)
        double = np.random.default_rng(0).normal(size=(18, 3))
        source = open_source(d4rl_at(tmp_path / "a.hdf5", given, False, observations=double))
        loaded = Episodes.load(source)
        assert loaded.arrays["obs/vector"].dtype == np.float32
        (note,) = [note for note in loaded.notes if "(float64)" in note]
        assert "vector (float64) is kept as float32" in note

    @pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
    def test_missing_arrays(self, key: str, tmp_path: Path) -> None:
        message = refused(d4rl_at(tmp_path / "a.hdf5", memory(BOX), **{key: None}))
        assert f"lacks ['{key}']" in message

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"timeouts": None, "next_observations": None}, "lacks 'timeouts'"),
            ({"rewards": np.zeros(17)}, "not equally long (actions 18, rewards 17"),
            ({"timeouts": np.zeros(17)}, "timeouts 17"),
            ({"terminals": np.zeros(18), "timeouts": np.zeros(18)}, "no episode of"),
            ({"actions": np.full((18, 1), np.nan)}, "all actions are NaN or infinite"),
            ({"actions": np.full(18, -1)}, "-1 is below 0"),
            ({"actions": np.zeros((18, 2, 2))}, "neither numbers nor vectors"),
            ({"observations": np.zeros((18, 2, 2, 2))}, "at most two-dimensional"),
        ],
    )
    def test_bad_files(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        assert message in refused(d4rl_at(tmp_path / "a.hdf5", memory(BOX), **change))

    def test_nan_is_named_by_file_episode_and_step(self, tmp_path: Path) -> None:
        given = memory(BOX)
        reward = np.concatenate([e.reward for e in given.episodes])
        reward[5 + 1 + 3] = np.nan
        source = open_source(d4rl_at(tmp_path / "a.hdf5", given, rewards=reward))
        assert "a.hdf5, episode 2: NaN or infinity in 'reward' at step 3" in broken(source)
        action = np.concatenate([e.action for e in given.episodes])
        action[5 + 1 + 3] = np.nan
        source = open_source(d4rl_at(tmp_path / "b.hdf5", given, actions=action))
        assert "b.hdf5, episode 2: NaN or infinity in 'action' at step 3" in broken(source)

    def test_actions_out_of_bounds_are_refused_or_clipped(self, tmp_path: Path) -> None:
        write(memory(BOX), tmp_path / "a.hdf5", "hdf5")
        with h5py.File(tmp_path / "a.hdf5", "a") as file:
            file["actions"][7] = 1.5
            file["actions"][8] = 1.00001  # rounding
        source = open_source(tmp_path / "a.hdf5")
        message = broken(source)
        assert "a.hdf5, episode 2: the action [1.5] at step 1" in message
        assert "clip_actions" in message
        clipped = Episodes.load(source, clip=True).arrays["action"]
        assert clipped.max() == 1.0

    def test_no_hdf5_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "a.hdf5").write_bytes(b"")
        assert "not a whole HDF5 file" in refused(tmp_path / "a.hdf5")
        (tmp_path / "b.h5").write_bytes(b"something else")
        assert "not a whole HDF5 file" in refused(tmp_path / "b.h5")

    @settings(max_examples=40, deadline=None)
    @given(share=st.floats(0, 0.999), kind=st.sampled_from(["hdf5", "minari"]))
    def test_a_file_cut_anywhere_is_one_sentence(
        self, share: float, kind: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = tmp_path_factory.mktemp("cut")
        path = folder / ("a.hdf5" if kind == "hdf5" else "a")
        write(memory(), path, kind)
        file = path if kind == "hdf5" else path / "data" / "main_data.hdf5"
        whole = file.read_bytes()
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError) as caught:
            Episodes.load(open_source(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_arrays_of_any_shape_and_type_are_read_or_refused(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Whatever an array is replaced by: never anything but a UserError, and nothing bad in."""
        path = tmp_path_factory.mktemp("fuzz") / "a.hdf5"
        key = data.draw(st.sampled_from(["observations", "actions", "rewards", "terminals"]))
        rows = data.draw(st.sampled_from([0, 1, 17, 18]))
        shape = data.draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
        dtype = data.draw(st.sampled_from(["f8", "f4", "i8", "u1", "?", "S3"]))
        fill = data.draw(st.sampled_from([0, 1, 200, np.nan, -np.inf, 1e300]))
        with np.errstate(all="ignore"):
            value = np.full((rows, *shape), fill if dtype[0] == "f" else 1).astype(dtype)
        d4rl_at(path, memory(BOX), data.draw(st.booleans()), **{key: value})
        try:
            loaded = Episodes.load(open_source(path))
        except UserError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert str(path) in message
            return
        assert all(np.isfinite(array).all() for array in loaded.arrays.values())
        assert loaded.starts[-1] == len(loaded.arrays["reward"])


class TestStores:
    def test_a_store(self, tmp_path: Path) -> None:
        given = memory(IMAGES)
        source = open_source(store_at(tmp_path / "a", given))
        assert source.spec == IMAGES
        assert_same(source, given)

    def test_episodes_that_are_not_whole_are_left_out_and_said(self, tmp_path: Path) -> None:
        store_at(tmp_path / "a", memory())
        with EpisodeStore.open(tmp_path / "a", writable=True) as store:
            store.evict_oldest()  # 16 rows: two episodes and the beginning of the third
            row = {k: np.zeros(f.shape, f.dtype) for k, f in store.fields.items()}
            store.append(1, {**row, "is_first": np.array(True)})
            for first in (True, False):
                store.append(
                    2, {**row, "is_first": np.array(first), "is_last": np.array(not first)}
                )
            store.append(3, {**row, "is_first": np.array(True), "is_last": np.array(True)})
        source = open_source(tmp_path / "a")
        assert source.lengths.tolist() == [3, 1]
        assert source.where(0).endswith("episode 1")
        empty, cut = said(source)
        assert "1 of 3 episodes have no action" in empty
        assert "2 of 5 episodes still run or lost their beginning" in cut

    def test_a_store_without_a_whole_episode(self, tmp_path: Path) -> None:
        store_at(tmp_path / "a", memory(lengths=(20,)))
        with EpisodeStore.open(tmp_path / "a", writable=True) as store:
            store.evict_oldest()
        assert "holds no whole episode" in refused(tmp_path / "a")

    def test_other_steps_are_refused(self, tmp_path: Path) -> None:
        from datamodules.store import Field

        EpisodeStore.create(tmp_path / "a", {"obs/image": Field((4, 4, 3), "uint8")}).close()
        assert "lacks ['is_first', 'is_last']" in refused(tmp_path / "a")
        fields = {key: Field((), "bool") for key in ("is_first", "is_last")}
        fields |= {"reward": Field((), "float32"), "obs/image": Field((4, 4, 3), "uint8")}
        EpisodeStore.create(tmp_path / "b", fields).close()
        assert "lacks ['action']" in refused(tmp_path / "b")

    def test_a_damaged_chunk_is_named(self, tmp_path: Path) -> None:
        path = store_at(tmp_path / "a", memory())
        chunk = path / "chunks" / "00000000.bin"
        raw = bytearray(chunk.read_bytes())
        raw[5] ^= 255
        chunk.write_bytes(raw)
        assert "00000000.bin is damaged" in refused(path)

    def test_the_replay_of_a_run_knows_its_spec_by_the_checkpoint(self, tmp_path: Path) -> None:
        """As it was before stores described themselves."""
        given = memory(BOX, (4, 2))
        for rank in range(2):
            store_at(tmp_path / "replay" / f"rank{rank}", given)
            path = tmp_path / "replay" / f"rank{rank}" / "store.json"
            from datamodules.files import read_json, write_json

            header = read_json(path)
            del header["attributes"]
            write_json(path, header)
        guessed = open_source(tmp_path)
        assert guessed.inferred
        wider = ActionSpec("box", low=(-3.0,), high=(3.0,))
        (tmp_path / "checkpoints").mkdir()
        spec = Spec(BOX.obs, wider).to_dict()
        torch.save({"hyper_parameters": {"spec": spec}}, tmp_path / "checkpoints" / "last.ckpt")
        for path in (tmp_path, tmp_path / "replay"):
            source = open_source(path)
            assert isinstance(source, Joined)
            assert source.spec.action == wider
            assert source.lengths.tolist() == [4, 2, 4, 2]


class TestAdopting:
    def test_guesses_give_way_and_facts_do_not(self, tmp_path: Path) -> None:
        wide = Spec(BOX.obs, ActionSpec("box", low=(-3.0,), high=(3.0,)))
        guessed = open_source(d4rl_at(tmp_path / "a.hdf5", memory(BOX)))
        guessed.adopt(wide, "the model")
        assert guessed.spec == wide
        write(memory(BOX), tmp_path / "b", "store")
        known = open_source(tmp_path / "b")
        with pytest.raises(UserError, match="but the model has"):
            known.adopt(wide, "the model")

    @pytest.mark.parametrize(
        "other",
        [
            VECTORS,
            Spec({"vector": ArraySpec((4,), "float32")}, BOX.action),
            Spec(BOX.obs, ActionSpec("box", low=(-1.0,) * 2, high=(1.0,) * 2)),
        ],
    )
    def test_other_observations_and_actions_never_fit(self, other: Spec, tmp_path: Path) -> None:
        for source in (memory(BOX), open_source(d4rl_at(tmp_path / "a.hdf5", memory(BOX)))):
            with pytest.raises(UserError, match="do not belong together"):
                source.adopt(other, "the environment")

    def test_guesses_of_joined_sources_are_put_together(self) -> None:
        def guessed(kind: str, numbers: tuple[int, ...], bound: float) -> Memory:
            action = ActionSpec("box", low=(-bound,), high=(bound / 2,))
            if kind != "box":
                action = ActionSpec(kind, nvec=numbers)  # type: ignore[arg-type]
            source = memory(Spec(VECTORS.obs, action))
            source.inferred = True
            return source

        for order in (1, -1):
            pair = [guessed("discrete", (2,), 0), guessed("discrete", (3,), 0)]
            assert Joined(pair[::order]).spec.action == ActionSpec("discrete", nvec=(3,))
            pair = [guessed("box", (), 1.9), guessed("box", (), 2.0)]
            joined = Joined(pair[::order])
            assert joined.spec.action == ActionSpec("box", low=(-2.0,), high=(1.0,))
            assert joined.inferred
            with pytest.raises(UserError, match="do not belong together"):
                Joined([guessed("box", (), 1.0), guessed("discrete", (2,), 0)][::order])

    def test_a_recording_need_not_hold_all_discrete_actions(self) -> None:
        more = Spec(VECTORS.obs, ActionSpec("discrete", nvec=(6,)))
        source = memory()
        with pytest.raises(UserError):
            source.adopt(more, "the model")
        source.inferred = True
        source.adopt(more, "the model")
        assert source.spec == more


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.mp4", "is empty (0 bytes)"), ("a.csv", "not a file of recorded data")],
)
def test_other_files_are_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / name).touch()
    assert message in refused(tmp_path / name)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "holds no recorded data" in refused(tmp_path)
    assert "no source is named" in refused([])


def test_recorded_episodes_follow_the_convention() -> None:
    """Spelled out once, by numbers."""
    episode = recorded(VECTORS, (2,))[0]._replace(reward=np.array([5.0, 7.0]), terminal=True)
    found = steps(Memory(VECTORS, [episode]), 0)
    assert found["reward"].tolist() == [0, 5, 7]
    assert found["action"].tolist() == [*episode.action.tolist(), 0]
    assert found["is_first"].tolist() == [True, False, False]
    assert found["is_last"].tolist() == found["is_terminal"].tolist() == [False, False, True]
