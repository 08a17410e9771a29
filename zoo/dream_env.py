"""Dreams as Gymnasium environments, so that any RL library can train inside a world model.

`DreamVectorEnv` advances all its environments with one batched call of `Imaginer.imagine` per step,
`DreamEnv` is one environment, `as_sb3` shows the former to stable-baselines3, `from_run` builds
either from a run directory. Importing this module registers `zoo/Dream-v0`:

```python
import gymnasium as gym
import zoo.dream_env

env = gym.make("zoo/Dream-v0", run="runs/dreamer-v3/cartpole/seed=0", horizon=200)
```
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from datamodules.errors import MissingExtra, UserError
from datamodules.samplers import WindowSampler
from datamodules.spec import IMAGE_KEY, VECTOR_KEY, ActionSpec, ArraySpec
from datamodules.store import EpisodeStore
from zoo.base import Batch, Imaginer, LatentActions, State
from zoo.runs import Which, load

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

Observations = Literal["latent", "decoded"]
Starts = Batch | Iterable[Batch] | Callable[[], Batch | Iterable[Batch]]
Arrays = dict[str, np.ndarray]

LATENT_KEY = "latent"


class DreamVectorEnv(VectorEnv):
    """Dreams of a world model, side by side, as a `gymnasium.vector.VectorEnv`.

    An episode begins in the state of a real step, drawn uniformly, and goes on in imagination:
    - observation: with "latent" the parts of the state, flattened and joined in the order of their
      names, as Box (S,) float32; with "decoded" what the model decodes, in the spaces of the real
      environment (a lone `vector` or `image` as Box, else a Dict; images uint8 (H, W, C));
    - action: in the space of the real environment; Box actions are clipped to their bounds; of
      models that find actions in video, `Discrete(num_latent_actions)`;
    - reward: the predicted one;
    - terminated: drawn with one minus the predicted probability that the task goes on;
    - truncated: `horizon` actions were taken.

    After `reset(seed=s)` the same actions give the same steps, bit for bit. All randomness, the
    model's noise included, comes from `np_random`; the global generators are left as they were.

    Args:
        model: an `Imaginer` with the attributes `spec` and `device`, as every `ZooModel` has; it
            dreams in evaluation mode, on its own device.
        starts: real sequences by the batch contract, as one batch, finitely many, or a function
            that returns either. They are filtered once, now, always with the same noise.
        num_envs: number of environments N.
        observations: "latent" or "decoded".
        horizon: actions after which an episode is truncated.
        context: fewest steps that were filtered up to a start, where the beginning of its episode
            is not part of the sequence.
        first_only: start only from the first steps of real episodes, as the real environment does.
        continue_threshold: if given, nothing is drawn: an episode is terminated where its
            probability of going on is at most this.
        temperature: of the dream, above 0, for models whose `imagine` takes one; by default the
            model's own.
        autoreset_mode: `NEXT_STEP` or `SAME_STEP`, as of Gymnasium's own vector environments.

    Raises:
        UserError: a bad argument, sequences in which no dream can start, or a model that does not
            dream or knows no temperature.
    """

    def __init__(
        self,
        model: Any,
        starts: Starts,
        num_envs: int = 1,
        *,
        observations: Observations = "latent",
        horizon: int = 100,
        context: int = 5,
        first_only: bool = False,
        continue_threshold: float | None = None,
        temperature: float | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"a dream needs num_envs >= 1, got {num_envs}")
        self._dream = _Dream(
            model,
            starts,
            observations,
            horizon,
            context,
            first_only,
            continue_threshold,
            temperature,
        )
        self.metadata = {"render_modes": [], "autoreset_mode": _mode(autoreset_mode)}
        self.num_envs, self.horizon = num_envs, horizon
        self.single_observation_space = self._dream.observation_space
        self.single_action_space = self._dream.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: State | None = None
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draws N start states; there are no options."""
        super().reset(seed=seed)
        self._state = self._dream.start(self.num_envs, self.np_random)
        self._steps = np.zeros(self.num_envs, np.int64)
        self._ended = np.zeros(self.num_envs, bool)
        return self._dream.pack(self._dream.observe(self._state, self.np_random)), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Dreams one step of every environment.

        Args:
            actions: (N,) or (N, A), see `action_space`.

        Returns:
            Observations, rewards (N,) float64, terminations and truncations (N,) bool, and infos:
            with `SAME_STEP` `final_obs`, an object array (N,) with the last observations of the
            episodes that ended, and `_final_obs` (N,) which those are.
        """
        if self._state is None:
            raise gym.error.ResetNeeded("call reset before the first step")
        dream, rng = self._dream, self.np_random
        actions = _checked(actions, self.action_space)
        state, reward, terminated = dream.step(self._state, actions, rng)
        self._steps += 1
        truncated = self._steps >= self.horizon
        infos: dict[str, Any] = {}
        if self.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP:
            begins = self._ended
            reward[begins] = 0.0
            terminated &= ~begins
            truncated &= ~begins
            self._begin(state, begins)
            obs = dream.observe(state, rng)
        else:
            begins = terminated | truncated
            obs = dream.observe(state, rng)
            if begins.any():
                infos = self._final(obs, begins)
                fresh = dream.observe(self._begin(state, begins), rng)
                for key, value in fresh.items():
                    obs[key][begins] = value
        self._state, self._ended = state, terminated | truncated
        return dream.pack(obs), reward, terminated, truncated, infos

    def in_mode(self, autoreset_mode: AutoresetMode | str) -> DreamVectorEnv:
        """The same dreams in another autoreset mode, to be reset and seeded by themselves."""
        other = copy.copy(self)
        other.metadata = {**self.metadata, "autoreset_mode": _mode(autoreset_mode)}
        other._state = other._np_random = None
        return other

    def _begin(self, state: State, begins: np.ndarray) -> State:
        """Puts fresh start states into rows of the state, and returns them alone."""
        fresh = self._dream.start(int(begins.sum()), self.np_random)
        rows = torch.from_numpy(begins).to(self._dream.device)
        for key, value in fresh.items():
            state[key][rows] = value
        self._steps[begins] = 0
        return fresh

    def _final(self, obs: Arrays, ended: np.ndarray) -> dict[str, Any]:
        """Infos about ended episodes, in the layout of Gymnasium's vector environments."""
        final = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final[row] = self._dream.pack({key: value[row].copy() for key, value in obs.items()})
        return {
            "final_obs": final,
            "_final_obs": ended.copy(),
            "final_info": {},
            "_final_info": ended.copy(),
        }


