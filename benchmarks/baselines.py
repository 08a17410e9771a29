"""Baselines under the same protocol as the zoo's models: random, and stable-baselines3's three.

They leave a run folder of the same shape (metrics.csv, checkpoints/best, done.json), are evaluated
at a fixed interval of env steps, and their best checkpoint is what the final episodes measure.
Their trainings are short and seeded, so an interrupted one starts again from the beginning.

Presets are `presets/<task>.yaml`: the task, options of its environment, and each algorithm's
constructor arguments. yaml has no functions, so "linear 0.001" stands for a schedule that falls
from 0.001 to 0 over the training.
"""

import csv
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.cell import EVAL_SEED_OFFSET, Cell, write_json
from datamodules.errors import MissingExtra, UserError

BASELINES = ("random", "dqn", "ppo", "sac")

# Episodes that are played side by side, so that the policy sees batches.
_SIDE_BY_SIDE = 10

Act = Callable[[np.ndarray], np.ndarray]


class BaselineRunner:
    """Trains and evaluates a baseline; see `benchmarks.cell.Runner`."""

    def train(self, cell: Cell, run: Path) -> None:
        """Learn for `cell.env_steps`; the random policy has nothing to learn."""
        if (run / "done.json").exists():
            return
        shutil.rmtree(run, ignore_errors=True)
        (run / "checkpoints").mkdir(parents=True)
        preset = load_preset(cell)
        spent: dict[str, Any] = {"env_steps": 0, "updates": 0, "wall_s": None}
        if cell.model != "random":
            spent = _learn(cell, preset, run)
        write_json(run / "done.json", spent)

    def evaluate(self, cell: Cell, run: Path) -> Mapping[str, Any]:
        """Greedy episodes of the best checkpoint, or random ones."""
        preset = load_preset(cell)
        seed = EVAL_SEED_OFFSET + cell.seed
        report: dict[str, Any] = {"episodes": cell.episodes}
        if cell.model == "random":
            space = make_task_env(preset).action_space
            space.seed(seed)
            act: Act = lambda obs: np.array([space.sample() for _ in obs])  # noqa: E731
        else:
            agent = _algorithm(cell.model).load(run / "checkpoints" / "best.zip", device="cpu")
            act = _greedy(agent)
            report["params"] = sum(
                parameter.numel()
                for name, parameter in agent.policy.named_parameters()
                if "target" not in name  # a slow copy is not a learned parameter
            )
        returns = play(lambda: make_task_env(preset), act, cell.episodes, seed)
        return {**report, "return_mean": returns.mean(), "return_std": returns.std()}


def load_preset(cell: Cell) -> dict[str, Any]:
    """The task preset of a baseline's cell.

    Raises:
        UserError: no such preset, the preset is for another task, or has no settings for the model.
    """
    folder = resources.files("benchmarks") / "presets"
    known = sorted(Path(entry.name).stem for entry in folder.iterdir())
    if cell.preset not in known:
        close = get_close_matches(cell.preset, known) or known
        raise UserError(
            f"baseline {cell.model!r} has no preset {cell.preset!r}; nearest: {', '.join(close)}"
        )
    preset: dict[str, Any] = yaml.safe_load((folder / f"{cell.preset}.yaml").read_text())
    if preset["task"] != cell.task:
        raise UserError(f"preset {cell.preset!r} is for {preset['task']}, not for {cell.task}")
    if cell.model != "random" and cell.model not in preset:
        there = ", ".join(name for name in BASELINES if name in preset)
        raise UserError(f"preset {cell.preset!r} has no settings for {cell.model!r}, only {there}")
    return preset


def make_task_env(preset: Mapping[str, Any]) -> Any:
    """The task's environment as the zoo's models see it, with one array as observation."""
    import gymnasium as gym

    from datamodules.envs.factory import make_env

    env = make_env(preset["task"], **preset.get("env", {}))
    space = env.observation_space
    if isinstance(space, gym.spaces.Dict):
        if len(space) == 1:
            (key,) = space
            return gym.wrappers.TransformObservation(env, lambda obs: obs[key], space[key])
        return gym.wrappers.FlattenObservation(env)
    return env


