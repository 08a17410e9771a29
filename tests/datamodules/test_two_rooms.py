"""The dot, the wall, the door, and the policies that need no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.envs import two_rooms, two_rooms_policies
from datamodules.envs.factory import make_env
from datamodules.envs.two_rooms import (
    NEAR_DOOR,
    ROOMS,
    TwoRooms,
    is_free,
    move,
    render_positions,
    sample_near_doors,
    sample_tasks,
    sample_walls,
)
from datamodules.envs.two_rooms_policies import (
    noisy_line,
    random_walk,
    straight_line,
    success_rate,
)
from datamodules.errors import UserError
from datamodules.spec import Spec

SIZES = st.sampled_from([33, 65])
KINDS = st.sampled_from(["fixed", "random"])
SEEDS = st.integers(0, 2**32 - 1)


def walk(rng: np.random.Generator, size: int, kind: str, steps: int) -> Any:
    """Positions (T, N, 2) of dots that are pushed about, actions (T - 1, N, 2) and walls (N, 2)."""
    tasks = sample_tasks(rng, 64, kind, size)
    # Many go straight for the door, or along the walls: there mistakes would be.
    drift = np.sign(tasks.wall - tasks.start) * rng.integers(-1, 2, (64, 2))
    positions, actions = [tasks.start], []
    for _ in range(steps):
        actions.append(np.clip(drift + rng.normal(0, 0.5, (64, 2)) * rng.integers(2), -1, 1))
        positions.append(move(positions[-1], actions[-1], tasks.wall, size))
    return np.stack(positions), np.stack(actions), tasks.wall


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, size=SIZES, kind=KINDS)
def test_never_in_a_wall_and_never_through_it_but_by_the_door(
    seed: int, size: int, kind: str
) -> None:
    positions, actions, walls = walk(np.random.default_rng(seed), size, kind, 60)
    rooms = ROOMS[size]
    assert is_free(positions, walls, size).all()
    before, after = positions[:-1], positions[1:]
    shift = after - before
    assert (np.abs(shift) <= rooms.step * np.abs(actions) + 1e-9).all()
    # Straight: the way is a share in [0, 1] of the action's.
    cross = shift[..., 0] * actions[..., 1] - shift[..., 1] * actions[..., 0]
    assert np.abs(cross).max() < 1e-9
    # All the way is free, not only its ends.
    for share in np.linspace(0, 1, 41):
        path = before + share * shift
        inside = np.abs(path[..., 0] - walls[:, 0]) < rooms.thickness / 2 - 1e-9
        off_door = np.abs(path[..., 1] - walls[:, 1]) > rooms.door / 2 + 1e-9
        assert not (inside & off_door).any()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, size=SIZES, kind=KINDS)
def test_what_a_wall_does_not_stop_goes_all_the_way(seed: int, size: int, kind: str) -> None:
    positions, actions, walls = walk(np.random.default_rng(seed), size, kind, 20)
    wanted = positions[:-1] + ROOMS[size].step * actions
    path = positions[:-1] + np.linspace(0, 1, 50)[:, None, None, None] * (wanted - positions[:-1])
    stopped = np.abs(positions[1:] - wanted).max(-1) > 1e-9
    assert stopped[~is_free(path, walls, size).all(0)].all()
    assert stopped.any()
    # The dot stops a hair's breadth before a wall, so the way has to be clear of it by more.
    hair = 0.02 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    clear = np.all([is_free(path + aside, walls, size).all(0) for aside in hair], 0)
    assert not stopped[clear].any()
    assert clear.mean() > 0.2


def test_crosses_the_door_and_is_stopped_beside_it() -> None:
    wall = np.array([16.0, 16.0])
    right = np.array([1.0, 0.0])
    assert move(np.array([15.0, 16.0]), right, wall).tolist() == [17.0, 16.0]
    assert move(np.array([15.0, 18.4]), right, wall)[0] == 17.0
    assert 15.49 < move(np.array([15.0, 18.6]), right, wall)[0] < 15.5
    assert 1.5 < move(np.array([2.0, 5.0]), -right, wall)[0] < 1.51
    # Stopped means stopped: it does not slide on along the wall.
    x, y = move(np.array([15.0, 5.0]), np.array([1.0, 1.0]), wall)
    assert (x < 15.5) and y == pytest.approx(5.5, abs=0.01)
    # And it gets away again, back or along the wall.
    assert move(np.array([x, y]), -right, wall)[0] == pytest.approx(x - 2)
    assert move(np.array([x, y]), np.array([0.0, 1.0]), wall).tolist() == [x, y + 2]
    assert move(np.array([x, y]), right, wall)[0] == pytest.approx(x, abs=1e-6)
    # In the door its posts stop it.
    assert move(np.array([16.0, 16.0]), np.array([0.0, 1.0]), wall)[1] == 18.0
    assert 18.49 < move(np.array([16.0, 17.0]), np.array([0.0, 1.0]), wall)[1] < 18.5


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, size=SIZES, kind=KINDS)
def test_the_dot_is_where_it_is_drawn(seed: int, size: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    tasks = sample_tasks(rng, 20, kind, size)
    images = render_positions(tasks.start, tasks.wall, size)
    assert images.shape == (20, size, size, 2) and images.dtype == np.uint8
    dots = images[..., 0].astype(np.float64)
    for dot, (x, y) in zip(dots, tasks.start, strict=True):
        row, column = np.unravel_index(dot.argmax(), dot.shape)
        assert abs(row - y) < 0.51 and abs(column - x) < 0.51
        # The centre of mass tells it to a small part of a pixel.
        pixels = np.arange(size)
        assert (dot.sum(0) @ pixels) / dot.sum() == pytest.approx(x, abs=0.3)
        assert (dot.sum(1) @ pixels) / dot.sum() == pytest.approx(y, abs=0.3)
    # A pixel of the wall is white where its centre is not free.
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(np.float64)
    border = ROOMS[size].border
    inner = slice(border, size - border)
    free = is_free(grid, tasks.wall[:, None, None], size)
    np.testing.assert_array_equal(images[:, inner, inner, 1] == 0, free[:, inner, inner])


def test_walls_are_those_of_the_image_size() -> None:
    rng = np.random.default_rng(0)
    assert np.unique(sample_walls(rng, 50, "fixed", 65), axis=0).tolist() == [[32.0, 18.0]]
    for size, rooms in ROOMS.items():
        walls = sample_walls(rng, 4000, "random", size)
        assert (walls == walls.round()).all()
        assert {int(x) for x in walls[:, 0]} == set(range(rooms.columns[0], rooms.columns[1] + 1))
        assert {int(y) for y in walls[:, 1]} == set(range(rooms.rows[0], rooms.rows[1] + 1))
    picture = two_rooms.render_walls(np.array([16.0, 16.0]))
    assert (picture[:, 16] == 0).sum() == 5  # the door
    assert (picture[5] == 255).sum() == 3


def test_start_and_goal_are_in_different_rooms() -> None:
    tasks = sample_tasks(np.random.default_rng(0), 500, "random")
    sides = [np.sign(place[:, 0] - tasks.wall[:, 0]) for place in (tasks.start, tasks.goal)]
    assert (sides[0] == -sides[1]).all()
    assert 0.4 < (sides[0] > 0).mean() < 0.6
    assert is_free(tasks.start, tasks.wall).all() and is_free(tasks.goal, tasks.wall).all()


@pytest.mark.parametrize("size", [33, 65])
@pytest.mark.parametrize("wall", ["fixed", "random"])
class TestEnvironment:
    def test_it_is_a_sound_one(self, size: int, wall: Any) -> None:
        check_env(TwoRooms(size, wall), skip_render_check=True)
        check_env(TwoRooms(size, wall, goal_in_obs=True), skip_render_check=True)

    def test_steps_as_the_pure_functions_do(self, size: int, wall: Any) -> None:
        env, rng = TwoRooms(size, wall), np.random.default_rng(1)
        walls, positions, actions, goals, images = [], [], [], [], []
        for seed in range(8):
            obs, info = env.reset(seed=seed)
            walls.append(info["wall"])
            goals.append(info["goal_position"])
            assert np.array_equal(info["goal"], render_positions(goals[-1], walls[-1], size))
            track, done, shown = [info["position"]], [], [obs]
            for _ in range(30):
                done.append(rng.uniform(-1, 1, 2).astype(np.float32))
                obs, reward, terminated, _, info = env.step(done[-1])
                assert (reward == 1.0) == terminated == info["success"]
                track.append(info["position"])
                shown.append(obs)
            positions.append(track)
            actions.append(done)
            images.append(shown)
        truth, moves, at = np.array(positions), np.array(actions), np.array(walls)
        now = truth[:, 0]
        for t in range(30):
            now = move(now, moves[:, t], at, size)
            assert np.array_equal(now, truth[:, t + 1])
        assert np.array_equal(render_positions(truth, at[:, None], size), np.array(images))

    def test_the_same_seed_the_same_episode(self, size: int, wall: Any) -> None:
        infos = [TwoRooms(size, wall).reset(seed=seed)[1] for seed in (3, 3, 4)]
        assert np.array_equal(infos[0]["goal"], infos[1]["goal"])
        assert np.array_equal(infos[0]["position"], infos[1]["position"])
        assert not np.array_equal(infos[0]["position"], infos[2]["position"])


def test_ends_at_the_goal_or_in_time() -> None:
    env = TwoRooms(max_steps=3)
    _, info = env.reset(seed=0, options={"start": (10, 16), "goal": (17, 16)})
    assert not info["success"]
    right = np.array([1.0, 0.0], np.float32)
    steps = [env.step(right)[1:4] for _ in range(3)]
    assert steps == [(0.0, False, False), (0.0, False, False), (1.0, True, False)]
    env.reset(seed=0, options={"start": (10, 5), "goal": (17, 16)})
    steps = [env.step(right)[1:4] for _ in range(3)]
    assert steps[-1] == (0.0, False, True)
    assert TwoRooms(65).max_steps == 200 and TwoRooms().max_steps == 100


def test_what_an_episode_begins_with_can_be_given() -> None:
    env = TwoRooms(wall="random")
    _, info = env.reset(seed=1, options={"wall": (12, 20)})
    assert info["wall"].tolist() == [12, 20]
    assert np.sign(info["position"] - 12)[0] == -np.sign(info["goal_position"] - 12)[0]
    _, info = env.reset(seed=1, options={"start": (5, 5), "goal": (6, 7), "wall": (12, 20)})
    assert info["position"].tolist() == [5, 5] and info["goal_position"].tolist() == [6, 7]
    with pytest.raises(UserError, match=r"the start \[12.0, 5.0\] of TwoRooms is not a free place"):
        env.reset(options={"start": (12, 5), "wall": (12, 20)})
    with pytest.raises(
        UserError, match=r"the wall \[2.0, 20.0\] of TwoRooms must be \(x, y\) from"
    ):
        env.reset(options={"wall": (2, 20)})
    with pytest.raises(UserError, match=r"the goal \[0.0, 5.0\]"):
        env.reset(options={"goal": (0, 5)})


@pytest.mark.parametrize("size", [33, 65])
def test_episodes_may_begin_near_the_door(size: int) -> None:
    rng = np.random.default_rng(0)
    walls = sample_walls(rng, 500, "random", size)
    found = sample_near_doors(rng, walls, size)
    assert is_free(found, walls, size).all()
    assert np.abs(found - walls).max() <= NEAR_DOOR * ROOMS[size].step
    env, near = TwoRooms(size, wall="random", door_starts=0.5), 0
    for seed in range(200):
        info = env.reset(seed=seed)[1]
        near += np.abs(info["position"] - info["wall"]).max() <= NEAR_DOOR * ROOMS[size].step
    assert 90 <= near <= 150  # half of them, and some others by chance
    one, other = (TwoRooms(size, **o).reset(seed=1)[1] for o in ({}, {"door_starts": 0.0}))
    assert one["position"].tolist() == other["position"].tolist()


def test_it_is_an_environment_of_the_factory() -> None:
    env = make_env("zoo/TwoRooms-v0", size=65, wall="random", goal_in_obs=True)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    assert {k: a.shape for k, a in spec.obs.items()} == {"image": (65, 65, 2), "goal": (65, 65, 2)}
    obs, info = env.reset(seed=0)
    assert np.array_equal(obs["goal"], info["goal"])
    assert np.array_equal(obs["image"][..., 1], info["goal"][..., 1])
    assert env.render().shape == (65, 65, 3)  # type: ignore[union-attr]
    plain = make_env("zoo/TwoRooms-v0")
    assert list(plain.reset(seed=0)[0]) == ["image"]
    for options, message in (
        ({"wall": "none"}, "must be fixed or random"),
        ({"max_steps": 0}, "at least 1"),
        ({"door_starts": 1.5}, "door_starts=1.5 of TwoRooms must be a share from 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            make_env("zoo/TwoRooms-v0", **options)
    with pytest.raises(UserError, match="must be one of"):
        TwoRooms(64)


class TestPolicies:
    def test_their_figures(self) -> None:
        # Straight lines get through where the door happens to be on the way, and noise finds it.
        rng = np.random.default_rng
        for wall, walk_, line, noisy in (("fixed", 0.05, 0.25, 0.54), ("random", 0.05, 0.18, 0.42)):
            tasks = sample_tasks(rng(0), 1000, wall)
            assert success_rate(random_walk, tasks, rng(1)) < walk_
            assert success_rate(straight_line, tasks, rng(1)) == pytest.approx(line, abs=0.04)
            assert success_rate(noisy_line, tasks, rng(1)) == pytest.approx(noisy, abs=0.05)

    def test_are_those_of_the_environment(self) -> None:
        tasks = sample_tasks(np.random.default_rng(0), 20, "random")
        env = TwoRooms(wall="random")
        solved = []
        for row in range(20):
            wall, start, goal = (part[row] for part in tasks[:3])
            _, info = env.reset(options={"wall": wall, "start": start, "goal": goal})
            over = False
            alone = two_rooms.Tasks(wall[None], start[None], goal[None])
            while not over:
                action = straight_line(np.random.default_rng(0), info["position"][None], alone)[0]
                _, _, terminated, truncated, info = env.step(action)
                over = terminated or truncated
            solved.append(info["success"])
        rate = success_rate(straight_line, tasks, np.random.default_rng(0))
        assert 0 < rate == np.mean(solved)

    def test_a_straight_line_keeps_to_the_actions(self) -> None:
        tasks = sample_tasks(np.random.default_rng(0), 100)
        rng = np.random.default_rng(0)
        for policy in (straight_line, noisy_line, random_walk):
            assert np.abs(policy(rng, tasks.start, tasks)).max() <= 1
        near = tasks._replace(goal=tasks.start + 0.5)
        action = straight_line(rng, near.start, near)
        np.testing.assert_allclose(ROOMS[33].step * action, 0.5)

    def test_more_steps_solve_more(self) -> None:
        tasks = sample_tasks(np.random.default_rng(0), 300)
        rates = [
            success_rate(two_rooms_policies.noisy_line, tasks, np.random.default_rng(0), steps)
            for steps in (10, 50, 200)
        ]
        assert rates[0] < rates[1] < rates[2]
