"""Records what policies do in an environment: the `collect` of `zoo data`.

Only whole episodes are recorded, in the order in which they began, until there are enough: the
first to end of several side by side would be the short ones. Each policy writes one stream of the
store, so that a mixture can be taken apart again. A collection that was killed goes on after the
last episode that was committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from datamodules.collector import Actor, Collector, RandomPolicy
from datamodules.errors import UserError
from datamodules.files import read_json, write_json
from datamodules.sources.source import step_fields
from datamodules.sources.writing import append_episode, chunk_steps, store_attributes
from datamodules.spec import Spec
from datamodules.store import EpisodeStore
from datamodules.workers import EnvPool
from zoo.base import Policy, ReturnConditioned, State
from zoo.runs import load
from zoo.sb3_policy import Sb3Policy

PROGRESS = "collection.json"
COMMIT_SECONDS = 5.0
SB3 = "sb3:"


@dataclass(frozen=True)
class Part:
    """What one policy of a mixture contributes.

    Attributes:
        policy: "random", "sb3:FILE", or whatever `zoo.load` takes.
        share: of the steps or episodes, relative to the other parts.
        epsilon: share of its actions that are random instead.
        greedy: its best actions rather than samples.
    """

    policy: str
    share: float = 1.0
    epsilon: float = 0.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise UserError(f"the share {self.share} of the policy '{self.policy}' must be above 0")
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"epsilon is {self.epsilon}: it must be in [0, 1]")


@dataclass(frozen=True)
class Amount:
    """How much to record: at least so many steps of an agent, or just so many episodes."""

    unit: Literal["steps", "episodes"]
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"--{self.unit} {self.count}: at least 1")

    def shares(self, parts: Sequence[Part]) -> list[int]:
        """The count of each part; they add up."""
        weights = np.array([part.share for part in parts])
        ends = np.rint(self.count * np.cumsum(weights) / weights.sum()).astype(int)
        return np.diff(ends, prepend=0).tolist()


Tick = Callable[[str, int, int], None]  # policy, done, wanted


def collect(
    make_env: Callable[[], gym.Env],
    env: str,
    parts: Sequence[Part],
    amount: Amount,
    path: Path,
    *,
    seed: int = 0,
    num_envs: int = 8,
    workers: Literal["sync", "async"] = "sync",
    resume: bool = False,
    tick: Tick | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Records into a store.

    Args:
        make_env: builds one environment.
        env: how it is called.
        parts: the policies.
        amount: how much of all of them together.
        path: folder of the store.
        seed: of environments and noise.
        num_envs: environments that are played side by side.
        workers: "sync" or "async", see `EnvPool`.
        resume: go on with a collection; the amount may be larger than it was.
        tick: called after each step of the environments.
        options: what else the environment was built with, plain data: noted in the store, so that
            nobody goes on with others.

    Raises:
        UserError: a policy that does not fit, or another collection at this path.
    """
    if num_envs < 1:
        raise UserError(f"--num-envs {num_envs}: at least 1")
    settings = {"seed": seed, "parts": [[p.policy, p.epsilon, p.greedy] for p in parts]}
    settings |= {"options": dict(options or {})}
    with EnvPool([make_env] * num_envs, workers=workers) as pool:
        actors = [_actor(part, pool.spec, seed, stream) for stream, part in enumerate(parts)]
        attributes = store_attributes(
            pool.spec, env, policies=[_name(p) for p in parts], collect=settings
        )
        with _open(path, pool.spec, attributes, resume) as store:
            wanted = amount.shares(parts)
            for stream, (part, actor, count) in enumerate(zip(parts, actors, wanted, strict=True)):
                recorder = _Recorder(store, stream, Amount(amount.unit, max(count, 1)))
                _play(pool, actor, recorder, seed, partial(_say, tick, part))


def _play(
    pool: EnvPool, actor: _Acting, recorder: _Recorder, seed: int, said: Callable[[_Recorder], None]
) -> None:
    """Plays until the recorder has enough."""
    # Streams are seeded apart, as ranks are, and a resumed one after all of its episodes so far.
    collector = Collector(pool, pool.spec, recorder, seed, recorder.stream)  # type: ignore[arg-type]
    begun = recorder.episodes
    for slot in collector.slots:
        slot.episode = begun - 1
    noise = np.random.SeedSequence(seed, spawn_key=(recorder.stream, begun, 1))
    torch.manual_seed(int(noise.generate_state(1)[0]))
    actor.rng.bit_generator.state = np.random.PCG64(noise.spawn(1)[0]).state
    committed = time.monotonic()
    with torch.no_grad():
        while not recorder.done:
            collector.advance(actor)
            said(recorder)
            if time.monotonic() > committed + COMMIT_SECONDS:
                recorder.commit()
                committed = time.monotonic()
    recorder.commit()


