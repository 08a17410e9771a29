"""`EnvDataModule`: environments, collector and replay behind one LightningDataModule.

`Trainer.fit(model, EnvDataModule("CartPole-v1"))` is all a user writes: before each batch it lets
the trainer's module act until the replay ratio allows another update, then samples sequences.

A time step t holds what the environment returned on arriving there, and the action chosen there:
`reward[t]` was earned by `action[t - 1]` (0 where `is_first[t]`), `is_terminal[t]` says that the
task ended at t, `is_last[t]` that the recording did (terminal or truncated); `action` is zeros
there. An episode of n actions has n + 1 steps.

A batch is a nested dict of tensors, batch first, on T = context + sequence_length steps:
`obs` {key: (B, T, ...)} (images uint8, everything else float32), `action` (B, T) int64, or
(B, T, A) float32 (box) or int64 (multi-discrete), `reward` (B, T) float32, `is_first`, `is_last`,
`is_terminal` (B, T) bool, `step_id` (B, T) int64, and `latents` {key: (B, T, ...)} where the model
keeps some. Sequences may cross the borders of episodes; put together of pieces of episodes
(`sampling="pieces"`), `is_first` is also set where a piece begins, and `step_id` jumps there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch

from datamodules.batches import ReplayLoader, nest, rng_state, set_rng_state
from datamodules.collector import Collector, Played, Player, RandomPolicy, play
from datamodules.envs.factory import make_env
from datamodules.envs.wrappers import frames_per_step
from datamodules.errors import UserError
from datamodules.replay import Portion, ReplayBuffer
from datamodules.samplers import PieceSampler, RecentSampler, Sampler, WindowSampler
from datamodules.sources.source import step_fields
from datamodules.spec import Spec
from datamodules.store import EpisodeStore, Field
from datamodules.workers import EnvPool
from datamodules.write_back import WriteBack


class EnvDataModule(WriteBack, pl.LightningDataModule):
    """Replayed sequences of an agent that keeps on acting.

    Each rank has its own environments and its own replay shard; batch size, environments and
    prefill count per rank.

    Args:
        env: a gymnasium id, `dm_control/<domain>-<task>-v0`, `ale/<Game>`, or a callable.
        num_envs: environments stepped together.
        workers: "sync" steps them in this process, "async" each in a process of its own.
        batch_size: sequences per batch.
        sequence_length: steps per sequence, without the model's context steps.
        replay_ratio: replayed steps per step of the agent; one update replays
            batch_size * sequence_length steps. It and `pretrain` do not count where the model has
            epochs of its own and says how many updates are due (`updates_due(blocks)`, the blocks
            of `collect_steps` since the prefill).
        prefill: steps of the agent before the first update.
        pretrain: updates at the first opportunity.
        capacity: steps kept in the replay.
        fresh_first: serve each newly collected sequence once before the uniform draws; of windows.
        sampling: "windows" draws sequences of consecutive steps (`WindowSampler`), "pieces" goes on
            along pieces of episodes from batch to batch (`PieceSampler`), "recent" draws windows
            from episodes of which the newest are the likeliest (`RecentSampler`); by default
            whatever the model names as its `replay_sampling`, else windows.
        piece_length: longest piece in steps; by default `sequence_length`.
        prioritize_ends: make the ends of episodes as likely as their middles; of pieces.
        action_repeat: frames per action.
        size: side in pixels to which images are resized.
        time_limit: steps of the agent after which episodes are truncated.
        env_kwargs: further arguments of the environment.
        directory: where the replay lives; default is `replay` in the logger's directory, or a
            temporary one if the trainer has no logger.
        seed: all environments, samplers and noise derive from it.
        policy: "model" lets the trainer's module act; "random" collects `episodes` random episodes
            first; afterwards only a model that works in rounds acts (`replay_round`), for as many
            episodes again in each.
        episodes: least number of random episodes; those that end in the same round all count.
        random_hold: longest time in steps for which a random policy repeats an action.
        updates_per_epoch: length of a Lightning epoch, which means nothing else here.
        collect_steps: after the prefill the agent acts for so many steps at a time, and then come
            all the updates that they allow; a multiple of `num_envs`.
        collect_kwargs: arguments of the environment that differ where the agent collects, such as
            Atari's `life_loss`; evaluations do without.
        collect_limit: steps after which the agent acts no more, and updates go on without end.
    """

    def __init__(
        self,
        env: str | Callable[..., gym.Env],
        num_envs: int = 4,
        workers: Literal["sync", "async"] = "sync",
        batch_size: int = 16,
        sequence_length: int = 64,
        replay_ratio: float = 32.0,
        prefill: int = 1024,
        pretrain: int = 1,
        capacity: int = 1_000_000,
        fresh_first: bool = True,
        sampling: Literal["windows", "pieces", "recent"] | None = None,
        piece_length: int | None = None,
        prioritize_ends: bool = True,
        action_repeat: int = 1,
        size: int | None = None,
        time_limit: int | None = None,
        env_kwargs: dict[str, Any] | None = None,
        directory: str | Path | None = None,
        seed: int = 0,
        policy: str = "model",
        episodes: int = 0,
        random_hold: int = 1,
        updates_per_epoch: int = 1000,
        collect_steps: int = 1,
        collect_limit: int | None = None,
        collect_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        positive: dict[str, float] = {
            "num_envs": num_envs,
            "batch_size": batch_size,
            "capacity": capacity,
        }
        positive |= {"sequence_length": sequence_length, "replay_ratio": replay_ratio}
        positive |= {"action_repeat": action_repeat, "updates_per_epoch": updates_per_epoch}
        positive |= {"random_hold": random_hold, "collect_steps": collect_steps}
        if prefill < 0 or pretrain < 0:
            raise UserError(
                f"EnvDataModule: prefill {prefill} and pretrain {pretrain} must be >= 0"
            )
        for name, value in positive.items():
            if not value > 0:
                raise UserError(f"EnvDataModule needs {name} > 0, got {value}")
        if sequence_length < 2:
            raise UserError(f"EnvDataModule needs sequence_length >= 2, got {sequence_length}")
        if sampling not in (None, "windows", "pieces", "recent"):
            raise UserError(
                f"EnvDataModule has no sampling '{sampling}': choose 'windows', 'pieces' or "
                "'recent'"
            )
        if collect_limit is not None and collect_limit < prefill:
            raise UserError(
                f"EnvDataModule: collect_limit {collect_limit} must be at least prefill {prefill}"
            )
        if piece_length is not None and piece_length < 1:
            raise UserError(f"EnvDataModule needs piece_length >= 1, got {piece_length}")
        if policy not in ("model", "random"):
            raise UserError(f"EnvDataModule has no policy '{policy}': choose 'model' or 'random'")
        if policy == "random" and episodes <= 0:
            raise UserError("EnvDataModule(policy='random') needs episodes > 0")
        self.num_envs, self.workers = num_envs, workers
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.replay_ratio, self.prefill, self.pretrain = replay_ratio, prefill, pretrain
        self.capacity, self.fresh_first = capacity, fresh_first
        self.sampling = sampling
        self.piece_length, self.prioritize_ends = piece_length, prioritize_ends
        self.directory, self.seed = directory, seed
        self.policy, self.random_episodes = policy, episodes
        self.random_hold = random_hold
        self.updates_per_epoch = updates_per_epoch
        self.collect_steps, self.collect_limit = collect_steps, collect_limit
        self._env = env if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self.make_env: Callable[[], gym.Env] = partial(
            make_env,
            env,
            action_repeat=action_repeat,
            size=size,
            time_limit=time_limit,
            **(env_kwargs or {}),
        )
        self._make_collected: Callable[[], gym.Env] = partial(
            self.make_env, **(collect_kwargs or {})
        )
        # Called after each step of the environments: to show it, and to save a long collection.
        self.progress: Callable[[], None] | None = None
        self.collecting: Callable[[], None] | None = None
        self.collector: Collector | None = None
        self.replay: ReplayBuffer | None = None
        self._pool: EnvPool | None = None
        self._stage: EnvPool | None = None  # where episodes are played that are not recorded
        self._played = 0
        self.served = 0
        self._agent_steps = 0
        self._root: Path | None = None
        self._known: tuple[Spec, int] | None = None
        self._restored: list[dict[str, Any]] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def spec(self) -> Spec:
        """Observations and actions of the environment."""
        return self._facts()[0]

    @property
    def env_steps(self) -> int:
        """Frames caused so far by the agents of all ranks."""
        if self._restored:
            steps = sum(_steps(rank) for rank in self._restored)
        else:
            steps = self._agent_steps
        return steps * self._facts()[1]

    # Lightning's hooks

    def train_dataloader(self) -> ReplayLoader:
        """Endless replay, cut into epochs of `updates_per_epoch` batches."""
        return ReplayLoader(self.updates_per_epoch, self.next_batch)

    def teardown(self, stage: str) -> None:
        """Closes environments and replay; what they were stays, to be saved or to go on from."""
        if self.collector is not None:
            self._restored = self.state_dict()["ranks"]
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        """Closes environments and replay."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on exactly, of every rank.

        Environments, counters, replay position, stored latents, samplers and random generators.
        Called on all ranks by `Trainer.save_checkpoint`.
        """
        if self.collector is None or self.replay is None:
            return {"ranks": self._restored} if self._restored else {}
        self.take_over(self.replay)
        mine = {
            "served": self.served,
            "played": self._played,
            "directory": str(self._root),
            "collector": self.collector.state_dict(),
            "replay": self.replay.state_dict(),
            "random": json.dumps(self._random.rng.bit_generator.state),
            "rng": rng_state(),
        }
        return {"ranks": self._of_all_ranks(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps this rank's part until the first batch is asked for."""
        ranks = state.get("ranks", [])
        if len(ranks) != self._world_size:
            raise UserError(
                f"the checkpoint is of {len(ranks)} processes, this run has {self._world_size}: "
                f"resume with devices={len(ranks)}"
            )
        self._restored = ranks

    # Batches

    def next_batch(self) -> dict[str, Any]:
        """Lets the agent act as long as the replay ratio asks, then samples a batch (B, T, ...)."""
        if self.collector is None:
            self._start()
        assert self.collector is not None and self.replay is not None
        self.take_over(self.replay)
        while self.served >= self._updates_due():
            self.collector.advance(self._actor())
            if self._world_size == 1:
                self._agent_steps = self.collector.agent_steps + self._played
            for hook in (self.progress, self.collecting):
                if hook is not None:
                    hook()
        self.served += 1
        self._agent_steps = self._sum_over_ranks(self.collector.agent_steps + self._played)
        prepare = getattr(self._module, "prepare_batch", None)
        portion: Portion = prepare(self) if prepare else Portion()
        self.take_over(self.replay)
        rows = portion.rows or self.batch_size
        return nest(self.replay.sample(rows, portion.steps, portion.observations))

    @property
    def steps_seen(self) -> int:
        """Steps that this rank has collected so far."""
        assert self.replay is not None
        return self.replay.num_appended

    def sweep(
        self, steps: int, observations: tuple[str, ...] | None = None
    ) -> Iterator[dict[str, Any]]:
        """All replayed steps of this rank, once, as batches (1, T, ...) with T up to `steps`.

        Args:
            steps: longest sequence.
            observations: keys of the observations to read; by default all.
        """
        assert self.replay is not None
        for batch in self.replay.sweep(steps, observations):
            yield nest(batch)
            self.take_over(self.replay)

    def first_steps(self, limit: int) -> dict[str, Any]:
        """First steps of at most `limit` replayed episodes of this rank, a batch (N, 1, ...)."""
        assert self.replay is not None
        return nest(self.replay.first_steps(limit))

    def play(self, player: Player, seeds: Sequence[int], horizon: int | None = None) -> Played:
        """Plays episodes on this rank that are not recorded; their steps count as `env_steps`."""
        if self._stage is None:
            self._stage = EnvPool([self.make_env] * self.num_envs, workers=self.workers)
        played = play(self._stage, player, seeds, self._module.device, horizon)
        self._played += int(played.length.sum())
        if self._world_size == 1:
            self._agent_steps += int(played.length.sum())
        return played

    def metrics(self) -> dict[str, float]:
        """How the agents of all ranks fare in training; every rank calls it.

        Returns:
            `env/episodes` and `env/failures` counted so far, `env/return` and `env/length` as means
            of the last ten episodes of each rank.
        """
        if self.collector is None:
            return {}
        counts = [self.collector.episodes, self.collector.failures]
        last = [[e.return_, e.length] for e in self.collector.finished][-10:]
        ranks = self._of_all_ranks((counts, last))
        totals = np.sum([counts for counts, _ in ranks], 0)
        values = {"env/episodes": float(totals[0]), "env/failures": float(totals[1])}
        episodes = [episode for _, last in ranks for episode in last]
        if episodes:
            means = np.mean(episodes, 0)
            values |= {"env/return": float(means[0]), "env/length": float(means[1])}
        return values

    def _updates_due(self) -> int:
        """Updates that the steps so far allow."""
        assert self.collector is not None and self.replay is not None
        steps = self.collector.agent_steps
        if not self.replay.can_sample:
            return 0
        if self.policy == "random":
            wanted = self.random_episodes * (1 + getattr(self._module, "replay_round", 0))
            return self.served + 1 if self.collector.episodes >= wanted else 0
        if steps < self.prefill:
            return 0
        if self.collect_limit is not None and steps >= self.collect_limit:
            return self.served + 1
        replayed = self.batch_size * self.sequence_length
        blocks = (steps - self.prefill) // self.collect_steps
        model: Any = self._module
        if hasattr(model, "updates_due"):
            return self.served + int(model.updates < model.updates_due(blocks))
        return self.pretrain + int(blocks * self.collect_steps * self.replay_ratio / replayed)

    def _of_all_ranks(self, mine: Any) -> list[Any]:
        """The same thing of every rank, in order; every rank calls it."""
        if self._world_size == 1:
            return [mine]
        ranks: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(ranks, mine)
        return ranks

    def _sum_over_ranks(self, count: int) -> int:
        """Ranks whose episodes end at different times take different numbers of steps."""
        assert self.trainer is not None
        if self._world_size == 1:
            return count
        strategy = self.trainer.strategy
        total = strategy.reduce(torch.tensor(count, device=strategy.root_device), reduce_op="sum")
        return int(total)

    def _actor(self) -> Any:
        assert self.collector is not None
        random = self.policy == "random" and self.collector.episodes < self.random_episodes
        return self._random if random else self._module

    def _start(self) -> None:
        """Builds environments and replay, or restores them from a checkpoint."""
        assert self.trainer is not None
        self._module = self.trainer.lightning_module
        seeds = np.random.SeedSequence(self.seed, spawn_key=(self._rank,)).spawn(2)
        rng = np.random.default_rng(seeds[0])
        self._random = RandomPolicy(self.spec, rng, self.random_hold)
        path = self._replay_path()
        if self._restored is None and path.exists() and any(path.iterdir()):
            raise UserError(
                f"{path} holds the replay of an earlier run: resume that run, or give another "
                "directory"
            )
        pool = EnvPool([self._make_collected] * self.num_envs, workers=self.workers)
        self._pool = pool
        context = getattr(self._module, "replay_context", 0)
        latents: dict[str, Any] = getattr(self._module, "latent_fields", dict)()
        self.replay = ReplayBuffer(
            path,
            step_fields(self.spec),
            latent_fields={key: Field(*field) for key, field in latents.items()},
            capacity=self.capacity,
            sequence_length=self.sequence_length + context,
            seed=seeds[1],
            sampler=self._sampler(context),
            attributes={"spec": self.spec.to_dict(), "env": self._env, "policy": self.policy},
        )
        device = self._module.device
        self.collector = Collector(pool, self.spec, self.replay, self.seed, self._rank, device)
        if self._restored is None:
            noise = np.random.SeedSequence(self.seed, spawn_key=(self._rank, self.num_envs))
            torch.manual_seed(int(noise.generate_state(1)[0]))
            return
        mine = self._restored[self._rank]
        self.served, self._played = mine["served"], mine.get("played", 0)
        self.replay.load_state_dict(mine["replay"])
        self.collector.load_state_dict(mine["collector"])
        if "random" in mine:
            rng.bit_generator.state = json.loads(mine["random"])
        set_rng_state(mine["rng"])
        self._agent_steps = sum(_steps(rank) for rank in self._restored)
        self._restored = None

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._stage is not None:
            self._stage.close()
        if self.replay is not None:
            self.replay.close()
        self.collector = self.replay = self._pool = self._stage = None

    def _sampler(self, context: int) -> Callable[..., Sampler]:
        """What makes the sampler that is asked for, or that the model asks for."""
        sampling = self.sampling or getattr(self._module, "replay_sampling", "windows")
        if sampling not in ("windows", "pieces", "recent"):
            raise UserError(
                f"{type(self._module).__name__} learns from {sampling} of whole episodes, which an "
                "agent that keeps on acting has not: record some (`zoo data collect`) and use an "
                "OfflineDataModule"
            )
        if sampling == "windows":
            return partial(WindowSampler, fresh_first=self.fresh_first)
        if sampling == "recent":
            return RecentSampler
        return partial(
            PieceSampler,
            context=context,
            piece_length=self.piece_length,
            prioritize_ends=self.prioritize_ends,
        )

    def _replay_path(self) -> Path:
        """This rank's folder: chosen once, and found again by a checkpoint that moved runs."""
        assert self.trainer is not None
        if self._root is not None:
            root = self._root
        elif self.directory is not None:
            root = Path(self.directory)
        elif self.trainer.logger is not None and self.trainer.log_dir is not None:
            root = Path(self.trainer.log_dir) / "replay"
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="replay-")
            root = Path(self._scratch.name)
        if self._restored is not None and not EpisodeStore.exists(root / f"rank{self._rank}"):
            root = Path(self._restored[self._rank]["directory"])
            self._must_not_rewind(root / f"rank{self._rank}")
        self._root = root
        return root / f"rank{self._rank}"

    def _facts(self) -> tuple[Spec, int]:
        """Spec, and frames per step of the agent; an environment is built once to find out."""
        if self._known is None:
            env = self.make_env()
            spec = Spec.from_spaces(env.observation_space, env.action_space)
            self._known = spec, frames_per_step(env)
            env.close()
        return self._known

    def _must_not_rewind(self, path: Path) -> None:
        """Another run's replay may be continued, but not cut back."""
        assert self._restored is not None
        with EpisodeStore.open(path) as store:
            there = store.position()
        if there != self._restored[self._rank]["replay"]["store"]:
            raise UserError(
                f"the replay in {path} has gone on since the checkpoint: resume with "
                f"directory='{path.parent}' to go back there and lose what came later, or copy "
                "that folder and name the copy"
            )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


def _steps(rank: dict[str, Any]) -> int:
    """Agent steps in a rank's part of a state."""
    return rank["collector"]["agent_steps"] + rank.get("played", 0)
