"""Dreams as stable-baselines3 sees environments; imported by `zoo.dream_env.as_sb3` alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from zoo.dream_env import DreamVectorEnv


class DreamVecEnv(VecEnv):
    """A stable-baselines3 `VecEnv` over a `DreamVectorEnv`.

    Args:
        envs: the dreams; they themselves are not stepped.
    """

    def __init__(self, envs: DreamVectorEnv) -> None:
        self.envs = envs.in_mode(AutoresetMode.SAME_STEP)
        self._actions: Any = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Begins all episodes anew, seeded if `seed` was called."""
        obs, _ = self.envs.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions (N,) or (N, A)."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, rewards (N,) float32, ends (N,) and infos of the step."""
        obs, reward, terminated, truncated, infos = self.envs.step(self._actions)
        done = terminated | truncated
        listed: list[dict[str, Any]] = [
            {"TimeLimit.truncated": False} for _ in range(self.num_envs)
        ]
        for row in np.flatnonzero(done):
            listed[row]["terminal_observation"] = infos["final_obs"][row]
            listed[row]["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
        return obs, reward.astype(np.float32), done, listed

    def close(self) -> None:
        """Closes the dreams."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute, the same for all environments."""
        return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of all environments together."""
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Refused: the environments exist only together."""
        raise AttributeError(
            f"dreams exist only together: none of them has a method {method_name} to call"
        )

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False for _ in self._get_indices(indices)]
