"""`EnvPool`: several environments that step together, in this process or each in its own.

Invariants: both kinds give the same numbers, bit for bit; an environment that fails takes down
nothing but its own slot; what an environment returns is checked against its spec.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np

from datamodules.envs.slots import (
    Action,
    Command,
    EnvFailure,
    EnvFn,
    LocalSlot,
    ProcessSlot,
    Reset,
    Result,
    Slot,
    Transition,
    close_slots,
)
from datamodules.errors import UserError
from datamodules.spec import Spec

__all__ = ["Action", "Command", "EnvFailure", "EnvPool", "Reset", "Result", "Transition"]


class EnvPool:
    """Environments that all answer one round of commands.

    Args:
        env_fns: one callable per environment, as from `functools.partial(make_env, ...)`. All must
            have the same spec. What they return is wrapped in `DictObservation` if it is not yet.
        workers: `sync` (one after the other, in this process) or `async` (a process each, all at
            once; POSIX systems; callables are pickled by cloudpickle).
        timeout: seconds one answer may take before the environment counts as hung; `async` only.

    Raises:
        UserError: an environment cannot be built, or its spec differs from the first one's.

    Example:
        >>> import gymnasium as gym
        >>> pool = EnvPool([lambda: gym.make("CartPole-v1")] * 2)
        >>> first = pool.reset(0, seed=1)
        >>> results = pool.step([Action(1), Reset(seed=2)])
        >>> results[0].obs["vector"].shape, results[0].reward
        ((4,), 1.0)
        >>> pool.close()
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        *,
        workers: Literal["sync", "async"] = "sync",
        timeout: float | None = None,
    ) -> None:
        if not env_fns:
            raise UserError("an EnvPool needs at least one environment")
        if workers not in ("sync", "async"):
            raise UserError(f"workers={workers!r} must be sync or async")
        if workers == "async" and sys.platform == "win32":
            raise UserError("workers='async' needs a POSIX system: use workers='sync'")
        if timeout is not None and timeout <= 0:
            raise UserError(f"timeout={timeout} must be a positive number of seconds")
        self._make_slot = LocalSlot if workers == "sync" else ProcessSlot
        self._env_fns = list(env_fns)
        self._timeout = timeout
        self._failures: dict[int, EnvFailure] = {}
        self._awaited: set[int] = set()
        self._slots: list[Slot] = []
        # Also at the interpreter's exit, for whoever forgets to close.
        self._finalizer = weakref.finalize(self, close_slots, self._slots)
        try:
            for index, env_fn in enumerate(env_fns):
                self._slots.append(self._make_slot(index, env_fn))
            specs = [slot.ready() for slot in self._slots]
        except BaseException:
            self.close()
            raise
        self.spec: Spec = specs[0]
        for index, spec in enumerate(specs):
            self._require_same(index, spec)

    def __len__(self) -> int:
        return len(self._slots)

    def reset(self, index: int, seed: int | None = None) -> Result:
        """Resets one environment and leaves the others alone."""
        return self.step_one(index, Reset(seed))

    def step_one(self, index: int, command: Reset | Action) -> Result:
        """A round with one command; see `step`."""
        commands: list[Command] = [None] * len(self)
        commands[index] = command
        result = self.step(commands)[index]
        assert result is not None
        return result

    @overload
    def step(self, commands: Sequence[Reset | Action]) -> list[Result]: ...

    @overload
    def step(self, commands: Sequence[Command]) -> list[Result | None]: ...

    def step(self, commands: Sequence[Command]) -> Sequence[Result | None]:
        """Sends one command to each environment, and waits for all the answers.

        Args:
            commands: one per environment; None leaves that environment alone.

        Returns:
            One answer per command, None for None. A failed environment answers every command with
            the same `EnvFailure` until it is restarted.

        Raises:
            UserError: an observation or reward that is not finite or not as the spec says, or an
                action that is not finite; names the environment and the key.
        """
        if len(commands) != len(self):
            raise ValueError(f"{len(commands)} commands for {len(self)} environments")
        for index, command in enumerate(commands):
            if isinstance(command, Action) and not np.isfinite(command.value).all():
                raise UserError(
                    f"the action for environment {index} ({self._slots[index].name}) is not "
                    f"finite: {command.value}; check the policy's outputs"
                )
        self._fail_interrupted()
        live = [i for i, c in enumerate(commands) if c is not None and i not in self._failures]
        self._awaited.update(live)
        for index in live:
            self._slots[index].send(commands[index])
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        results: list[Result | None] = [
            None if command is None else self._failures.get(index)
            for index, command in enumerate(commands)
        ]
        for index in live:
            result = self._slots[index].receive(deadline, self._timeout)
            self._awaited.discard(index)
            if isinstance(result, EnvFailure):
                self._failures[index] = result
            results[index] = result
        for index, answer in enumerate(results):
            if isinstance(answer, Transition):
                self._check(index, answer)
        return results

    def restart(self, index: int) -> None:
        """Replaces an environment by a fresh one (a new process if async); reset it next.

        Raises:
            UserError: it cannot be built again.
        """
        close_slots([self._slots[index]])
        self._slots[index] = self._make_slot(index, self._env_fns[index])
        self._require_same(index, self._slots[index].ready())
        self._failures.pop(index, None)
        self._awaited.discard(index)

    def close(self) -> None:
        """Closes every environment and waits until every process is gone; may be repeated."""
        self._finalizer()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fail_interrupted(self) -> None:
        """After an exception between command and answer, nobody knows where an episode stands."""
        for index in self._awaited:
            name = self._slots[index].name
            self._failures[index] = EnvFailure(f"environment {index} ({name}) was interrupted")
        self._awaited.clear()

    def _require_same(self, index: int, spec: Spec) -> None:
        if spec != self.spec:
            self.close()
            raise UserError(
                f"environment {index} has {spec}, but environment 0 has {self.spec}: all "
                "environments of a pool must have the same spaces"
            )

    def _check(self, index: int, result: Transition) -> None:
        where = f"environment {index} ({self._slots[index].name})"
        expected = self.spec.obs
        if result.obs.keys() != expected.keys():
            raise UserError(
                f"{where} returned the observation keys {sorted(result.obs)}, but its space has "
                f"{sorted(expected)}: fix the environment"
            )
        for key, array in result.obs.items():
            spec = expected[key]
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise UserError(
                    f"{where} returned observation '{key}' as {array.dtype}{list(array.shape)}, "
                    f"but its space says {spec.dtype}{list(spec.shape)}: fix the environment"
                )
            if not spec.is_image and not np.isfinite(array).all():
                raise UserError(
                    f"{where} returned NaN or infinity in observation '{key}': fix the environment"
                )
        if not np.isfinite(result.reward):
            raise UserError(f"{where} returned the reward {result.reward}: fix the environment")
