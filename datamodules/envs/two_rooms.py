"""Two Rooms: a dot, a wall with a door, and an image that says where to go.

The environment is four pure functions over batches (`sample_tasks`, `move`, `reached`,
`render_positions`) and a Gymnasium class around them, so that data can be generated, and a planner
given the truth, without stepping anything. Positions are (x, y) in pixels, x along the columns of
the image and y down its rows; a wall is (column of its middle, row of the middle of its door).

After the two-rooms environment of EB-JEPA (facebookresearch/eb_jepa, `datasets/two_rooms`), whose
figures at 65 pixels are kept; those at 33 pixels are half of them, or smaller where a step is then
too large. What differs: a wall stops the dot without noise, the door lets the dot's centre pass
through all of its opening, starts and goals are nearer to walls, and touching the goal ends the
task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict

from datamodules.envs.wrappers import StepResult
from datamodules.errors import UserError
from datamodules.spec import IMAGE_KEY

GOAL_KEY = "goal"
WALLS = ("fixed", "random")
DOT_STD = 1.3  # pixels
MARGIN = 1.0  # pixels between a start or goal and the walls beside it
NEAR_DOOR = 3  # steps along each axis that count as near the middle of a door
_GAP = 1e-3  # pixels that a stopped dot keeps from the wall, so that rounding cannot put it inside


@dataclass(frozen=True)
class Rooms:
    """The figures of one image size, in pixels.

    Attributes:
        border: row and column of the outer wall, counted from each edge of the image.
        thickness: of the wall between the rooms; odd.
        door: its opening; odd.
        fixed: the fixed wall.
        columns: first and last column of random walls.
        rows: first and last row of the middles of random doors.
        step: how far an action of 1 moves the dot along one axis.
        reach: distance to the goal that counts as success.
        max_steps: after which an episode is truncated.
    """

    border: int
    thickness: int
    door: int
    fixed: tuple[int, int]
    columns: tuple[int, int]
    rows: tuple[int, int]
    step: float
    reach: float
    max_steps: int


ROOMS = {
    33: Rooms(1, 1, 5, (16, 16), (10, 22), (5, 27), 2.0, 1.65, 100),
    65: Rooms(4, 3, 9, (32, 18), (20, 44), (10, 54), 2.45, 4.5, 200),
}


class Tasks(NamedTuple):
    """N tasks: walls, starts and goals, each (N, 2) float64, in images of one size."""

    wall: np.ndarray
    start: np.ndarray
    goal: np.ndarray
    size: int = 33


def sample_walls(
    rng: np.random.Generator, count: int, wall: str = "fixed", size: int = 33
) -> np.ndarray:
    """Walls (N, 2): all the fixed one, or uniform over columns and rows of whole pixels."""
    rooms = ROOMS[size]
    if wall == "fixed":
        return np.tile(np.array(rooms.fixed, np.float64), (count, 1))
    low, high = np.array([rooms.columns, rooms.rows]).T
    return rng.integers(low, high + 1, (count, 2)).astype(np.float64)


def sample_positions(
    rng: np.random.Generator, walls: np.ndarray, right: np.ndarray, size: int = 33
) -> np.ndarray:
    """Uniform positions (N, 2) in the right or left room of walls (N, 2), by `right` (N,) bool."""
    rooms = ROOMS[size]
    near = rooms.border + 0.5 + MARGIN
    far, half = size - 1 - near, rooms.thickness / 2 + MARGIN
    low = np.stack([np.where(right, walls[:, 0] + half, near), np.full(len(walls), near)], -1)
    high = np.stack([np.where(right, far, walls[:, 0] - half), np.full(len(walls), far)], -1)
    return rng.uniform(low, high)


def sample_tasks(
    rng: np.random.Generator, count: int, wall: str = "fixed", size: int = 33
) -> Tasks:
    """Tasks whose start and goal are in different rooms."""
    walls = sample_walls(rng, count, wall, size)
    right = rng.random(count) < 0.5
    start = sample_positions(rng, walls, right, size)
    return Tasks(walls, start, sample_positions(rng, walls, ~right, size), size)


def sample_near_doors(rng: np.random.Generator, walls: np.ndarray, size: int = 33) -> np.ndarray:
    """Uniform free positions (N, 2) within `NEAR_DOOR` steps of the doors of walls (N, 2)."""
    reach = NEAR_DOOR * ROOMS[size].step
    found = walls + rng.uniform(-reach, reach, walls.shape)
    while not (free := is_free(found, walls, size)).all():
        found = np.where(free[:, None], found, walls + rng.uniform(-reach, reach, walls.shape))
    return found


def is_free(positions: np.ndarray, walls: np.ndarray, size: int = 33) -> np.ndarray:
    """Whether positions (..., 2) are within the outer wall and not in walls (..., 2), (...)."""
    rooms = ROOMS[size]
    x, y = positions[..., 0], positions[..., 1]
    near = rooms.border + 0.5
    inside = (positions > near).all(-1) & (positions < size - 1 - near).all(-1)
    beside = np.abs(x - walls[..., 0]) > rooms.thickness / 2
    return inside & (beside | (np.abs(y - walls[..., 1]) < rooms.door / 2))


def move(
    positions: np.ndarray, actions: np.ndarray, walls: np.ndarray, size: int = 33
) -> np.ndarray:
    """The true dynamics: where actions (..., 2) in [-1, 1] lead from free positions (..., 2).

    The dot goes straight by `step` pixels times the action; where it meets a wall, it stops there
    for this step. Leading axes broadcast with those of walls (..., 2); computed in float64.
    """
    rooms, walls = ROOMS[size], np.asarray(walls, np.float64)
    positions = np.asarray(positions, np.float64)
    shift = rooms.step * np.minimum(np.maximum(np.asarray(actions, np.float64), -1), 1)
    shift = np.where(shift == 0, 1e-30, shift)
    x, y, dx, dy = positions[..., 0], positions[..., 1], shift[..., 0], shift[..., 1]
    near = rooms.border + 0.5 + _GAP
    half, opening = rooms.thickness / 2 + _GAP, rooms.door / 2 - _GAP
    _, beyond_x = _interval(x, dx, near, size - 1 - near)
    _, beyond_y = _interval(y, dy, near, size - 1 - near)
    enter, leave = _interval(x, dx, walls[..., 0] - half, walls[..., 0] + half)
    opens, closes = _interval(y, dy, walls[..., 1] - opening, walls[..., 1] + opening)
    enter = np.maximum(enter, 0)
    meets = np.where((opens < enter) & (enter < closes), closes, enter)
    back = _GAP / np.hypot(dx, dy)
    meets = np.where(meets < leave - back, meets, np.inf)
    stop = np.minimum(np.minimum(beyond_x, beyond_y), meets)
    share = np.where(stop < 1, np.maximum(stop - back, 0), 1)
    return positions + share[..., None] * shift


def _interval(
    start: np.ndarray, shift: np.ndarray, low: Any, high: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The times at which start + time * shift comes into [low, high] and leaves it."""
    one, other = (low - start) / shift, (high - start) / shift
    return np.minimum(one, other), np.maximum(one, other)