def play(make: Callable[[], Any], act: Act, episodes: int, seed: int) -> np.ndarray:
    """Returns of whole episodes, each seeded by its number, `(episodes,)`.

    Args:
        make: builds a fresh environment with array observations.
        act: maps a batch of observations to a batch of actions.
    """
    seeds = np.random.SeedSequence(seed).generate_state(episodes)
    waiting = deque(range(episodes))
    idle = [make() for _ in range(min(episodes, _SIDE_BY_SIDE))]
    running: dict[int, tuple[Any, np.ndarray]] = {}
    returns = np.zeros(episodes)
    while waiting or running:
        while waiting and idle:
            episode, env = waiting.popleft(), idle.pop()
            running[episode] = env, env.reset(seed=int(seeds[episode]))[0]
        actions = act(np.stack([obs for _, obs in running.values()]))
        for (episode, (env, _)), action in zip(list(running.items()), actions, strict=True):
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += float(reward)
            running[episode] = env, obs
            if terminated or truncated:
                del running[episode]
                idle.append(env)
    for env in idle:
        env.close()
    return returns


def _learn(cell: Cell, preset: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Train an agent of stable-baselines3, evaluating on the way and keeping the best.

    Returns:
        What was spent: `env_steps`, `updates`, `wall_s` without evaluations, and the `best` score.
    """
    algorithm = _algorithm(cell.model)
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    if cell.env_steps is None:
        raise UserError(f"baseline {cell.model!r} needs a budget: set env_steps in the suite")
    torch.set_num_threads(1)
    settings = {key: _schedule(value) for key, value in preset[cell.model].items()}
    envs = DummyVecEnv([lambda: make_task_env(preset) for _ in range(settings.pop("num_envs", 1))])
    repeat = int(preset.get("env", {}).get("action_repeat", 1))
    agent = algorithm(env=envs, seed=cell.seed, device="cpu", **settings)
    file = (run / "metrics.csv").open("w", newline="")
    log = csv.writer(file, lineterminator="\n")
    log.writerow(("updates", "env_steps", "metric", "value"))

    class Evaluation(BaseCallback):
        """Evaluates every `cell.eval_every` env steps; the clock stands still meanwhile."""

        def __init__(self) -> None:
            super().__init__()
            self.best = -np.inf
            self.due = cell.eval_every
            self.started = time.perf_counter()

        def _on_step(self) -> bool:
            if self.num_timesteps * repeat >= self.due:
                self.due += cell.eval_every
                self.evaluate()
            return True

        def evaluate(self) -> None:
            paused = time.perf_counter()
            # Selection has its own seed: neither training nor the final episodes may share it.
            seed = EVAL_SEED_OFFSET // 2 + cell.seed
            returns = play(lambda: make_task_env(preset), _greedy(agent), cell.eval_episodes, seed)
            for metric, value in (
                ("time/wall_s", paused - self.started),
                ("eval/return_mean", returns.mean()),
                ("eval/return_std", returns.std()),
            ):
                log.writerow((agent._n_updates, self.num_timesteps * repeat, metric, value))
            file.flush()
            if returns.mean() > self.best:
                self.best = returns.mean()
                agent.save(run / "checkpoints" / "best.zip")
            self.started += time.perf_counter() - paused

    evaluation = Evaluation()
    with file:
        agent.learn(cell.env_steps // repeat, callback=evaluation)
        evaluation.evaluate()
        seconds = time.perf_counter() - evaluation.started
    envs.close()
    return {
        "env_steps": agent.num_timesteps * repeat,
        "updates": agent._n_updates,
        "wall_s": seconds,
        "best": evaluation.best,
    }


def _algorithm(name: str) -> Any:
    try:
        import stable_baselines3
    except ImportError as error:
        raise MissingExtra(f"baseline {name!r}", "baselines") from error
    return getattr(stable_baselines3, name.upper())


def _greedy(agent: Any) -> Act:
    return lambda obs: agent.predict(obs, deterministic=True)[0]


def _schedule(value: Any) -> Any:
    """`linear 0.001` as a function of the share of training that is left, all else unchanged."""
    if isinstance(value, str) and value.startswith("linear "):
        start = float(value.removeprefix("linear "))
        return lambda left: left * start
    return value
