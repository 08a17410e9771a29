"""Steps environments with a policy and records what happens.

A step is written to the replay once it is complete: its action was chosen and the environment
answered it (or the recording ended). So a crash of an environment can still close the episode at
its last good step, and stored steps never change.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.replay import ReplayBuffer
from datamodules.spec import Spec
from datamodules.workers import Action, EnvFailure, EnvPool, Reset, Transition

MAX_FAILURES = 3


class Actor(Protocol):
    """What the collector asks of a policy.

    One that has a method `rewarded(state, reward)` hears before each `act` what its last action
    earned (B,), and gets the state from it; zeros at the start of an episode.
    """

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state before an episode, {key: (B, ...)}."""

    def act(
        self, obs: Mapping[str, Tensor], state: dict[str, Tensor], *, explore: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions for a batch of observations, and the next state."""


class RandomPolicy:
    """Uniformly random actions, each held for 1 to `hold` steps.

    Args:
        spec: of the environments.
        rng: source of the draws.
        hold: longest time that an action is repeated; the length is drawn uniformly.
    """

    def __init__(self, spec: Spec, rng: np.random.Generator, hold: int = 1) -> None:
        self.spec, self.rng, self.hold = spec, rng, hold

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The action that goes on, and for how many more steps."""
        if self.hold == 1:
            return {}
        action = torch.zeros(batch_size, *self.spec.action.shape)
        left = torch.zeros(batch_size, dtype=torch.int64)
        return {"action": action.to(getattr(torch, self.spec.action.dtype)), "left": left}

    def act(
        self, obs: Mapping[str, Tensor], state: dict[str, Tensor], *, explore: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One random action for each row of the observations."""
        rows = len(next(iter(obs.values())))
        if self.hold == 1:
            actions = np.stack([self.spec.action.sample(self.rng) for _ in range(rows)])
            return torch.from_numpy(actions), state
        action, left = state["action"].clone(), state["left"].clone()
        for row in torch.nonzero(left == 0).flatten().tolist():
            action[row] = torch.from_numpy(np.asarray(self.spec.action.sample(self.rng)))
            left[row] = int(self.rng.integers(1, self.hold + 1))
        return action, {"action": action, "left": left - 1}


class FinishedEpisode(NamedTuple):
    """Return, length in agent steps, and the collector's agent steps at its end."""

    return_: float
    length: int
    agent_steps: int


class Player(Protocol):
    """Acts in many episodes at once, and knows which is which."""

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state before an episode, {key: (B, ...)}."""

    def act(
        self, obs: Mapping[str, Tensor], state: dict[str, Tensor], episode: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions for observations {key: (B, ...)} of the episodes (B,), and the next state."""


class Played(NamedTuple):
    """Return (N,) and length (N,) in agent steps of N episodes."""

    reward: np.ndarray
    length: np.ndarray


def play(
    pool: EnvPool,
    player: Player,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    horizon: int | None = None,
) -> Played:
    """Plays one episode from each seed, as many at once as there are environments.

    Args:
        pool: the environments.
        player: chooses the actions.
        seeds: of the episodes.
        device: where the player wants observations.
        horizon: steps after which an episode is cut.

    Raises:
        UserError: an environment failed, for an episode that is left out would distort the score.
    """
    reward, length = np.zeros(len(seeds), np.float32), np.zeros(len(seeds), np.int64)
    waiting = deque(range(len(seeds)))
    running: list[int | None] = [None] * len(pool)
    obs: list[dict[str, np.ndarray]] = [{} for _ in running]
    rows: list[dict[str, Tensor]] = [{} for _ in running]
    actions: dict[int, np.ndarray] = {}
    while True:
        commands: list[Reset | Action | None] = []
        for slot, episode in enumerate(running):
            if episode is None and waiting:
                running[slot] = fresh = waiting.popleft()
                rows[slot] = player.initial_state(1)
                commands.append(Reset(seeds[fresh]))
            else:
                commands.append(None if episode is None else Action(actions[slot]))
        if all(episode is None for episode in running):
            return Played(reward, length)
        for slot, (command, result) in enumerate(zip(commands, pool.step(commands), strict=True)):
            episode = running[slot]
            if result is None or episode is None:
                continue
            if isinstance(result, EnvFailure):
                raise UserError(
                    f"environment {slot} failed while a policy was scored: {result.message}; mend "
                    "the environment and resume the run"
                )
            obs[slot] = result.obs
            if isinstance(command, Action):
                reward[episode] += result.reward
                length[episode] += 1
            if result.terminated or result.truncated or length[episode] == horizon:
                running[slot] = None
        live = [(slot, episode) for slot, episode in enumerate(running) if episode is not None]
        if live:
            slots = [slot for slot, _ in live]
            stacked = {k: np.stack([obs[slot][k] for slot in slots]) for k in obs[slots[0]]}
            state = {k: torch.cat([rows[slot][k] for slot in slots]) for k in rows[slots[0]]}
            action, state = player.act(
                {k: torch.from_numpy(v).to(device) for k, v in stacked.items()},
                state,
                torch.tensor([episode for _, episode in live], device=device),
            )
            for i, slot in enumerate(slots):
                rows[slot] = {key: value[i : i + 1] for key, value in state.items()}
                actions[slot] = action[i].cpu().numpy()


class _Slot:
    """One environment: its running episode and the step that awaits its outcome."""

    def __init__(self) -> None:
        self.episode = -1  # number of the running episode
        self.over = True  # the next command is a reset
        self.row: dict[str, np.ndarray] = {}
        self.latents: dict[str, np.ndarray] = {}
        self.waiting = False  # `row` is not written yet
        self.life_lost = False  # over, but the game goes on (Atari): reset without a seed
        # What brings a fresh environment here: all actions since the last reset with a seed, and
        # how many of them came before each reset without one.
        self.actions: list[np.ndarray] = []
        self.soft_resets: list[int] = []
        self.checksum = 0  # of everything the environment answered since then
        self.return_ = 0.0
        self.length = 0
        self.failures = 0


class Collector:
    """Drives `num_envs` environments and writes stream i of the replay from environment i.

    Args:
        pool: the environments.
        spec: of these environments.
        replay: where steps go.
        seed: entropy of the episodes' seeds.
        rank: of this process; ranks never share seeds.
        device: where the policy wants observations.
    """

    def __init__(
        self,
        pool: EnvPool,
        spec: Spec,
        replay: ReplayBuffer,
        seed: int,
        rank: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pool, self.spec, self.replay = pool, spec, replay
        self.seed, self.rank, self.device = seed, rank, device
        self.slots = [_Slot() for _ in range(len(pool))]
        self.state: dict[str, Tensor] | None = None
        self._actor: Actor | None = None
        self.agent_steps = 0
        self.episodes = 0
        self.failures = 0
        self.finished: deque[FinishedEpisode] = deque(maxlen=100)

    def advance(self, actor: Actor) -> None:
        """One step of every environment (a reset where an episode ended), then new actions."""
        commands = [
            self._reset_command(i) if slot.over else Action(slot.row["action"])
            for i, slot in enumerate(self.slots)
        ]
        for i, result in enumerate(self.pool.step(commands)):
            self._receive(i, result)
        self._act(actor)

    def _reset_command(self, index: int) -> Reset:
        """A reset with the next episode's own seed."""
        slot = self.slots[index]
        if slot.life_lost:
            return Reset(None)
        slot.episode += 1
        return Reset(self._episode_seed(index, slot.episode))

    def _episode_seed(self, index: int, episode: int) -> int:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.rank, index, episode))
        return int(sequence.generate_state(1)[0])

    def _receive(self, index: int, result: Transition | EnvFailure) -> None:
        slot = self.slots[index]
        first = slot.over
        if isinstance(result, EnvFailure):
            result, first = self._recover(index, result), True
        elif not first:
            slot.failures = 0
            slot.length += 1
            self.agent_steps += 1
        if slot.waiting:
            self._write(index)
        if first:
            slot.return_, slot.length = 0.0, 0
            if slot.life_lost:
                slot.soft_resets.append(len(slot.actions))
            else:
                slot.actions, slot.soft_resets, slot.checksum = [], [], 0
        slot.life_lost = bool(result.info.get("life_lost", False))
        slot.over = result.terminated or result.truncated
        slot.row = self._row(result, first)
        slot.waiting = True
        slot.checksum = _checksum(slot.row, slot.checksum)
        slot.return_ += float(slot.row["reward"])

    def _row(self, result: Transition, first: bool) -> dict[str, np.ndarray]:
        row = {f"obs/{key}": value for key, value in result.obs.items()}
        row["reward"] = np.array(0.0 if first else result.reward, np.float32)
        row["is_first"] = np.array(first)
        row["is_last"] = np.array(result.terminated or result.truncated)
        row["is_terminal"] = np.array(result.terminated)
        row["action"] = np.zeros(self.spec.action.shape, self.spec.action.dtype)
        return row

    def _recover(self, index: int, failure: EnvFailure) -> Transition:
        """Closes the episode as truncated and starts a fresh environment, thrice at the most."""
        slot = self.slots[index]
        if slot.waiting:
            self._truncate(index)
        while True:
            slot.failures += 1
            self.failures += 1
            if slot.failures >= MAX_FAILURES:
                raise UserError(
                    f"environment {index} failed {slot.failures} times in a row, the last time "
                    f"with: {failure.message}; mend the environment and resume the run"
                )
            warnings.warn(
                f"environment {index} failed and was restarted: {failure.message}", stacklevel=2
            )
            self.pool.restart(index)
            slot.life_lost = False
            command = self._reset_command(index)
            result = self.pool.reset(index, command.seed)
            if not isinstance(result, EnvFailure):
                return result
            failure = result

    def _truncate(self, index: int) -> None:
        """Ends the recording at the step that still awaits its outcome."""
        slot = self.slots[index]
        slot.row["is_last"] = np.array(True)
        slot.row["action"] = np.zeros_like(slot.row["action"])
        self._finish(index)

    def _finish(self, index: int) -> None:
        slot = self.slots[index]
        self._write(index)
        slot.over = True
        self.episodes += 1
        self.finished.append(FinishedEpisode(slot.return_, slot.length, self.agent_steps))

    def _write(self, index: int) -> None:
        slot = self.slots[index]
        self.replay.add(index, slot.row, slot.latents)
        slot.waiting = False

    def _act(self, actor: Actor) -> None:
        keys = [f"obs/{key}" for key in self.spec.obs]
        stacked = {key: np.stack([slot.row[key] for slot in self.slots]) for key in keys}
        obs = {k[len("obs/") :]: torch.from_numpy(v).to(self.device) for k, v in stacked.items()}
        first = torch.tensor([bool(slot.row["is_first"]) for slot in self.slots])
        if actor is not self._actor:
            self._actor = actor
            if self.state is not None and self.state.keys() != actor.initial_state(1).keys():
                self.state = None  # it was another actor's
        self.state = restart_rows(self.state, actor, first)
        rewarded = getattr(actor, "rewarded", None)
        if rewarded is not None:
            earned = np.array([slot.row["reward"] for slot in self.slots], np.float32)
            self.state = rewarded(self.state, torch.from_numpy(earned).to(self.device))
        action, self.state = actor.act(obs, self.state, explore=True)
        actions = action.cpu().numpy()
        latents = getattr(actor, "latents", None)
        kept = {k: v.cpu().numpy() for k, v in latents(self.state).items()} if latents else {}
        for i, slot in enumerate(self.slots):
            slot.latents = {key: value[i] for key, value in kept.items()}
            if slot.over:
                self._finish(i)
            else:
                slot.row["action"] = actions[i]
                slot.actions.append(actions[i])

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors from which `load_state_dict` goes on exactly."""
        slots = []
        for slot in self.slots:
            values = {key: copy.copy(getattr(slot, key)) for key in _PLAIN}
            actions = np.stack(slot.actions) if slot.actions else np.zeros(0)
            arrays = {"row": _tensors(slot.row), "latents": _tensors(slot.latents)}
            slots.append({**values, **arrays, "actions": torch.from_numpy(actions)})
        state = {k: v.cpu().clone() for k, v in self.state.items()} if self.state else {}
        counters = {key: getattr(self, key) for key in _COUNTERS}
        finished = [list(episode) for episode in self.finished]
        return {**counters, "slots": slots, "state": state, "finished": finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the counters and brings every environment back to where it was.

        An environment is re-seeded and its episode's actions replayed. Where that gives other
        observations than recorded, the episode is closed as truncated, with a warning.
        """
        if len(state["slots"]) != len(self.slots):
            raise UserError(
                f"the checkpoint has {len(state['slots'])} environments, this run "
                f"{len(self.slots)}: resume with num_envs={len(state['slots'])}"
            )
        for key in _COUNTERS:
            setattr(self, key, state[key])
        self.finished = deque((FinishedEpisode(*e) for e in state["finished"]), maxlen=100)
        self.state = {k: v.to(self.device) for k, v in state["state"].items()} or None
        for index, saved in enumerate(state["slots"]):
            slot = self.slots[index]
            for key in _PLAIN:
                setattr(slot, key, copy.copy(saved[key]))
            slot.row, slot.latents = _arrays(saved["row"]), _arrays(saved["latents"])
            slot.actions = list(saved["actions"].numpy())
            running = slot.life_lost or not slot.over
            if running and slot.episode >= 0 and not self._replay_episode(index):
                warnings.warn(
                    f"environment {index} does not repeat its recorded episode: the episode is "
                    "closed as truncated and a new one begins",
                    stacklevel=2,
                )
                slot.life_lost = False
                if slot.waiting:
                    self._truncate(index)

    def _replay_episode(self, index: int) -> bool:
        """Whether a fresh environment, given the episode's seed and actions, behaves the same."""
        slot = self.slots[index]
        executed = slot.actions if slot.over else slot.actions[:-1]
        commands: list[Reset | Action] = [Action(action) for action in executed]
        for position in reversed(slot.soft_resets):
            commands.insert(position, Reset(None))
        commands.insert(0, Reset(self._episode_seed(index, slot.episode)))
        checksum = 0
        for command in commands:
            result = self.pool.step_one(index, command)
            if isinstance(result, EnvFailure):
                self.pool.restart(index)
                return False
            checksum = _checksum(self._row(result, isinstance(command, Reset)), checksum)
        return checksum == slot.checksum


_PLAIN = (
    "episode",
    "over",
    "life_lost",
    "waiting",
    "soft_resets",
    "checksum",
    "return_",
    "length",
    "failures",
)
_COUNTERS = ("agent_steps", "episodes", "failures")


def restart_rows(state: dict[str, Tensor] | None, actor: Actor, first: Tensor) -> dict[str, Tensor]:
    """Replaces the rows of a policy's state (B, ...) where `first` (B,) is set."""
    if state is None:
        return actor.initial_state(len(first))
    if not first.any():
        return state
    return choose_rows(first, actor.initial_state(len(first)), state)


def choose_rows(
    mask: Tensor, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rows of states a (B, ...) where mask (B,) is set, else those of b."""
    return {
        key: torch.where(mask.to(value.device).view(-1, *[1] * (value.dim() - 1)), a[key], value)
        for key, value in b.items()
    }


def _checksum(row: Mapping[str, np.ndarray], start: int) -> int:
    for key in sorted(row):
        if key.startswith("obs/") or key == "reward":
            start = zlib.crc32(row[key].tobytes(), start)
    return start


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in tensors.items()}
