"""Clips: against loops over the episodes; where they lie; cropping, splitting and resuming."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fitting import Model, Validated, as_rank, fit, same
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import IMAGES, VECTORS, Memory, buffers, memory, minari_at, store_at

from datamodules import OfflineDataModule, UserError, VideoDataModule
from datamodules.clips import Clips
from datamodules.envs.factory import make_env
from datamodules.episodes import Episodes
from datamodules.mapped_rows import MappedRows
from datamodules.sources.opening import open_source
from datamodules.sources.source import Recorded, step_fields
from datamodules.sources.writing import append_episode, store_attributes, write
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.store import EpisodeStore

LENGTHS = tuple(4 + i % 7 for i in range(20))
SMALL = Spec({"image": ArraySpec((8, 6, 3), "uint8")}, ActionSpec("discrete", nvec=(4,)))


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(store_at(tmp_path / "data", memory(IMAGES, LENGTHS)))


def silent_at(path: Path, lengths: tuple[int, ...], fps: list[float] | None = None) -> str:
    """A store of video without actions and rewards."""
    video = memory(Spec(SMALL.obs), lengths)
    video.fps = None if fps is None else np.array(fps)
    write(video, path, "store")
    return str(path)


def rows_are_images(data: VideoDataModule, batch: dict[str, Any]) -> bool:
    """Whether the frames of a batch are those of its step ids, read one by one."""
    everything = open_source(data.source)
    images = np.concatenate([everything.read(i).obs["image"] for i in range(len(LENGTHS))])
    return np.array_equal(batch["obs"]["image"], images[batch["step_id"]])


class TestClips:
    @settings(max_examples=30, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).map(tuple),
        length=st.integers(1, 6),
        step=st.sampled_from([1.0, 2.0, 3.0, 0.5, 1.25, 2.5]),
        data=st.data(),
    )
    def test_every_clip_of_the_chosen_episodes_and_no_other(
        self, lengths: tuple[int, ...], length: int, step: float, data: st.DataObject
    ) -> None:
        episodes = Episodes.load(memory(VECTORS, lengths))
        numbers = st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True)
        chosen = sorted(data.draw(numbers))
        times = [round(t * step) for t in range(length)]
        expected = [
            tuple(episodes.starts[e] + begin + t for t in times)
            for e in chosen
            for begin in range(lengths[e] + 1)
            if begin + times[-1] <= lengths[e]
        ]
        steps = np.full(len(lengths), step)
        if not expected:
            with pytest.raises(UserError, match=f"has the {times[-1] + 1} frames of a clip"):
                Clips(episodes, chosen, length, 0, steps)
            return
        clips = Clips(episodes, chosen, length, 0, steps)
        assert clips.num_clips == len(expected)
        drawn = Counter(map(tuple, clips.sample(60 * len(expected))["step_id"].tolist()))
        assert set(drawn) == set(expected)
        assert max(drawn.values()) < 130 and min(drawn.values()) > 20  # 60 each, but for chance
        once = np.concatenate([batch["step_id"] for batch in clips.all(3)])
        assert set(map(tuple, once.tolist())) <= set(expected)
        if step >= 1:  # no frame twice, and only ends of episodes left out
            assert len(np.unique(once)) == once.size
        for e in chosen:
            mine = [row for row in once[:, 0] if episodes.starts[e] <= row < episodes.starts[e + 1]]
            assert len(mine) == (lengths[e] + 1) // (times[-1] + 1)

    def test_a_batch(self, source: str) -> None:
        data = VideoDataModule(source, batch_size=3, clip_length=4)
        batch = data.next_batch()
        assert data.spec == IMAGES
        kinds = {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if k != "obs"}
        flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), ((3, 4), torch.bool))
        assert kinds == {
            **flags,
            "action": ((3, 4, 2), torch.float32),
            "reward": ((3, 4), torch.float32),
            "step_id": ((3, 4), torch.int64),
        }
        assert batch["obs"]["image"].shape == (3, 4, 40, 36, 3)
        assert batch["obs"]["image"].dtype == torch.uint8
        assert batch["obs"]["pose"].shape == (3, 4, 2)
        assert rows_are_images(data, batch)
        rows = batch["step_id"].numpy()
        for key in ("action", "reward", "is_last", "is_terminal"):
            assert np.array_equal(batch[key], data.episodes.arrays[key][rows])
        assert len(VideoDataModule(source, updates_per_epoch=7).train_dataloader()) == 7

    def test_frames_that_are_not_consecutive_have_no_action(self, source: str) -> None:
        batch = VideoDataModule(source, clip_length=2, stride=3).next_batch()
        assert set(batch) == {"obs", "is_first", "is_last", "is_terminal", "step_id"}
        assert (batch["step_id"].diff(dim=1) == 3).all()

    def test_what_was_done_between_the_frames_can_be_kept(self, source: str) -> None:
        options: dict[str, Any] = {"clip_length": 3, "stride": 2, "stack_actions": True}
        data = VideoDataModule(source, batch_size=64, **options)
        batch = data.next_batch()
        action, reward = (data.episodes.arrays[key] for key in ("action", "reward"))
        assert batch["action"].shape == (64, 3, 2, 2)
        ended = 0
        for i, t in np.ndindex(64, 3):
            row = int(batch["step_id"][i, t])
            episode = int(np.searchsorted(data.episodes.starts, row, side="right")) - 1
            first, stop = data.episodes.starts[[episode, episode + 1]]
            done = [action[r] if r < stop else np.zeros(2) for r in (row, row + 1)]
            assert np.array_equal(batch["action"][i, t], np.stack(done).astype(np.float32))
            earned = sum(float(reward[r]) for r in (row - 1, row) if r >= first)
            assert float(batch["reward"][i, t]) == earned
            ended += row + 1 >= stop
        assert ended > 0
        alone = VideoDataModule(source, clip_length=3, stack_actions=True).next_batch()
        assert alone["action"].shape == (16, 3, 2)

    def test_a_rate_takes_the_nearest_frames(self, tmp_path: Path) -> None:
        path = silent_at(tmp_path / "known", (40, 40), [30.0, 12.0])
        rows = VideoDataModule(path, 200, clip_length=4, fps=8).next_batch()["step_id"]
        offsets = {int(row[0]) > 40: (row - row[0]).tolist() for row in rows}
        # 30 / 8 = 3.75 and 12 / 8 = 1.5 frames apart; a half goes to the even one.
        assert offsets == {False: [0, 4, 8, 11], True: [0, 2, 3, 4]}
        rows = VideoDataModule(path, 200, 4, stride=2, fps=15).next_batch()["step_id"]
        assert (rows - rows[:, :1]).unique(dim=0).tolist() == [[0, 2, 3, 5], [0, 4, 8, 12]]
        path = silent_at(tmp_path / "half", (40, 40), [30.0, float("nan")])
        with pytest.raises(UserError, match=r"fps=8 needs the frame rate .*half, episode 1 does"):
            VideoDataModule(path, fps=8).next_batch()
        path = silent_at(tmp_path / "unknown", (40, 40))
        with pytest.raises(UserError, match="episode 0 does not tell"):
            VideoDataModule(path, fps=8).next_batch()

    def test_short_episodes_are_left_out_and_counted(self, source: str) -> None:
        data = VideoDataModule(source, clip_length=8, validation=0.25)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            long = [i for i, n in enumerate(LENGTHS) if n + 1 >= 8]
            assert sorted([*data.train_episodes, *data.val_episodes]) == long
        told = [str(w.message) for w in caught if "shorter" in str(w.message)]
        assert told == [
            f"{source}: {20 - len(long)} of 20 episodes are shorter than a clip and are left out, "
            f"the first is {source}, episode 0"
        ]
        with pytest.raises(UserError, match=r"no episode .* has the 31 frames .* longest has 11"):
            _ = VideoDataModule(source, clip_length=16, stride=2).train_episodes

    def test_video_without_actions(self, tmp_path: Path) -> None:
        path = silent_at(tmp_path / "videos", (9, 5))
        data, model = VideoDataModule(path, clip_length=4), Model(spec=Spec(SMALL.obs))
        fit(model, data, 1)
        assert data.spec.action is None
        assert set(model.batches[0]) == {"obs", "is_first", "is_last", "is_terminal", "step_id"}
        acting = Model(spec=SMALL)
        with pytest.raises(UserError, match=r"videos has .* no actions, but the model has"):
            fit(acting, VideoDataModule(path, clip_length=4), 1)
        with pytest.raises(UserError, match="videos is video without actions"):
            _ = OfflineDataModule(path).spec

    def test_a_model_without_use_for_actions_takes_any(self, source: str) -> None:
        model = Model(spec=Spec(IMAGES.obs))
        fit(model, VideoDataModule(source, clip_length=3), 1)
        assert "action" not in model.batches[0]


class TestWhereItLies:
    def test_images_of_a_store_stay_where_they_are(self, source: str) -> None:
        data = VideoDataModule(source, clip_length=3)
        images = data.episodes.arrays["obs/image"]
        assert isinstance(images, MappedRows)
        assert not any(part.flags.writeable or part.flags.owndata for part in images.parts)
        whole = OfflineDataModule(source).episodes
        assert whole.arrays.keys() == data.episodes.arrays.keys()
        assert np.array_equal(whole.starts, data.episodes.starts)
        for key, array in whole.arrays.items():
            assert np.array_equal(data.episodes.arrays[key][:], array)

    def test_streams_and_episodes_that_are_not_whole(self, tmp_path: Path) -> None:
        episodes = Episodes.load(memory(IMAGES, (6, 3, 9, 4)))
        fields = step_fields(IMAGES)
        with EpisodeStore.create(
            tmp_path / "a", fields, 4, store_attributes(IMAGES, None)
        ) as store:
            for number, stream in ((0, 1), (1, 0), (2, 1), (3, 0)):
                rows = slice(*episodes.starts[[number, number + 1]])
                append_episode(store, stream, {k: v[rows] for k, v in episodes.arrays.items()})
            for stream in (0, 1):
                append_episode(store, stream, {k: v[:2] for k, v in episodes.arrays.items()})
        mapped = VideoDataModule(str(tmp_path / "a"), clip_length=2).episodes
        order = [1, 3, 0, 2]
        assert (np.diff(mapped.starts) - 1).tolist() == [(6, 3, 9, 4)[i] for i in order]
        rows = np.concatenate([np.arange(*episodes.starts[[i, i + 1]]) for i in order])
        assert np.array_equal(mapped.arrays["obs/image"][:], episodes.arrays["obs/image"][rows])

    def test_the_replay_of_a_run_and_joined_stores(self, tmp_path: Path) -> None:
        for rank in range(2):
            (tmp_path / "run" / "replay").mkdir(parents=True, exist_ok=True)
            store_at(tmp_path / "run" / "replay" / f"rank{rank}", memory(IMAGES, (5, 7), rank))
        data = VideoDataModule(str(tmp_path / "run"), clip_length=3)
        expected = OfflineDataModule(str(tmp_path / "run")).episodes.arrays["obs/image"]
        assert isinstance(data.episodes.arrays["obs/image"], MappedRows)
        assert np.array_equal(data.episodes.arrays["obs/image"][:], expected)
        other = store_at(tmp_path / "other", memory(IMAGES, (4,), 5))
        joined = VideoDataModule([str(tmp_path / "run"), str(other)], clip_length=3)
        assert joined.episodes.num_episodes == 5
        assert isinstance(joined.episodes.arrays["obs/image"], MappedRows)

    def test_what_must_be_resized_is_read(self, source: str, tmp_path: Path) -> None:
        cache = str(tmp_path / "cache")
        data = VideoDataModule(source, clip_length=3, size=8, cache=cache)
        assert data.spec.obs["image"].shape == (8, 8, 3)
        images = data.episodes.arrays["obs/image"]
        assert isinstance(images, np.ndarray) and isinstance(images.base, np.memmap)
        assert np.array_equal(
            images, OfflineDataModule(source, size=8).episodes.arrays["obs/image"]
        )
        assert data.next_batch()["obs"]["image"].shape == (16, 3, 8, 8, 3)

    def test_minari_sets_with_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        spaces = gym.spaces.Box(0, 255, (8, 6, 3), np.uint8), gym.spaces.Discrete(4)
        given_ = memory(SMALL, (5, 6))
        minari_at(tmp_path, "pictures-v0", *spaces, buffers(given_, "image"), jpeg=False)
        data = VideoDataModule("pictures-v0", clip_length=3)
        batch = data.next_batch()
        images = np.concatenate([given_.read(i).obs["image"] for i in range(2)])
        assert np.array_equal(batch["obs"]["image"], images[batch["step_id"]])
        assert batch["action"].shape == (16, 3)

    def test_without_images_it_is_no_video(self, tmp_path: Path) -> None:
        path = store_at(tmp_path / "a", memory(VECTORS))
        with pytest.raises(UserError, match=r"has no images, .* use OfflineDataModule"):
            _ = VideoDataModule(str(path)).spec

    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
        data=st.data(),
    )
    def test_mapped_rows_are_those_of_one_array(
        self, sizes: list[int], data: st.DataObject
    ) -> None:
        whole = np.arange(sum(sizes) * 6, dtype=np.int32).reshape(-1, 2, 3)
        mapped = MappedRows(np.split(whole, np.cumsum(sizes)[:-1]))
        index = st.integers(0, len(whole) - 1)
        rows = np.array(data.draw(st.lists(st.tuples(index, index), max_size=9)), np.int64)
        rows = rows.reshape(-1, 2)
        assert np.array_equal(mapped.take(rows, 0), whole[rows])
        assert (mapped.shape, mapped.ndim, mapped.dtype) == (whole.shape, 3, whole.dtype)
        assert len(mapped) == len(whole)
        assert np.array_equal(mapped[1:3], whole[1:3])


class TestCrop:
    def test_is_the_same_within_a_clip_and_elsewhere_in_the_next(self, source: str) -> None:
        data = VideoDataModule(source, batch_size=100, clip_length=3, crop=32)
        assert data.spec.obs["image"].shape == (32, 32, 3)
        assert data.spec.action == IMAGES.action
        batch = data.next_batch()
        images = data.episodes.arrays["obs/image"][batch["step_id"].numpy()]
        found = []
        for clip, whole in zip(batch["obs"]["image"].numpy(), images, strict=True):
            places = [
                (x, y)
                for x in range(5)
                for y in range(9)
                if np.array_equal(whole[:, y : y + 32, x : x + 32], clip)
            ]
            found += places
        assert len(found) == 100
        assert {x for x, _ in found} == set(range(5))
        assert {y for _, y in found} == set(range(9))
        again = VideoDataModule(source, batch_size=100, clip_length=3, crop=32).next_batch()
        assert same(batch, again)

    def test_is_in_the_middle_in_validation(self, source: str) -> None:
        data = VideoDataModule(source, batch_size=4, clip_length=3, crop=32, validation=0.25)
        for batch in data.val_dataloader():
            images = data.episodes.arrays["obs/image"][batch["step_id"].numpy()]
            assert np.array_equal(batch["obs"]["image"], images[:, :, 4:36, 2:34])
        held = data.validation_episodes(2, 5)
        assert held is not None
        assert held.batch["obs"]["image"].shape == (2, 6, 32, 32, 3)

    def test_the_model_knows_the_cropped_spec(self, source: str) -> None:
        spec = Spec(
            {**IMAGES.obs, "image": ArraySpec((32, 32, 3), "uint8")},
            ActionSpec("box", low=(-1.0, -2.0), high=(1.0, 2.0)),
        )
        model = Model(spec=spec)
        fit(model, VideoDataModule(source, clip_length=3, crop=32), 1)
        with pytest.raises(UserError, match="they do not belong together"):
            fit(Model(spec=IMAGES), VideoDataModule(source, clip_length=3, crop=32), 1)

    def test_what_cannot_be_cropped(self, source: str) -> None:
        with pytest.raises(UserError, match=r"crop=37 does not fit .* which are 40 x 36"):
            _ = VideoDataModule(source, crop=37).spec
        with pytest.raises(UserError, match="less than the environment does"):
            VideoDataModule(source, crop=32, env="CartPole-v1")


class TestSplit:
    def test_is_by_episode(self, source: str) -> None:
        data, model = VideoDataModule(source, 32, clip_length=3, validation=0.25), Validated()
        fit(model, data, 30, num_sanity_val_steps=0, val_check_interval=30)
        held = {row for e in data.val_episodes for row in range(*data.episodes.starts[[e, e + 1]])}
        seen = torch.cat([batch["step_id"].flatten() for batch in model.batches]).tolist()
        assert len(set(seen)) > 80
        assert held.isdisjoint(seen)
        validated = torch.cat([b["step_id"].flatten() for b in model.validated]).tolist()
        assert set(validated) <= held
        lengths = data.episodes.lengths[data.val_episodes] + 1
        assert len(validated) == len(set(validated)) == (lengths // 3 * 3).sum()
        assert VideoDataModule(source, clip_length=3).val_dataloader() == []

    def test_whole_episodes_that_are_held_out(self, source: str) -> None:
        data = VideoDataModule(source, clip_length=3, validation=0.25)
        found = data.validation_episodes(3, 6)
        expected = OfflineDataModule(source, validation=0.25).validation_episodes(3, 6)
        assert found is not None and expected is not None
        assert torch.equal(found.length, expected.length)
        assert torch.equal(found.terminal, expected.terminal)
        for key in ("image", "pose"):
            assert torch.equal(found.batch["obs"][key], expected.batch["obs"][key])
        assert torch.equal(found.batch["action"], expected.batch["action"])
        every = VideoDataModule(source, clip_length=3, stride=2, validation=0.25)
        strided = every.validation_episodes(3, 6)
        assert strided is not None
        assert strided.length.tolist() == [
            int(n) // 2 + 1 for n in every.episodes.lengths[every.val_episodes[[0, 2, 4]]]
        ]
        whole = data.validation_episodes(3, 100)
        assert whole is not None
        for i, n in enumerate(strided.length.tolist()):
            image = strided.batch["obs"]["image"][i]
            assert torch.equal(image[:n], whole.batch["obs"]["image"][i, : 2 * n : 2])
            assert not image[n:].any()
        everything = VideoDataModule(source, clip_length=3)
        assert everything.validation_episodes(3, 4) is None
        image = everything.some_episodes(1, 2).batch["obs"]["image"]
        start = everything.episodes.starts[0]
        recorded = everything.episodes.arrays["obs/image"][start : start + 3]
        np.testing.assert_array_equal(image[0], recorded)


class TestResume:
    def test_goes_on_bit_for_bit(self, source: str, tmp_path: Path) -> None:
        def data() -> VideoDataModule:
            return VideoDataModule(source, batch_size=3, clip_length=3, crop=8)

        whole, first, second = Model(), Model(), Model()
        fit(whole, data(), 9)
        fit(first, data(), 4).save_checkpoint(tmp_path / "4.ckpt")
        fit(second, data(), 9, ckpt_path=tmp_path / "4.ckpt")
        assert len(second.batches) == 5
        for mine, expected in zip([*first.batches, *second.batches], whole.batches, strict=True):
            assert same(mine, expected)
        assert [*first.noise, *second.noise] == whole.noise
        assert not same(whole.batches[0], whole.batches[1])

    def test_another_seed_draws_others(self, source: str) -> None:
        one = VideoDataModule(source, clip_length=3).next_batch()
        assert not same(one, VideoDataModule(source, clip_length=3, seed=1).next_batch())

    def test_of_other_clips_is_refused(self, source: str, tmp_path: Path) -> None:
        fit(Model(), VideoDataModule(source, clip_length=3), 1).save_checkpoint(tmp_path / "1.ckpt")
        for options, message in (
            ({"clip_length": 4}, "clip length 3, this run 4"),
            ({"clip_length": 3, "stride": 2}, "number of clips"),
            ({"clip_length": 3, "crop": 8}, "crop None, this run 8"),
        ):
            with pytest.raises(UserError, match=message):
                fit(Model(), VideoDataModule(source, **options), 2, ckpt_path=tmp_path / "1.ckpt")


class TestRanks:
    def test_each_draws_from_a_share_of_its_own(self, source: str) -> None:
        seen = []
        for rank in range(3):
            data = as_rank(VideoDataModule(source, 200, clip_length=3), rank, 3)
            seen.append(set(data.next_batch()["step_id"].flatten().tolist()))
        assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]
        assert sum(map(len, seen)) == sum(LENGTHS) + 20

    def test_more_ranks_than_episodes_share_all(self, tmp_path: Path) -> None:
        path = str(store_at(tmp_path / "a", memory(IMAGES, (40,))))
        ranks = [as_rank(VideoDataModule(path, clip_length=4), r, 2) for r in range(2)]
        batches = [data.next_batch()["step_id"] for data in ranks]
        assert not torch.equal(batches[0], batches[1])


class TestVideoFiles:
    @pytest.fixture
    def videos(self, tmp_path: Path) -> Memory:
        """Four files in tmp_path/videos, at 30 frames per second."""
        made = memory(SMALL, (9, 12, 9, 3))
        write(made, tmp_path / "videos", "video", lossless=True)
        return made

    def test_are_decoded_once_and_drawn_in_place(self, videos: Memory, tmp_path: Path) -> None:
        ingest = str(tmp_path / "store")
        data = VideoDataModule(str(tmp_path / "videos"), clip_length=5, ingest=ingest)
        assert data.spec == Spec(SMALL.obs)
        batch = data.next_batch()
        images = np.concatenate([videos.read(i).obs["image"] for i in range(4)])
        assert isinstance(data.episodes.arrays["obs/image"], MappedRows)
        assert np.array_equal(batch["obs"]["image"], images[batch["step_id"]])
        assert "action" not in batch
        assert data.train_episodes.tolist() == [0, 1, 2]
        again = VideoDataModule(ingest, clip_length=5)
        assert same(batch, again.next_batch())

    def test_their_rate_is_known(self, videos: Memory, tmp_path: Path) -> None:
        options: dict[str, Any] = {"ingest": str(tmp_path / "store"), "clip_length": 3}
        data = VideoDataModule(str(tmp_path / "videos"), fps=10, **options)
        assert (data.next_batch()["step_id"].diff(dim=1) == 3).all()

    def test_broken_ones_stop_it_or_are_skipped(self, videos: Memory, tmp_path: Path) -> None:
        broken = sorted((tmp_path / "videos").iterdir())[1]
        broken.write_bytes(broken.read_bytes()[:200])
        folder, store = str(tmp_path / "videos"), str(tmp_path / "store")
        with pytest.raises(UserError, match=broken.name):
            _ = VideoDataModule(folder, ingest=store).spec
        data = VideoDataModule(folder, clip_length=5, ingest=store, errors="skip")
        assert data.episodes.num_episodes == 3
        assert any(broken.name in note for note in data.episodes.notes)

    def test_are_cut_and_resized_on_the_way_in(self, videos: Memory, tmp_path: Path) -> None:
        options: dict[str, Any] = {"clip_length": 5, "size": 6}
        folder = str(tmp_path / "videos")
        squeezed = VideoDataModule(folder, ingest=str(tmp_path / "a"), **options)
        cut = VideoDataModule(folder, ingest=str(tmp_path / "b"), square=True, **options)
        assert squeezed.spec.obs["image"].shape == cut.spec.obs["image"].shape == (6, 6, 3)
        first = videos.read(0).obs["image"][0]
        assert np.array_equal(cut.episodes.arrays["obs/image"][:1][0], first[1:7])
        assert not np.array_equal(squeezed.episodes.arrays["obs/image"][:1][0], first[1:7])


def test_an_environment_may_show_more_than_was_recorded(tmp_path: Path) -> None:
    env = make_env("zoo/TwoRooms-v0", time_limit=6)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    episodes = []
    for seed in range(3):
        frames, actions = [env.reset(seed=seed)[0]["image"]], []
        for _ in range(6):
            actions.append(env.action_space.sample())
            frames.append(env.step(actions[-1])[0]["image"])
        obs = {"image": np.stack(frames)}
        episodes.append(Recorded(obs, np.stack(actions), np.zeros(6, np.float32), False))
    path = store_at(tmp_path / "a", Memory(spec, episodes))
    goal = {"goal_in_obs": True}
    data = VideoDataModule(str(path), clip_length=3, env="zoo/TwoRooms-v0", env_kwargs=goal)
    assert data.spec == spec
    assert data.next_batch()["obs"]["image"].shape == (16, 3, 33, 33, 2)
    assert set(data.make_env().reset(seed=0)[0]) == {"image", "goal"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"clip_length": 0}, "clip_length >= 1"),
        ({"stride": 0}, "stride >= 1"),
        ({"crop": 0}, "crop >= 1"),
        ({"fps": 0.0}, "positive fps"),
        ({"fps": float("inf")}, "positive fps"),
        ({"stack_actions": True, "fps": 5}, "leave fps out"),
        ({"errors": "ignore"}, "choose stop or skip"),
        ({"validation": 1.0}, "validation"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoDataModule("anything", **options)