def reached(positions: np.ndarray, goals: np.ndarray, size: int = 33) -> np.ndarray:
    """Whether positions (..., 2) are at their goals (..., 2): (...) bool."""
    return np.linalg.norm(positions - goals, axis=-1) < ROOMS[size].reach


def render_positions(positions: np.ndarray, walls: np.ndarray, size: int = 33) -> np.ndarray:
    """Images uint8 (..., S, S, 2) of dots at (..., 2) between walls (..., 2), which broadcast.

    The first channel is the dot, 255 exp(-d^2 / 2 DOT_STD^2) at distance d from it; the second is
    255 where there is a wall.
    """
    dots, walled = render_dots(positions, size), render_walls(walls, size)
    images = np.empty((*np.broadcast_shapes(dots.shape, walled.shape), 2), np.uint8)
    images[..., 0], images[..., 1] = dots, walled
    return images


def render_dots(positions: np.ndarray, size: int = 33) -> np.ndarray:
    """The first channel: uint8 (..., S, S)."""
    away = np.arange(size, dtype=np.float32) - np.asarray(positions, np.float32)[..., None]
    profile = np.exp(away * away * np.float32(-0.5 / DOT_STD**2))
    dots = (255 * profile[..., 1, :, None]) * profile[..., 0, None, :]
    return (dots + 0.5).astype(np.uint8)


def render_walls(walls: np.ndarray, size: int = 33) -> np.ndarray:
    """The second channel: uint8 (..., S, S) of walls (..., 2), with the outer wall."""
    rooms, walls = ROOMS[size], np.asarray(walls, np.float32)
    pixels = np.arange(size)
    column = np.abs(pixels - walls[..., :1]) < rooms.thickness / 2
    closed = np.abs(pixels - walls[..., 1:]) > rooms.door / 2
    walled = column[..., None, :] & closed[..., :, None]
    edge = (pixels == rooms.border) | (pixels == size - 1 - rooms.border)
    return (walled | edge[:, None] | edge).astype(np.uint8) * 255


