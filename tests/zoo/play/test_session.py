"""Dreams that are played, on one whose every pixel is known and on models of the zoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from latent_models import images, sequences, vectors
from toy_dreams import (
    WIDTH,
    Dreamer,
    Judging,
    Silent,
    make_walk,
    place,
    recorded,
    session,
)

from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.dreamer_v1.module import DreamerV1
from zoo.dreamer_v2.module import DreamerV2
from zoo.dreamer_v3.module import DreamerV3
from zoo.planet.module import PlaNet
from zoo.play.curves import SIZE, draw_curves
from zoo.play.session import GAP, DreamSession, checked_action, played_actions
from zoo.play.starts import from_batch, from_env, lead
from zoo.world_models.module import WorldModels

STAY, LEFT, RIGHT = 0, 1, 2


class TestTheDream:
    def test_it_moves_as_it_is_told_and_reality_beside_it(self) -> None:
        playing = session()
        frame = playing.reset(1)
        begun = place(frame.dream.picture)
        moves = [(RIGHT, 1), (RIGHT, 2), (LEFT, 1), (STAY, 1), (LEFT, 0), (LEFT, -1)]
        for step, (action, moved) in enumerate(moves, 1):
            frame = playing.step(action)
            assert place(frame.dream.picture) == begun + moved
            assert frame.reality is not None
            np.testing.assert_array_equal(frame.reality.picture, frame.dream.picture)
            assert frame.step == step

    def test_rewards_values_and_their_sums(self) -> None:
        playing = session()
        frame = playing.reset()
        begun = place(frame.dream.picture)
        assert (frame.dream.reward, frame.dream.total, frame.goes_on) == (None, 0.0, None)
        assert frame.value == 2 * begun
        playing.step(RIGHT)
        frame = playing.step(RIGHT)
        assert frame.dream.reward == pytest.approx((begun + 2) / 10)
        assert frame.dream.total == pytest.approx((2 * begun + 3) / 10)
        assert frame.reality is not None
        assert frame.reality.total == pytest.approx(frame.dream.total)
        assert frame.value == 2 * (begun + 2)
        assert frame.goes_on == 1

    def test_it_ends_where_the_model_thinks_so_and_not_before(self) -> None:
        playing = session()
        frame = playing.reset()
        for _ in range(WIDTH - 1 - place(frame.dream.picture)):
            assert not frame.dream.over
            frame = playing.step(RIGHT)
        assert frame.dream.over and frame.reality is not None and frame.reality.over
        with pytest.raises(UserError, match="the dream is over: reset it"):
            playing.step(STAY)
        assert not playing.reset().dream.over
        playing.step(STAY)

    def test_the_same_actions_give_the_same_dream_and_leave_the_global_noise(self) -> None:
        def rewards(playing: DreamSession, start: int) -> list[float | None]:
            playing.reset(start)
            return [playing.step(STAY).dream.reward for _ in range(4)]

        playing = session(Dreamer(noise=1.0))
        torch.manual_seed(3)
        state = torch.get_rng_state()
        first = rewards(playing, 0)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(set(first)) == 4
        torch.manual_seed(4)
        assert rewards(playing, 0) == first
        assert rewards(session(Dreamer(noise=1.0)), 0) == first
        assert rewards(session(Dreamer(noise=1.0), seed=1), 0) != first

    def test_two_dreams_of_one_model_do_not_disturb_each_other(self) -> None:
        model = Judging()
        one, two = session(model), session(model)
        begun = place(one.reset().dream.picture)
        two.reset()
        two.step(LEFT)
        assert place(one.step(RIGHT).dream.picture) == begun + 1

    def test_the_picture_shows_both_sides(self) -> None:
        frame = session().reset()
        height, width = frame.dream.picture.shape[:2]
        assert frame.picture.shape == (height, 2 * width + GAP, 3)
        np.testing.assert_array_equal(frame.picture[:, :width], frame.dream.picture)
        alone = DreamSession(Judging(), from_env(Judging(), make_walk, 1)).reset()
        assert alone.reality is None
        np.testing.assert_array_equal(alone.picture, alone.dream.picture)

    def test_what_is_not_there_is_none(self) -> None:
        assert session(Dreamer()).reset().value is None
        playing = DreamSession(Silent(), from_batch(Silent(), recorded(*range(8))), make_walk)
        frame = playing.step(RIGHT)
        assert frame.dream.reward is None and frame.dream.total == 0
        assert frame.reality is None, "latent actions mean nothing to an environment"


class TestReality:
    def test_it_stands_still_once_it_is_over_while_the_dream_goes_on(self) -> None:
        class Endless(Dreamer):
            def imagine(self, state: Any, actions: Any, horizon: int) -> Any:
                dream = super().imagine(state, actions, horizon)
                return dream._replace(cont=torch.ones_like(dream.cont))

        playing = session(Endless())
        for _ in range(WIDTH):
            frame = playing.step(RIGHT)
        assert frame.reality is not None and frame.reality.over and not frame.dream.over
        total = frame.reality.total
        frame = playing.step(RIGHT)
        assert frame.reality is not None and frame.reality.total == total

    def test_an_environment_that_does_not_repeat_itself_is_not_shown(self) -> None:
        starts = from_env(Judging(), make_walk, 2)
        playing = DreamSession(Judging(), starts, lambda: make_walk(repeats=False))
        assert not playing.repeats
        assert playing.step(RIGHT).reality is None
        assert session().repeats

    def test_one_that_fails_is_a_sentence(self) -> None:
        playing = session()
        playing.reset()
        assert playing._env is not None
        del playing._env.unwrapped.place  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"environment failed with AttributeError.*reset"):
            playing.step(STAY)
        playing.reset()
        assert playing.step(STAY).reality is not None


class TestStarts:
    def test_each_is_further_into_its_episode_and_the_environment_gets_there(self) -> None:
        starts = from_env(Judging(), make_walk, 4, context=3)
        env = make_walk()
        for number, start in enumerate(starts, 1):
            assert start.actions is not None and len(start.actions) == 3 * number
            np.testing.assert_array_equal(lead(env, start)["image"], start.obs["image"])
            assert int(start.state["place"]) == place(start.obs["image"])
        assert len({start.seed for start in starts}) == 4

    def test_episodes_that_end_before_are_left_at_their_last_step(self) -> None:
        (start,) = from_env(Judging(), make_walk, 1, context=3000)
        assert start.actions is not None and 0 < len(start.actions) < 3000
        assert place(start.obs["image"]) == WIDTH - 2

    def test_recorded_ones_are_spread_evenly(self) -> None:
        batch = recorded(*range(1, 13))
        starts = from_batch(Judging(), batch, 3)
        assert [place(start.obs["image"]) for start in starts] == [1, 6, 12]
        assert [int(start.state["place"]) for start in starts] == [1, 6, 12]
        playing = DreamSession(Judging(), starts, make_walk)
        assert place(playing.reset(1).dream.picture) == 6
        assert playing.reset(1).reality is None, "nobody knows how to get there"

    def test_recordings_without_context_are_refused(self) -> None:
        batch = recorded(1, 2, 3)
        batch["is_first"][:] = False
        with pytest.raises(UserError, match="no recorded sequence has 5 steps"):
            from_batch(Judging(), batch)

    def test_one_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(UserError, match="no start 3: choose 0 to 2"):
            session().reset(3)
        with pytest.raises(UserError, match="no real step"):
            DreamSession(Judging(), [])


class TestActions:
    @pytest.mark.parametrize("action", [3, -1, 0.5, float("nan"), [1], "left", None])
    def test_those_that_do_not_exist_are_refused(self, action: Any) -> None:
        with pytest.raises(UserError, match="action"):
            session().step(action)

    def test_continuous_ones_are_clipped(self) -> None:
        spec = ActionSpec("box", low=(-1.0, 0.0), high=(1.0, 1.0))
        np.testing.assert_array_equal(checked_action([-3, 0.5], spec), np.float32([-1, 0.5]))
        assert checked_action([0, 0], spec).dtype == np.float32
        several = ActionSpec("multi_discrete", nvec=(2, 4))
        np.testing.assert_array_equal(checked_action([1, 3], several), [1, 3])
        with pytest.raises(UserError, match=r"\[2, 4\] choices"):
            checked_action([2, 0], several)

    def test_a_model_that_finds_actions_is_played_with_those(self) -> None:
        assert played_actions(Silent()) == ActionSpec("discrete", nvec=(3,))
        assert played_actions(Judging()) == Judging.spec.action

    def test_models_that_cannot_be_played_are_refused(self) -> None:
        with pytest.raises(UserError, match="a Linear is no Imaginer"):
            played_actions(torch.nn.Linear(1, 1))
        blind = Dreamer()
        blind.spec = Silent.spec
        with pytest.raises(UserError, match="know no actions"):
            played_actions(blind)


@pytest.mark.parametrize(
    ("cls", "see", "action"),
    [
        (DreamerV1, vectors, "box"),
        (DreamerV2, vectors, "discrete"),
        (DreamerV3, images, "multi_discrete"),
        (PlaNet, vectors, "box"),
        (WorldModels, vectors, "discrete"),
    ],
)
def test_models_of_the_zoo_are_played(cls: Any, see: Any, action: str) -> None:
    torch.manual_seed(0)
    spec = see(action)
    model = cls(spec, size="nano").eval()
    playing = DreamSession(model, from_batch(model, sequences(spec), 2))
    frame = playing.step(spec.action.sample(np.random.default_rng(0)))
    assert frame.dream.picture.shape == ((64, 64, 3) if see is images else (*SIZE, 3))
    assert frame.dream.reward is not None
    assert (frame.value is None) == (cls in (PlaNet, WorldModels))


def test_curves_grow_from_the_right_edge_and_are_as_high_as_they_should() -> None:
    def rows(picture: np.ndarray, column: int) -> np.ndarray:
        coloured = (picture[:, column].max(-1) - picture[:, column].min(-1).astype(int)) > 100
        return np.flatnonzero(coloured)

    one = draw_curves(np.array([[0.0], [1.0]]), 64)
    assert one.shape == (*SIZE, 3) and one.dtype == np.uint8
    assert rows(one, SIZE[1] - 1).min() < 3
    assert not len(rows(one, SIZE[1] - 10))
    low = draw_curves(np.full((64, 1), -5.0), 64)
    assert rows(low, 10).min() > SIZE[0] - 6
