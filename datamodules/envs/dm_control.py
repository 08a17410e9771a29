"""The DeepMind Control Suite as Gymnasium environments: proprioception, pixels, or both.

Invariant: `reset(seed=s)` gives the same episode, bit for bit, in a used and in a fresh instance.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict

from datamodules.envs.wrappers import StepResult
from datamodules.errors import UserError
from datamodules.spec import IMAGE_KEY

PREFIX = "dm_control/"
OBSERVATIONS = ("proprio", "pixels", "both")


class DMControl(gym.Env):
    """One task of the suite.

    Observations are a Dict: the task's own float64 keys (`proprio`), `image` uint8
    (size, size, 3) (`pixels`), or all of them (`both`). An episode that ends with discount 0
    is terminated; one that ends by the suite's time limit (1000 steps for most tasks) is truncated.

    Args:
        name: `dm_control/<domain>-<task>-v0`; the suffix may be left out.
        obs: `proprio`, `pixels` or `both`.
        size: side of the image in pixels.
        camera: camera number; by default 0, and 2 for the quadruped, whose camera 0 shows little.
        task_kwargs: passed to the task, such as `{"time_limit": 10}` in seconds.

    Raises:
        UserError: unknown task or observation, or pixels without a working OpenGL.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(
        self,
        name: str,
        obs: str = "proprio",
        size: int = 64,
        camera: int | None = None,
        task_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if obs not in OBSERVATIONS:
            raise UserError(f"obs={obs!r} of {name} must be one of {', '.join(OBSERVATIONS)}")
        suite = _load_suite()
        domain, task = _find(name, suite.ALL_TASKS)
        # Constructed with a fixed seed since some tasks (lqr) draw their physics: one name is one
        # task. Episodes are seeded in `reset`.
        kwargs = {"random": 0, **(task_kwargs or {})}
        self._env = suite.load(domain, task, task_kwargs=kwargs)
        self._seeded = False
        self._proprio, self._pixels = obs != "pixels", obs != "proprio"
        self._size = size
        self._camera = camera if camera is not None else (2 if domain == "quadruped" else 0)
        if self._pixels:
            self._require_rendering(name)
        self.metadata = {**self.metadata, "render_fps": round(1 / self._env.control_timestep())}
        spaces: dict[str, gym.Space] = {}
        if self._proprio:
            for key, spec in self._env.observation_spec().items():
                spaces[key] = Box(-np.inf, np.inf, spec.shape, np.float64)
        if self._pixels:
            spaces[IMAGE_KEY] = Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = Dict(spaces)
        action = self._env.action_spec()
        self.action_space = Box(
            np.broadcast_to(action.minimum, action.shape).astype(np.float32),
            np.broadcast_to(action.maximum, action.shape).astype(np.float32),
            dtype=np.float32,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode; see `gymnasium.Env.reset`."""
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            # The task's generator takes 32 bits, Gymnasium's seeds may have more.
            self._env.task.random.seed(int(self.np_random.integers(2**32)))
            self._seeded = True
        return self._observe(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> StepResult:
        """One control step."""
        step = self._env.step(action)
        terminated = step.last() and step.discount == 0
        truncated = step.last() and not terminated
        return self._observe(step.observation), float(step.reward), terminated, truncated, {}

    def render(self) -> np.ndarray:
        """The scene as uint8 (size, size, 3)."""
        return self._env.physics.render(self._size, self._size, camera_id=self._camera)

    def close(self) -> None:
        """Frees the physics and its rendering context."""
        self._env.close()

    def _require_rendering(self, name: str) -> None:
        try:
            self.render()
        except Exception as error:  # each OpenGL backend fails in its own way
            raise UserError(
                f"pixels of {name} need OpenGL, and MUJOCO_GL={os.environ.get('MUJOCO_GL')} does "
                f"not render here ({error}): install libegl1 and a driver, or libosmesa6 with "
                "MUJOCO_GL=osmesa, or use obs='proprio'"
            ) from error

    def _observe(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        obs = dict(observation) if self._proprio else {}
        if self._pixels:
            obs[IMAGE_KEY] = self.render()
        return obs


def _find(name: str, tasks: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """The (domain, task) that an id names; tasks have underscores, and one hyphen between them."""
    known = {f"{domain}-{task}": (domain, task) for domain, task in tasks}
    wanted = name.removeprefix(PREFIX).removesuffix("-v0")
    if wanted in known:
        return known[wanted]
    nearest = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(f'{PREFIX}{n}-v0' for n in nearest)}?" if nearest else ""
    domains = ", ".join(sorted({domain for domain, _ in tasks}))
    raise UserError(f"unknown environment {name!r}: {hint or f'the domains are {domains}'}")


def _load_suite() -> ModuleType:
    """Imports the suite with an OpenGL backend that works without a display.

    dm_control chooses its backend once, on import, and fails where its choice does; so each
    candidate is tried, and the last, `disabled`, still gives proprioception.
    """
    if importlib.util.find_spec("dm_control") is None:
        raise UserError("dm_control environments need dm-control: pip install dm-control")
    if "dm_control.suite" in sys.modules or "MUJOCO_GL" in os.environ:
        try:
            return importlib.import_module("dm_control.suite")
        except (ImportError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"MUJOCO_GL={os.environ.get('MUJOCO_GL')} does not work here ({error}): unset it, "
                "or set it to egl, osmesa, glfw or disabled"
            ) from error
    for backend in _backends():
        os.environ["MUJOCO_GL"] = backend
        try:
            return importlib.import_module("dm_control.suite")
        except (ImportError, AttributeError, RuntimeError):
            _forget_failed_import()
    os.environ["MUJOCO_GL"] = "disabled"
    return importlib.import_module("dm_control.suite")


def _backends() -> list[str]:
    if sys.platform != "linux":
        return ["glfw"]
    # Without a display glfw imports well, and fails only when it renders.
    return ["egl", "osmesa"] + (["glfw"] if os.environ.get("DISPLAY") else [])


def _forget_failed_import() -> None:
    for module in list(sys.modules):
        if module.partition(".")[0] in ("dm_control", "OpenGL"):
            del sys.modules[module]
    os.environ.pop("PYOPENGL_PLATFORM", None)
