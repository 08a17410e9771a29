"""Offline DQN: one-step TD learning on recorded episodes, without a step in an environment.

The learner is stable-baselines3's DQN (Mnih et al., 2015). Its replay buffer holds the transitions
of the recorded data and never changes.
"""

from collections.abc import Callable

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import polyak_update

from datamodules.errors import UserError
from datamodules.offline_datamodule import OfflineDataModule


def fill_buffer(agent: DQN, data: OfflineDataModule) -> None:
    """Give an agent all transitions of the data as its replay buffer.

    Values are bootstrapped from the last observation of an episode that was cut off, but not from
    one at which the task ended (`is_terminal`).

    Raises:
        UserError: the data is missing or damaged, or has images.
    """
    arrays = data.episodes.arrays
    if data.spec.images:
        raise UserError(f"offline DQN learns from vectors, but {data.episodes.name} has images")
    # Several observations are one vector, in the order in which gymnasium flattens them.
    parts = [arrays[f"obs/{key}"].reshape(len(arrays["reward"]), -1) for key in data.spec.obs]
    obs = np.concatenate(parts, axis=1).reshape(-1, *(agent.observation_space.shape or ()))
    now = np.flatnonzero(~arrays["is_last"])
    n = len(now)
    # One step of n environments is the buffer's way to take n transitions at once.
    buffer = ReplayBuffer(n, agent.observation_space, agent.action_space, agent.device, n_envs=n)
    buffer.add(
        obs[now],
        obs[now + 1],
        arrays["action"][now],
        arrays["reward"][now + 1],
        arrays["is_terminal"][now + 1],
        [{}] * n,
    )
    agent.replay_buffer = buffer


def learn(agent: DQN, updates: int, after_update: Callable[[], object]) -> None:
    """Update an agent on its replay buffer.

    Args:
        agent: its `target_update_interval` counts updates here.
        updates: gradient steps, each on `agent.batch_size` transitions.
        after_update: called after each.
    """
    agent.set_logger(Logger(None, []))
    for update in range(1, updates + 1):
        agent.train(gradient_steps=1, batch_size=agent.batch_size)
        # `DQN.train` leaves the target network alone: `DQN.learn` moves it between env steps.
        if update % agent.target_update_interval == 0:
            polyak_update(agent.q_net.parameters(), agent.q_net_target.parameters(), agent.tau)
        after_update()