class DreamEnv(gym.Env):
    """One dream of a world model as a `gymnasium.Env`.

    Observations, actions, rewards, ends, randomness and arguments are those of `DreamVectorEnv`.

    Args:
        model: an `Imaginer`.
        starts: real sequences in whose states episodes begin.
        observations: "latent" or "decoded".
        horizon: actions after which an episode is truncated.
        context: fewest steps filtered up to a start in the middle of an episode.
        first_only: start only from the first steps of real episodes.
        continue_threshold: probability of going on up to which episodes end; drawn by default.
        temperature: of the dream, for models that know one.

    Raises:
        UserError: as `DreamVectorEnv`.
    """

    def __init__(
        self,
        model: Any,
        starts: Starts,
        *,
        observations: Observations = "latent",
        horizon: int = 100,
        context: int = 5,
        first_only: bool = False,
        continue_threshold: float | None = None,
        temperature: float | None = None,
    ) -> None:
        self._dream = _Dream(
            model,
            starts,
            observations,
            horizon,
            context,
            first_only,
            continue_threshold,
            temperature,
        )
        self.metadata = {"render_modes": []}
        self.horizon = horizon
        self.observation_space = self._dream.observation_space
        self.action_space = self._dream.action_space
        self._batched_action_space = batch_space(self.action_space, 1)
        self._state: State | None = None
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draws a start state; there are no options."""
        super().reset(seed=seed)
        self._state, self._steps = self._dream.start(1, self.np_random), 0
        return self._observation(self._state), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Dreams one step."""
        if self._state is None:
            raise gym.error.ResetNeeded("call reset before the first step of an episode")
        actions = _checked(np.asarray(action)[None], self._batched_action_space)
        state, reward, terminated = self._dream.step(self._state, actions, self.np_random)
        self._steps += 1
        over, cut = bool(terminated[0]), self._steps >= self.horizon
        self._state = None if over or cut else state
        return self._observation(state), float(reward[0]), over, cut, {}

    def _observation(self, state: State) -> Any:
        arrays = self._dream.observe(state, self.np_random)
        return self._dream.pack({key: value[0, ...] for key, value in arrays.items()})


