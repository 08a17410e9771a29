from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from datamodules.envs import make_env
from datamodules.errors import UserError
from datamodules.workers import Action, EnvFailure, EnvPool, Reset, Transition

# The tests' own classes are not importable in a worker.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
KINDS = pytest.mark.parametrize("workers", ["sync", "async"])
ROOT = Path(__file__).parents[2]


class Scripted(gym.Env):
    """Does what the action says: 0 nothing, and otherwise one kind of trouble."""

    observation_space = Dict({"pid": Box(-np.inf, np.inf, (1,)), "t": Box(-np.inf, np.inf, (1,))})
    action_space = Discrete(10)
    render_mode = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {"text": "a", "object": object()}

    def step(self, action: int) -> tuple[Any, Any, bool, bool, dict]:
        self.t += 1
        if action == 1:
            raise RuntimeError("the wheel came off")
        if action == 2:
            os._exit(3)
        if action == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == 4:
            time.sleep(60)
        if action == 5:
            time.sleep(0.3)
        obs = self._obs()
        if action == 6:
            obs["t"] = np.array([np.nan], np.float32)
        if action == 7:
            obs["t"] = np.zeros(3, np.float32)
        if action == 8:
            del obs["t"]
        return obs, np.inf if action == 9 else 1.0, False, False, {}

    def _obs(self) -> dict[str, np.ndarray]:
        return {
            "pid": np.array([os.getpid()], np.float32),
            "t": np.array([self.t], np.float32),
        }


def started(env_fns: list[Callable[[], gym.Env]], workers: Any, **kwargs: Any) -> EnvPool:
    pool = EnvPool(env_fns, workers=workers, **kwargs)
    pool.step([Reset(seed) for seed in range(len(env_fns))])
    return pool


def processes(pool: EnvPool) -> list[int]:
    return [slot._process.pid for slot in pool._slots]  # type: ignore[attr-defined]


