"""Baselines under the same protocol as the zoo's models: random, and those of stable-baselines3.

    random          nothing is learned
    dqn, ppo, sac   learn in the environment, for the suite's env_steps
    offline-dqn     learns from recorded episodes (`source`), for the preset's `updates`

They leave a run folder of the same shape (metrics.csv, checkpoints/best, done.json), are evaluated
at a fixed interval of env steps (of updates, on recorded episodes), and their best checkpoint is
what the final episodes measure. Their trainings are short and seeded, so an interrupted one starts
again from the beginning.

Presets are `presets/<task>.yaml`: the task, options of its environment, and each algorithm's
constructor arguments beside `num_envs`, `source` and `updates`. yaml has no functions, so
"linear 0.001" stands for a schedule that falls from 0.001 to 0 over a training in an environment.
"""

import csv
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml

from benchmarks.cell import ENV, EVAL_SEED_OFFSET, Cell, write_json
from datamodules.errors import MissingExtra, UserError

OFFLINE = "offline-dqn"
COPY_LAST = "copy-last-frame"  # of dreams, see `benchmarks.video`
BASELINES = ("random", "dqn", "ppo", "sac", OFFLINE, COPY_LAST)

# Settings of a preset that the algorithm's constructor does not know.
_OURS = frozenset({"num_envs", "source", "updates"})

# Episodes that are played side by side, so that the policy sees batches.
_SIDE_BY_SIDE = 10

Act = Callable[[np.ndarray], np.ndarray]


class BaselineRunner:
    """Trains and evaluates a baseline; see `benchmarks.cell.Runner`."""

    def train(self, cell: Cell, run: Path) -> None:
        """Learn for the budget; the random policy has nothing to learn."""
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
    name = cell.base or cell.preset
    if name not in known:
        close = get_close_matches(name, known) or known
        raise UserError(
            f"baseline {cell.model!r} has no preset {name!r}; nearest: {', '.join(close)}"
        )
    preset: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text())
    preset["task"] = cell.options.get(ENV, preset["task"])
    if preset["task"] != cell.task:
        raise UserError(f"preset {name!r} is for {preset['task']}, not for {cell.task}")
    if cell.model != "random" and cell.model not in preset:
        there = ", ".join(name for name in BASELINES if name in preset)
        raise UserError(f"preset {name!r} has no settings for {cell.model!r}, only {there}")
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


def make_agent(model: str, preset: Mapping[str, Any], seed: int | None = None) -> Any:
    """An untrained agent of stable-baselines3 with a preset's settings.

    Raises:
        MissingExtra: stable-baselines3 is not installed.
    """
    algorithm = _algorithm(model)
    from stable_baselines3.common.vec_env import DummyVecEnv

    given = preset[model]
    settings = {key: _schedule(value) for key, value in given.items() if key not in _OURS}
    envs = DummyVecEnv([lambda: make_task_env(preset) for _ in range(given.get("num_envs", 1))])
    return algorithm(env=envs, seed=seed, device="cpu", **settings)


class _Evaluations:
    """Evaluates an agent on the way and keeps the best; the clock stands still meanwhile."""

    def __init__(
        self, agent: Any, cell: Cell, preset: Mapping[str, Any], run: Path, file: TextIO
    ) -> None:
        self.agent, self.cell, self.preset, self.run, self.file = agent, cell, preset, run, file
        self.repeat = int(preset.get("env", {}).get("action_repeat", 1))
        self.log = csv.writer(file, lineterminator="\n")
        self.log.writerow(("updates", "env_steps", "metric", "value"))
        self.best = -np.inf
        self.due = cell.eval_every
        self.evaluated_at: tuple[int, int] | None = None
        self.started = time.perf_counter()

    @property
    def updates(self) -> int:
        return int(self.agent._n_updates)

    @property
    def env_steps(self) -> int:
        return int(self.agent.num_timesteps) * self.repeat

    def when_due(self, *_: Any) -> bool:
        """Evaluates every `cell.eval_every` env steps, or updates where there are none."""
        if (self.env_steps or self.updates) >= self.due:
            self.due += self.cell.eval_every
            self.evaluate()
        return True  # or stable-baselines3 would stop

    def evaluate(self) -> None:
        paused = time.perf_counter()
        # Selection has its own seed: neither training nor the final episodes may share it.
        seed = EVAL_SEED_OFFSET // 2 + self.cell.seed
        act = _greedy(self.agent)
        returns = play(lambda: make_task_env(self.preset), act, self.cell.eval_episodes, seed)
        self.evaluated_at = (self.env_steps, self.updates)
        for metric, value in (
            ("time/wall_s", paused - self.started),
            ("eval/return_mean", returns.mean()),
            ("eval/return_std", returns.std()),
        ):
            self.log.writerow((self.updates, self.env_steps, metric, value))
        self.file.flush()
        if returns.mean() > self.best:
            self.best = returns.mean()
            self.agent.save(self.run / "checkpoints" / "best.zip")
        self.started += time.perf_counter() - paused


def _learn(cell: Cell, preset: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Train an agent of stable-baselines3, evaluating on the way and keeping the best.

    Returns:
        What was spent: `env_steps`, `updates`, `wall_s` without evaluations, and the `best` score.
    """
    agent = make_agent(cell.model, preset, cell.seed)
    import torch

    torch.set_num_threads(1)
    with (run / "metrics.csv").open("w", newline="") as file:
        evaluations = _Evaluations(agent, cell, preset, run, file)
        if cell.model == OFFLINE:
            _learn_offline(agent, cell, preset, evaluations)
        else:
            _learn_online(agent, cell, evaluations)
        if evaluations.evaluated_at != (evaluations.env_steps, evaluations.updates):
            evaluations.evaluate()
        seconds = time.perf_counter() - evaluations.started
    agent.get_env().close()
    return {
        "env_steps": evaluations.env_steps,
        "updates": evaluations.updates,
        "wall_s": seconds,
        "best": evaluations.best,
    }


def _learn_online(agent: Any, cell: Cell, evaluations: _Evaluations) -> None:
    if cell.env_steps is None:
        raise UserError(f"baseline {cell.model!r} needs a budget: set env_steps in the suite")
    agent.learn(cell.env_steps // evaluations.repeat, callback=evaluations.when_due)


def _learn_offline(
    agent: Any, cell: Cell, preset: Mapping[str, Any], evaluations: _Evaluations
) -> None:
    if cell.env_steps is not None:
        raise UserError(
            f"baseline {cell.model!r} takes no env steps: leave env_steps out of the suite, its "
            f"budget is `updates` in the preset {cell.preset!r}"
        )
    from benchmarks.offline_dqn import fill_buffer, learn
    from datamodules.offline_datamodule import OfflineDataModule

    settings, env = preset[OFFLINE], preset.get("env", {})
    fill_buffer(agent, OfflineDataModule(settings["source"], env=preset["task"], **env))
    learn(agent, settings["updates"], evaluations.when_due)


def _algorithm(name: str) -> Any:
    try:
        import stable_baselines3
    except ImportError as error:
        raise MissingExtra(f"baseline {name!r}", "baselines") from error
    return getattr(stable_baselines3, name.removeprefix("offline-").upper())


def _greedy(agent: Any) -> Act:
    return lambda obs: agent.predict(obs, deterministic=True)[0]


def _schedule(value: Any) -> Any:
    """`linear 0.001` as a function of the share of training that is left, all else unchanged."""
    if isinstance(value, str) and value.startswith("linear "):
        start = float(value.removeprefix("linear "))
        return lambda left: left * start
    return value