@overload
def from_run(run: str | Path, num_envs: None = None, **options: Any) -> DreamEnv: ...


@overload
def from_run(run: str | Path, num_envs: int, **options: Any) -> DreamVectorEnv: ...


def from_run(
    run: str | Path,
    num_envs: int | None = None,
    *,
    sequences: int = 64,
    length: int = 32,
    seed: int = 0,
    checkpoint: Which | None = None,
    device: str = "cpu",
    **options: Any,
) -> DreamEnv | DreamVectorEnv:
    """The dreams of a trained model, started from the replay of its run.

    This is also `gymnasium.make("zoo/Dream-v0", run=...)`, and `gymnasium.make_vec` with all
    environments in one batch.

    Args:
        run: a run directory with a replay.
        num_envs: makes a `DreamVectorEnv` of so many environments; by default a `DreamEnv`.
        sequences, length, seed: of the sequences drawn from the replay, see `replayed`.
        checkpoint: "best" or "last"; the best one if there is one.
        device: where the model dreams.
        options: arguments of `DreamEnv` or `DreamVectorEnv`.

    Raises:
        UserError: no run, no replay, or what the environments refuse.
    """
    model = load(run, checkpoint=checkpoint, map_location=device)
    starts = replayed(run, sequences, length, seed)
    if num_envs is None:
        return DreamEnv(model, starts, **options)
    return DreamVectorEnv(model, starts, num_envs, **options)


def replayed(run: str | Path, sequences: int = 64, length: int = 32, seed: int = 0) -> Batch:
    """Sequences (B, T) drawn uniformly from the replay of a run, which may still be training.

    Args:
        run: a run directory.
        sequences: number of sequences B, shared out evenly over the ranks that trained.
        length: steps T of each; they may cross the borders of episodes.
        seed: of the draws.

    Raises:
        UserError: the run has no replay, or no stretch of so many steps in it.
    """
    folders = sorted((Path(run) / "replay").glob("rank*"))
    if not folders:
        raise UserError(
            f"the run '{run}' has no replay to start dreams from: pass sequences of the task as "
            "`starts` to DreamEnv or DreamVectorEnv"
        )
    rng = np.random.default_rng(seed)
    drawn = []
    for folder in folders:
        with EpisodeStore.open(folder) as store:
            sampler = WindowSampler(store, length, rng, fresh_first=False)
            if not sampler.can_sample:
                raise UserError(f"the replay {folder} has no {length} steps in a row: shorten them")
            share = math.ceil(sequences / len(folders))
            drawn += [
                store.read(segment.stream, segment.start, segment.length)
                for row in sampler.draw(share)
                for segment in row
            ]
    flat = {key: torch.from_numpy(np.stack([d[key] for d in drawn])) for key in drawn[0]}
    batch: dict[str, Any] = {k: v for k, v in flat.items() if not k.startswith("obs/")}
    return batch | {"obs": {k[4:]: v for k, v in flat.items() if k.startswith("obs/")}}


def as_sb3(envs: DreamVectorEnv) -> VecEnv:
    """A stable-baselines3 `VecEnv` over the same dreams, all environments in one batch per step.

    `DreamEnv` needs no such view: stable-baselines3 takes it as it is, one dream at a time.

    Args:
        envs: with any autoreset mode (stable-baselines3 knows only that of the same step); the view
            has episodes and a random generator of its own.

    Raises:
        MissingExtra: stable-baselines3 is not installed.
    """
    try:
        from zoo.dream_sb3 import DreamVecEnv
    except ImportError as error:
        raise MissingExtra("as_sb3", "baselines") from error
    return DreamVecEnv(envs)


