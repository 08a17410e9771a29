"""One environment of a pool: in this process, or in a worker process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import cloudpickle
import gymnasium as gym
import numpy as np

from datamodules.envs.wrappers import DictObservation
from datamodules.errors import UserError
from datamodules.processes import epitaph, start_worker
from datamodules.spec import Spec

CLOSE_SECONDS = 5.0  # how long environments may take to close before their processes are killed


class Reset(NamedTuple):
    """Start an episode; without a seed the environment's own generator goes on."""

    seed: int | None = None


class Action(NamedTuple):
    """One action: () int64, (A,) int64 or (A,) float32, in the environment's units."""

    value: Any


class Transition(NamedTuple):
    """What an environment answered; after a reset the reward is 0 and both flags are false.

    `info` keeps only numbers, strings and arrays.
    """

    obs: dict[str, np.ndarray]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class EnvFailure(NamedTuple):
    """An environment raised, died or hung; its slot needs `EnvPool.restart`.

    `traceback` is the environment's own, empty where there is none.
    """

    message: str
    traceback: str = ""


Command = Reset | Action | None
Result = Transition | EnvFailure
EnvFn = Callable[[], gym.Env]


class Slot(Protocol):
    """One environment; every `send` is followed by one `receive`."""

    name: str

    def ready(self) -> Spec:
        """Waits until the environment is built.

        Raises:
            UserError: it cannot be built.
        """

    def send(self, command: Command) -> None:
        """Hands over a command without waiting."""

    def receive(self, deadline: float | None, timeout: float | None) -> Result:
        """Waits for the answer, until `deadline` (monotonic seconds) if it runs in a process."""

    def begin_close(self) -> None:
        """Tells the environment to close."""

    def end_close(self, deadline: float) -> None:
        """Waits until it has closed; kills its process at `deadline`."""


class LocalSlot:
    """An environment in this process."""

    def __init__(self, index: int, env_fn: EnvFn) -> None:
        self._index = index
        self._command: Command = None
        try:
            self._env = _build(env_fn)
        except UserError:
            raise
        except Exception as error:
            raise UserError(_not_built(index, _describe(error))) from error
        self.name = self._env.name

    def ready(self) -> Spec:
        """It was built by the constructor."""
        return self._env.spec_of_arrays

    def send(self, command: Command) -> None:
        """Keeps the command for `receive`."""
        self._command = command

    def receive(self, deadline: float | None, timeout: float | None) -> Result:
        """Executes the command; nothing can interrupt it."""
        try:
            return _execute(self._env, self._command)
        except UserError:
            raise
        except Exception as error:
            return _raised(self._index, self.name, _describe(error), traceback.format_exc())

    def begin_close(self) -> None:
        """Closes the environment."""
        with contextlib.suppress(Exception):  # a broken environment may not close either
            self._env.close()

    def end_close(self, deadline: float) -> None:
        """Nothing to wait for."""


class ProcessSlot:
    """An environment in a process of its own; the constructor does not wait for it."""

    def __init__(self, index: int, env_fn: EnvFn) -> None:
        self._index = index
        self.name = "not built yet"
        try:
            pickled = cloudpickle.dumps(env_fn)
        except Exception as error:
            raise UserError(
                f"environment {index} cannot be sent to a worker process ({_describe(error)}): use "
                "workers='sync', or build what it needs inside the callable"
            ) from error
        self._process, self._connection = start_worker("datamodules.envs.slots:serve")
        with contextlib.suppress(OSError):  # it died: `ready` says so
            self._connection.send_bytes(pickled)

    def ready(self) -> Spec:
        """Waits until the worker has built it."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise UserError(_not_built(self._index, self._epitaph())) from None
        if isinstance(answer, _Raised):
            if answer.user_error is not None:
                raise answer.user_error
            error = UserError(_not_built(self._index, answer.message))
            raise error from RuntimeError(f"in the worker:\n{answer.traceback}")
        self.name, spec = answer
        return Spec.from_dict(spec)

    def send(self, command: Command) -> None:
        """Sends the command down the pipe."""
        with contextlib.suppress(OSError):  # it died: `receive` says so
            self._connection.send(command)

    def receive(self, deadline: float | None, timeout: float | None) -> Result:
        """Waits for the answer, or for the end of the worker."""
        where = f"environment {self._index} ({self.name})"
        try:
            if deadline is not None and not self._connection.poll(
                max(0.0, deadline - time.monotonic())
            ):
                self._kill()
                return EnvFailure(f"{where} did not answer within {timeout:g} seconds")
            answer = self._connection.recv()
        except (EOFError, OSError):
            return EnvFailure(f"{where} failed: {self._epitaph()}")
        if isinstance(answer, _Raised):
            if answer.user_error is not None:
                raise answer.user_error
            return _raised(self._index, self.name, answer.message, answer.traceback)
        return Transition(*answer)

    def begin_close(self) -> None:
        """Closes the pipe: the worker reads its end, closes and exits."""
        self._connection.close()

    def end_close(self, deadline: float) -> None:
        """Waits for the process, and kills it at the deadline."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._kill()

    def _epitaph(self) -> str:
        """How the worker ended, for people."""
        return epitaph(self._process, CLOSE_SECONDS)

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()


class _Raised(NamedTuple):
    """An exception on its way from a worker."""

    message: str
    traceback: str
    user_error: UserError | None = None


def serve(connection: Connection) -> None:
    """A worker process: builds one environment and answers commands until its parent is gone."""
    env: DictObservation | None = None
    try:
        env = _build(cloudpickle.loads(connection.recv_bytes()))
        connection.send((env.name, env.spec_of_arrays.to_dict()))
        while True:
            command = connection.recv()
            connection.send(tuple(_execute(env, command)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # closed by the parent
    except Exception as error:
        # A subclass may not survive pickling: its constructor takes other arguments.
        user_error = UserError(str(error)) if isinstance(error, UserError) else None
        with contextlib.suppress(OSError):
            connection.send(_Raised(_describe(error), traceback.format_exc(), user_error))
    finally:
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


def _build(env_fn: EnvFn) -> DictObservation:
    env = env_fn()
    return env if isinstance(env, DictObservation) else DictObservation(env)


def _execute(env: DictObservation, command: Command) -> Transition:
    if isinstance(command, Reset):
        obs, info = env.reset(seed=command.seed)
        return Transition(obs, 0.0, False, False, _plain(info))
    assert command is not None
    obs, reward, terminated, truncated, info = env.step(command.value)
    return Transition(obs, float(reward), bool(terminated), bool(truncated), _plain(info))


def _plain(info: dict[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, str, np.generic, np.ndarray)
    return {key: value for key, value in info.items() if isinstance(value, kinds)}


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _raised(index: int, name: str, message: str, trace: str) -> EnvFailure:
    return EnvFailure(f"environment {index} ({name}) raised {message}", trace)


def _not_built(index: int, reason: str) -> str:
    return f"environment {index} could not be built: {reason}"


def close_slots(slots: list[Slot]) -> None:
    """Closes environments all at once, and forgets them."""
    deadline = time.monotonic() + CLOSE_SECONDS
    for slot in slots:
        slot.begin_close()
    for slot in slots:
        slot.end_close(deadline)
    slots.clear()