def gone(pid: int) -> bool:
    """No such process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_async_equals_sync_bit_for_bit() -> None:
    records = []
    for workers in ("sync", "async"):
        rng = np.random.default_rng(0)
        with EnvPool([partial(make_env, "CartPole-v1")] * 2, workers=workers) as pool:  # type: ignore[arg-type]
            record: list[Transition] = [pool.reset(0, 5), pool.reset(1, 6)]  # type: ignore[list-item]
            for _ in range(60):
                record += pool.step(  # type: ignore[arg-type]
                    [
                        Reset(seed=int(rng.integers(100)))
                        if last.terminated
                        else Action(rng.integers(2))
                        for last in record[-2:]
                    ]
                )
        records.append(record)
    assert any(result.terminated for result in records[0])
    for sync, parallel in zip(*records, strict=True):
        assert sync.obs["vector"].tobytes() == parallel.obs["vector"].tobytes()
        assert sync[1:] == parallel[1:]


@KINDS
def test_commands_reach_only_their_environment(workers: Any) -> None:
    with started([Scripted] * 3, workers) as pool:
        first = pool.step([Action(0), None, Reset()])
        assert first[1] is None
        assert [r.obs["t"].item() for r in (first[0], first[2])] == [1, 0]  # type: ignore[union-attr]
        assert [first[0].reward, first[2].reward] == [1.0, 0.0]  # type: ignore[union-attr]
        second = pool.step([Action(0)] * 3)
        assert [r.obs["t"].item() for r in second] == [2, 1, 1]  # type: ignore[union-attr]
        assert len(pool) == 3


@KINDS
def test_info_keeps_plain_values_only(workers: Any) -> None:
    with EnvPool([Scripted], workers=workers) as pool:
        assert pool.reset(0).info == {"text": "a"}  # type: ignore[union-attr]


def test_actions_arrive_in_the_units_of_the_space() -> None:
    class Echo(gym.Env):
        observation_space = Box(-10, 10, (2,), np.float32)
        action_space = Box(-1, 1, (2,), np.float64)

        def reset(self, **kwargs: Any) -> Any:
            return np.zeros(2), {}

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            return action, 0.0, False, False, {}

    with started([Echo], "async") as pool:
        result = pool.step_one(0, Action(np.array([0.5, -1], np.float32)))
        np.testing.assert_array_equal(result.obs["vector"], [0.5, -1])  # type: ignore[union-attr]


def test_async_environments_run_at_the_same_time() -> None:
    with started([Scripted] * 3, "async") as pool:
        start = time.monotonic()
        pool.step([Action(5)] * 3)
        assert time.monotonic() - start < 0.8  # one after the other takes 0.9
        assert len(set(processes(pool))) == 3


@KINDS
def test_a_raising_environment_fails_alone_and_restarts(workers: Any) -> None:
    with started([Scripted] * 2, workers) as pool:
        failed, fine = pool.step([Action(1), Action(0)])
        assert isinstance(failed, EnvFailure)
        assert failed.message == "environment 0 (Scripted) raised RuntimeError: the wheel came off"
        assert "in step" in failed.traceback
        assert isinstance(fine, Transition)
        assert pool.reset(0, seed=1) == failed  # until it is restarted
        pool.restart(0)
        assert pool.reset(0, seed=1).obs["t"] == 0  # type: ignore[union-attr]
        results = pool.step([Action(0), Action(0)])
        assert [r.obs["t"].item() for r in results] == [1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("action", "words"),
    [(2, "exited with code 3"), (3, "killed by SIGKILL"), (4, "did not answer within 1 seconds")],
)
def test_a_dead_or_hung_worker_fails_alone_and_restarts(action: int, words: str) -> None:
    with started([Scripted] * 2, "async", timeout=1.0) as pool:
        before = processes(pool)
        fine, failed = pool.step([Action(0), Action(action)])
        assert isinstance(failed, EnvFailure)
        assert failed.message.startswith("environment 1 (Scripted)")
        assert words in failed.message
        assert isinstance(fine, Transition)
        assert gone(before[1])
        pool.restart(1)
        assert processes(pool)[0] == before[0]
        assert processes(pool)[1] != before[1]
        assert isinstance(pool.reset(1), Transition)


def test_a_worker_that_dies_between_rounds_fails_in_the_next() -> None:
    with started([Scripted], "async") as pool:
        os.kill(processes(pool)[0], signal.SIGKILL)
        result = pool.step_one(0, Action(0))
        assert isinstance(result, EnvFailure)
        assert "SIGKILL" in result.message


@KINDS
@pytest.mark.parametrize(
    ("action", "words"),
    [
        (6, "NaN or infinity in observation 't'"),
        (7, r"observation 't' as float32\[3\].*float32\[1\]"),
        (8, r"keys \['pid'\].*\['pid', 't'\]"),
        (9, "reward inf"),
    ],
)
def test_broken_observations_stop_the_run(workers: Any, action: int, words: str) -> None:
    with started([Scripted] * 2, workers) as pool:
        message = rf"environment 1 \(Scripted\).*{words}.*fix the environment"
        with pytest.raises(UserError, match=message):
            pool.step([Action(0), Action(action)])


def test_actions_must_be_finite() -> None:
    with (
        started([partial(make_env, "Pendulum-v1")], "sync") as pool,
        pytest.raises(UserError, match="action for environment 0"),
    ):
        pool.step_one(0, Action(np.array([np.nan])))


@KINDS
def test_an_environment_that_cannot_be_built_is_a_user_error(workers: Any) -> None:
    def broken() -> gym.Env:
        raise FileNotFoundError("level.dat")

    with pytest.raises(UserError, match=r"environment 1 could not be built: .*level\.dat"):
        EnvPool([Scripted, broken], workers=workers)
    with pytest.raises(UserError, match="CartPole-v1"):
        EnvPool([partial(make_env, "CartPol-v1")], workers=workers)
    with pytest.raises(UserError, match="must have the same spaces"):
        EnvPool([Scripted, partial(make_env, "CartPole-v1")], workers=workers)


def test_a_callable_that_cannot_be_pickled_is_a_user_error() -> None:
    lock = threading.Lock()
    with pytest.raises(UserError, match="workers='sync'"):
        EnvPool([lambda: lock and Scripted()], workers="async")  # type: ignore[arg-type, return-value]


def test_arguments_are_checked() -> None:
    for kwargs in ({"workers": "threads"}, {"timeout": 0.0}):
        with pytest.raises(UserError, match=next(iter(kwargs))):
            EnvPool([Scripted], **kwargs)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one"):
        EnvPool([])


def test_an_interrupted_round_leaves_no_stale_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with started([Scripted] * 2, "async") as pool:

        def interrupt(*_: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pool._slots[0], "receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.step([Action(0), Action(0)])
        results = pool.step([Action(0), Action(0)])
        assert all("interrupted" in result.message for result in results)  # type: ignore[union-attr]
        pool.restart(1)
        assert pool.reset(1).obs["t"] == 0  # type: ignore[union-attr]


def test_close_leaves_no_processes_even_of_hung_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datamodules.envs.slots.CLOSE_SECONDS", 0.3)
    pool = started([Scripted] * 2, "async")
    pool._slots[0].send(Action(4))
    pids = processes(pool)
    pool.close()
    pool.close()
    assert all(gone(pid) for pid in pids)


SCRIPT = """
import os, sys, time
from functools import partial
from datamodules.envs import make_env
from datamodules.workers import Action, EnvPool, Reset
import gymnasium as gym
import numpy as np

class Mine(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)
    def reset(self, **kwargs):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        if action: time.sleep(60)
        return np.zeros(1, np.float32), 0.0, False, False, {}

pool = EnvPool([Mine] * 2, workers="async")
print(*[slot._process.pid for slot in pool._slots], flush=True)
pool.step([Reset(), Reset()])
if sys.argv[1] == "hang": pool.step([Action(1), Action(1)])
while sys.argv[1] == "loop": pool.step([Action(0), Action(0)])
"""


def script(tmp_path: Path, mode: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Runs a script without a main guard in its own process group; gives its workers too."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(path), mode],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def test_a_script_that_forgets_to_close_ends_quietly(tmp_path: Path) -> None:
    process, pids = script(tmp_path, "end")
    _, errors = process.communicate(timeout=20)
    assert len(pids) == 2
    assert (process.returncode, errors) == (0, "")
    assert all(gone(pid) for pid in pids)


def test_control_c_shows_only_the_parents_traceback(tmp_path: Path) -> None:
    process, pids = script(tmp_path, "loop")
    time.sleep(0.2)
    try:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()  # nothing is left running by a failure
    assert len(pids) == 2
    assert errors.count("Traceback") == 1
    assert "script.py" in errors
    assert "KeyboardInterrupt" in errors
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("mode", ["loop", "hang"])
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, mode: str) -> None:
    process, pids = script(tmp_path, mode)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert len(pids) == 2
    # Orphans are reaped by init, or stay as zombies where a container has none.
    assert within(5, lambda: all(gone(pid) or is_zombie(pid) for pid in pids))


def is_zombie(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"