class _Dream:
    """What both environments share: model, start states, spaces, and how N dreams go on."""

    def __init__(
        self,
        model: Any,
        starts: Starts,
        observations: Observations,
        horizon: int,
        context: int,
        first_only: bool,
        continue_threshold: float | None,
        temperature: float | None,
    ) -> None:
        self.options = _dream_options(model, temperature)
        if observations not in ("latent", "decoded"):
            raise UserError(
                f"a dream has no observations '{observations}': choose 'latent' or 'decoded'"
            )
        for name, value in (("horizon", horizon), ("context", context)):
            if value < 1:
                raise UserError(f"a dream needs {name} >= 1, got {value}")
        if continue_threshold is not None and not 0 <= continue_threshold <= 1:
            raise UserError(f"continue_threshold is {continue_threshold}: it must be in [0, 1]")
        self.model: Any = model
        self.spec, self.device = self.model.spec, torch.device(self.model.device)
        self.continue_threshold = continue_threshold
        with dreaming(model, 0):
            self.starts = self._filter(starts, context, first_only)
        self.latent = observations == "latent"
        self.action_space = _action_space(model)
        self.observation_space = self._observation_space()

    def start(self, count: int, rng: np.random.Generator) -> State:
        """Draws start states (count, ...) with replacement."""
        available = len(next(iter(self.starts.values())))
        rows = torch.from_numpy(rng.integers(available, size=count)).to(self.device)
        return {key: value[rows] for key, value in self.starts.items()}

    def step(
        self, state: State, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[State, np.ndarray, np.ndarray]:
        """What actions lead to: states (N, ...), rewards (N,) and whether the task ended (N,)."""
        given = torch.from_numpy(actions).to(self.device).unsqueeze(1)
        with dreaming(self.model, int(rng.integers(2**63))):
            dream = self.model.imagine(state, given, 1, **self.options)
        # A state may be a view of something of the model's, and rows of it are overwritten here.
        state = {key: dream.state[key][:, 0].clone() for key in self.starts}
        reward, cont = (x[:, 0].double().cpu().numpy() for x in (dream.reward, dream.cont))
        limit = self.continue_threshold
        return state, reward, cont <= (rng.random(len(cont)) if limit is None else limit)

    def observe(self, state: State, rng: np.random.Generator) -> Arrays:
        """Observations {key: (N, ...)} of states (N, ...), in memory of their own."""
        if self.latent:
            parts = [state[key].reshape(len(state[key]), -1).float() for key in sorted(state)]
            return {LATENT_KEY: torch.cat(parts, 1).cpu().numpy()}
        with dreaming(self.model, int(rng.integers(2**63))):
            decoded = self.model.decode({key: value.unsqueeze(1) for key, value in state.items()})
        return {k: as_observation(decoded[k][:, 0], spec) for k, spec in self.spec.obs.items()}

    def pack(self, arrays: Arrays) -> Any:
        """The arrays as the observation space wants them."""
        keeps_keys = isinstance(self.observation_space, gym.spaces.Dict)
        return arrays if keeps_keys else next(iter(arrays.values()))

    def _filter(self, starts: Starts, context: int, first_only: bool) -> State:
        """The states (N, ...) of all real steps at which an episode of the dream may begin."""
        given = starts() if callable(starts) else starts
        batches = [given] if isinstance(given, Mapping) else given
        found = []
        seen = 0
        for batch in batches:
            missing = sorted(self.spec.obs.keys() - batch["obs"].keys())
            if missing:
                raise UserError(
                    f"the sequences to start dreams from lack the observations {missing}: take "
                    "them from the task that the model was made for"
                )
            for key, spec in self.spec.obs.items():
                _reject_other(key, batch["obs"][key], spec)
            batch = move_data_to_device(batch, self.device)
            states = self.model.observe(batch)
            may = may_start(batch, context, first_only)
            seen += may.numel()
            found.append({key: value[may] for key, value in states.items()})
        joined = {key: torch.cat([part[key] for part in found]) for key in (found or [{}])[0]}
        if not joined or not len(next(iter(joined.values()))):
            wanted = "begins an episode" if first_only else f"has {context} steps of context"
            raise UserError(
                f"no dream can start from any of the {seen} steps given: none of them {wanted} and "
                "is followed by another; give longer or more sequences"
            )
        return joined

    def _observation_space(self) -> gym.Space:
        if self.latent:
            size = sum(value[0].numel() for value in self.starts.values())
            return Box(-np.inf, np.inf, (size,), np.float32)
        spaces = {key: _space(spec) for key, spec in self.spec.obs.items()}
        if [*spaces] in ([IMAGE_KEY], [VECTOR_KEY]):
            return spaces.popitem()[1]
        return gym.spaces.Dict(spaces)


@contextmanager
def dreaming(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, and random numbers of our own on the model's device."""
    device = torch.device(model.device)
    training, on_gpu = model.training, device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []), torch.no_grad():
        # `torch.manual_seed` takes a tenth of a step, and would seed all GPUs.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if training:
            model.eval()
        try:
            yield
        finally:
            if training:
                model.train()


def _mode(name: AutoresetMode | str) -> AutoresetMode:
    known = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
    for mode in known:
        if name in (mode, mode.value):
            return mode
    raise UserError(f"dreams have no autoreset mode {name}: choose NextStep or SameStep")


def _dream_options(model: object, temperature: float | None) -> dict[str, float]:
    """The further arguments of the model's `imagine`."""
    if not isinstance(model, Imaginer):
        raise UserError(
            f"a dream needs a model that is an Imaginer, which {type(model).__name__} is not"
        )
    if temperature is None:
        return {}
    if "temperature" not in inspect.signature(model.imagine).parameters:
        raise UserError(
            f"temperature is {temperature}, but the dreams of {type(model).__name__} have none: "
            "leave it out"
        )
    if not temperature > 0:
        raise UserError(f"the temperature of a dream must be above 0, got {temperature}")
    return {"temperature": temperature}


def may_start(batch: Batch, context: int, first_only: bool) -> Tensor:
    """(B, T) bool, the steps at which a dream may begin."""
    first, goes_on = batch["is_first"], ~batch["is_last"]
    if "mask" in batch:
        goes_on = goes_on & batch["mask"].bool()
    if first_only:
        return first & goes_on
    filtered = torch.arange(1, first.shape[1] + 1, device=first.device)
    return ((filtered >= context) | (first.cumsum(1) > 0)) & goes_on


def _checked(actions: Any, space: gym.Space) -> np.ndarray:
    """Actions as an array of the batched space, clipped to the bounds if they are continuous.

    Raises:
        UserError: a wrong shape, an action that does not exist, or not a number.
    """
    array = np.asarray(actions)
    whole = np.issubdtype(space.dtype, np.integer)
    if whole and array.dtype.kind == "f" and (array % 1 != 0).any():
        raise UserError(f"the actions {array.tolist()} are no whole numbers, as {space} has")
    array = array.astype(space.dtype, copy=False)
    # The batched space of multi-discrete actions is a Box, too, but of integers.
    if isinstance(space, Box) and array.dtype.kind == "f" and array.shape == space.shape:
        array = np.clip(array, space.low, space.high)
    if not space.contains(array):
        raise UserError(f"the actions {array.tolist()} are not in the action space {space}")
    return array


def _reject_other(key: str, value: Tensor, spec: ArraySpec) -> None:
    """Raises a UserError for an observation (B, T, ...) that the model was not made for."""
    unlike = spec.is_image and value.dtype != torch.uint8
    if unlike or tuple(value.shape[2:]) != tuple(spec.shape):
        raise UserError(
            f"'{key}' of the sequences to start dreams from is {value.dtype} of shape "
            f"{tuple(value.shape)}, but the model was made for (B, T) of {spec.dtype} "
            f"{tuple(spec.shape)}: take sequences of its task"
        )


def _action_space(model: Any) -> gym.Space:
    if isinstance(model, LatentActions):
        return Discrete(model.num_latent_actions)
    spec: ActionSpec = model.spec.action
    if spec.kind == "discrete":
        return Discrete(spec.n)
    if spec.kind == "box":
        return Box(np.array(spec.low, np.float32), np.array(spec.high, np.float32))
    return MultiDiscrete(list(spec.nvec))


def _space(spec: ArraySpec) -> gym.Space:
    if spec.is_image:
        return Box(0, 255, spec.shape, np.uint8)
    return Box(-np.inf, np.inf, spec.shape, np.float32)


def as_observation(decoded: Tensor, spec: ArraySpec) -> np.ndarray:
    """A decoded observation (N, ...) as the real environment would give it."""
    if spec.is_image:
        decoded = (decoded.float() * 255).round().clamp(0, 255)
    return decoded.cpu().numpy().astype(spec.dtype)


gym.register(
    id="zoo/Dream-v0",
    entry_point="zoo.dream_env:from_run",
    vector_entry_point="zoo.dream_env:from_run",
)