class TwoRooms(gym.Env):
    """Bring the dot to where the goal image shows it, in the other room.

    The observation is (S, S, 2) uint8, see `render_positions`. The action, in [-1, 1]^2, moves the
    dot by up to `step` pixels along each axis, see `move`. Reaching the goal is rewarded with 1 and
    ends the task; all other rewards are 0.

    `info` has `goal` (the goal image, (S, S, 2)), `position`, `goal_position` and `wall` ((2,)
    float64 each) and `success`. `reset` takes them as options: `start`, `goal` and `wall`, (x, y)
    each; what is not given is drawn, start and goal in different rooms.

    Args:
        size: side of the image, 33 or 65; see `ROOMS`.
        wall: "fixed", or "random": another wall and door in each episode.
        goal_in_obs: make the observation a dict of `image` and `goal`, both (S, S, 2).
        max_steps: after which an episode is truncated; by default 100 at 33 pixels, 200 at 65.
        door_starts: share of the episodes that begin near the door instead of anywhere in a room:
            for collecting, where a random walk hardly ever finds it. (At EB-JEPA 35% of the
            trajectories go through the door.)

    Raises:
        UserError: another size or wall, a share outside of [0, 1], or (at `reset`) a start or goal
            inside of a wall.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self,
        size: int = 33,
        wall: Literal["fixed", "random"] = "fixed",
        goal_in_obs: bool = False,
        max_steps: int | None = None,
        door_starts: float = 0.0,
    ) -> None:
        if size not in ROOMS:
            raise UserError(f"size={size} of TwoRooms must be one of {sorted(ROOMS)}")
        if wall not in WALLS:
            raise UserError(f"wall='{wall}' of TwoRooms must be fixed or random")
        if max_steps is not None and max_steps < 1:
            raise UserError(f"max_steps={max_steps} of TwoRooms must be at least 1")
        if not 0 <= door_starts <= 1:
            raise UserError(f"door_starts={door_starts} of TwoRooms must be a share from 0 to 1")
        self.size, self.wall, self.goal_in_obs = size, wall, goal_in_obs
        self.door_starts = door_starts
        self.max_steps = max_steps or ROOMS[size].max_steps
        image = Box(0, 255, (size, size, 2), np.uint8)
        self.observation_space = Dict({IMAGE_KEY: image, GOAL_KEY: image}) if goal_in_obs else image
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins an episode; see the class for the options."""
        super().reset(seed=seed)
        given = {key: np.asarray(value, np.float64) for key, value in (options or {}).items()}
        task = sample_tasks(self.np_random, 1, self.wall, self.size)
        if "wall" in given:
            self._check_wall(given["wall"])
            walls, right = given["wall"][None], task.start[:, 0] > task.wall[:, 0]
            start = sample_positions(self.np_random, walls, right, self.size)
            goal = sample_positions(self.np_random, walls, ~right, self.size)
            task = Tasks(walls, start, goal, self.size)
        if self.door_starts and self.np_random.random() < self.door_starts:
            task = task._replace(start=sample_near_doors(self.np_random, task.wall, self.size))
        self.walls = task.wall[0]
        self.position = self._place("start", given.get("start", task.start[0]))
        self.goal_position = self._place("goal", given.get("goal", task.goal[0]))
        self.goal = render_positions(self.goal_position, self.walls, self.size)
        self.t = 0
        return self._observe(), self._info()

    def step(self, action: np.ndarray) -> StepResult:
        """Moves the dot."""
        self.position = move(self.position, action, self.walls, self.size)
        self.t += 1
        info = self._info()
        success = info["success"]
        over = self.t >= self.max_steps
        return self._observe(), float(success), success, over and not success, info

    def render(self) -> np.ndarray:
        """The dot in red, the goal in green and the walls in blue, uint8 (S, S, 3)."""
        dot = render_dots(self.position, self.size)
        return np.stack([dot, self.goal[..., 0], self.goal[..., 1]], -1)

    def _observe(self) -> Any:
        image = self.goal.copy()  # which has the same walls
        image[..., 0] = render_dots(self.position, self.size)
        return {IMAGE_KEY: image, GOAL_KEY: self.goal.copy()} if self.goal_in_obs else image

    def _info(self) -> dict[str, Any]:
        return {
            "goal": self.goal.copy(),
            "position": self.position.copy(),
            "goal_position": self.goal_position.copy(),
            "wall": self.walls.copy(),
            "success": bool(reached(self.position, self.goal_position, self.size)),
        }

    def _check_wall(self, wall: np.ndarray) -> None:
        """Refuses walls that leave no room on a side of them, and doors in the outer wall."""
        rooms = ROOMS[self.size]
        low, high = np.array([rooms.columns, rooms.rows]).T
        if wall.shape != (2,) or not ((low <= wall) & (wall <= high)).all():
            raise UserError(
                f"the wall {wall.tolist()} of TwoRooms must be (x, y) from {low.tolist()} to "
                f"{high.tolist()}"
            )

    def _place(self, name: str, position: np.ndarray) -> np.ndarray:
        if position.shape != (2,) or not is_free(position, self.walls, self.size):
            raise UserError(
                f"the {name} {position.tolist()} of TwoRooms is not a free place (x, y): the wall "
                f"is at x={self.walls[0]:g} with its door at y={self.walls[1]:g}"
            )
        return position


if "zoo/TwoRooms-v0" not in gym.registry:
    gym.register("zoo/TwoRooms-v0", entry_point=f"{__name__}:TwoRooms")