class _Recorder:
    """Takes the steps of the environments and stores whole episodes, in the order they began."""

    def __init__(self, store: EpisodeStore, stream: int, amount: Amount) -> None:
        self.store, self.stream, self.amount = store, stream, amount
        held = [e for e in store.episodes() if e.stream == stream]
        self.episodes = len(held)
        self.steps = sum(e.length - 1 for e in held)
        self._rows: dict[int, list[dict[str, np.ndarray]]] = {}
        self._ticket: dict[int, int] = {}  # of the running episode of each environment
        self._finished: dict[int, list[dict[str, np.ndarray]]] = {}
        self._next_ticket = self._next_stored = 0

    @property
    def count(self) -> int:
        """Steps or episodes stored, whatever is counted."""
        return self.steps if self.amount.unit == "steps" else self.episodes

    @property
    def done(self) -> bool:
        """Whether there is enough."""
        return self.count >= self.amount.count

    def add(
        self, index: int, row: dict[str, np.ndarray], latents: Mapping[str, np.ndarray]
    ) -> None:
        """One step of an environment, as `ReplayBuffer.add`."""
        if row["is_first"]:
            self._rows[index] = []
            self._ticket[index] = self._next_ticket
            self._next_ticket += 1
        self._rows[index].append(row)
        if row["is_last"]:
            self._finished[self._ticket[index]] = self._rows.pop(index)
            while self._next_stored in self._finished:
                self._store(self._finished.pop(self._next_stored))
                self._next_stored += 1

    def commit(self) -> None:
        """From here a killed collection goes on."""
        self.store.flush(durable=True)
        write_json(self.store.path / PROGRESS, {"position": self.store.position()}, durable=True)

    def _store(self, rows: list[dict[str, np.ndarray]]) -> None:
        if self.done or len(rows) < 2:  # of an environment that failed at once
            return
        episode = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        append_episode(self.store, self.stream, episode)
        self.episodes += 1
        self.steps += len(rows) - 1


class _Acting:
    """A policy as a part of a mixture lets it act."""

    def __init__(self, actor: Actor, part: Part, spec: Spec, rng: np.random.Generator) -> None:
        self.rng = rng
        self._actor, self._part, self._spec = actor, part, spec
        if isinstance(actor, ReturnConditioned):
            self.rewarded = actor.rewarded

    def initial_state(self, batch_size: int) -> State:
        """The policy's."""
        return self._actor.initial_state(batch_size)

    def act(
        self, obs: Mapping[str, Tensor], state: State, *, explore: bool
    ) -> tuple[Tensor, State]:
        """The policy's actions, some of them replaced by random ones."""
        action, state = self._actor.act(obs, state, explore=not self._part.greedy)
        if self._part.epsilon:
            action = action.clone()
            for row in np.flatnonzero(self.rng.random(len(action)) < self._part.epsilon):
                action[row] = torch.as_tensor(self._spec.action.sample(self.rng))
        return action, state


def _actor(part: Part, spec: Spec, seed: int, stream: int) -> _Acting:
    rng = np.random.default_rng([seed, stream])
    if part.policy == "random":
        return _Acting(RandomPolicy(spec, rng), part, spec, rng)
    if part.policy.startswith(SB3):
        return _Acting(Sb3Policy(Path(part.policy[len(SB3) :]), spec), part, spec, rng)
    model = load(part.policy)
    actor: Any = model
    if not isinstance(actor, Policy):
        raise UserError(f"the policy '{part.policy}' is a {type(model).__name__}, which cannot act")
    if model.spec != spec:
        raise UserError(
            f"the policy '{part.policy}' was made for {model.spec}, but the environment has {spec}"
        )
    return _Acting(actor, part, spec, rng)


def _open(path: Path, spec: Spec, attributes: dict[str, Any], resume: bool) -> EpisodeStore:
    """A new store, or the one to go on with, without what was not committed."""
    if not EpisodeStore.exists(path):
        fields = step_fields(spec)
        store = EpisodeStore.create(path, fields, chunk_steps(fields), attributes)
        write_json(path / PROGRESS, {"position": store.position()}, durable=True)
        return store
    if not resume:
        raise UserError(f"'{path}' is there already: add --resume to go on, or name another --out")
    store = EpisodeStore.open(path, writable=True)
    try:
        if store.attributes != attributes:
            raise UserError(
                f"'{path}' holds another collection ({_told(store.attributes)}), not this one "
                f"({_told(attributes)}): name another --out"
            )
        store.rewind(read_json(path / PROGRESS)["position"])
    except BaseException:
        store.close()
        raise
    return store


def _told(attributes: Mapping[str, Any]) -> str:
    policies = ", ".join(attributes.get("policies", ["somebody"]))
    settings = attributes.get("collect", {})
    options = "".join(f", {k} {v}" for k, v in settings.get("options", {}).items())
    return f"{attributes.get('env')} by {policies}, seed {settings.get('seed', 'unknown')}{options}"


def _name(part: Part) -> str:
    """How the store calls a policy."""
    more = [f"epsilon {part.epsilon:g}"] if part.epsilon else []
    more += ["greedy"] if part.greedy else []
    return part.policy + (f" ({', '.join(more)})" if more else "")


def _say(tick: Tick | None, part: Part, recorder: _Recorder) -> None:
    if tick is not None:
        tick(part.policy, min(recorder.count, recorder.amount.count), recorder.amount.count)
