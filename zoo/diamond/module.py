"""DIAMOND (Alonso et al., "Diffusion for World Modeling: Visual Details Matter in Atari", 2024).

A denoiser draws the next frame, a recurrent model says what the step earned and whether it was the
last, and an actor-critic learns in dreams alone. Training goes in epochs, counted in updates
(algorithm 1): the agent collects, then so many updates of the denoiser, of the reward and end
model, and of the actor-critic; in the first epoch many more. The collecting is the datamodule's,
which asks how many updates are due (`updates_due`).

This file is the method from top to bottom; its deviations from the official code are listed in
README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from datamodules.errors import UserError
from datamodules.replay import Portion
from datamodules.spec import Spec
from zoo.arguments import (
    reject_fractions,
    reject_outside,
    reject_plan,
    reject_unknown,
    reject_unless_positive,
)
from zoo.base import Batch, Imagined, Obs, State, ZooModel
from zoo.diamond.actor_critic import ActorCritic, actor_critic_losses
from zoo.diamond.denoiser import Denoiser, to_float
from zoo.diamond.dream import Dream, latest
from zoo.diamond.lstm import Memory
from zoo.diamond.practice import draw, practise, starts_of
from zoo.diamond.reward_end import RewardEndModel
from zoo.diamond.sampler import make_sampler
from zoo.diamond.unet import ActionEmbedding, FrameNetwork
from zoo.nets.actions import ActionCodec, add_noise
from zoo.nets.ranks import zero_of


class Size(NamedTuple):
    """Widths of the three networks; channels and depths are of levels, from the finest.

    The finest level of all of them has patches of `patch` x `patch` pixels as its inputs.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    width: int
    attention: bool
    end_channels: tuple[int, ...]
    end_depths: tuple[int, ...]
    end_width: int
    agent_channels: tuple[int, ...]
    hidden: int
    patch: int = 1
    normalize: bool = False


# `nano` is ours, for CPUs; `atari` is the paper's.
SIZES = {
    "nano": Size(
        channels=(32, 32, 32),
        depths=(1, 1, 1),
        width=64,
        attention=False,
        end_channels=(16, 16, 16),
        end_depths=(1, 1, 1),
        end_width=64,
        agent_channels=(32, 32),
        hidden=128,
        patch=2,
        normalize=True,
    ),
    "atari": Size(
        channels=(64, 64, 64, 64),
        depths=(2, 2, 2, 2),
        width=256,
        attention=True,
        end_channels=(32, 32, 32, 32),
        end_depths=(2, 2, 2, 2),
        end_width=128,
        agent_channels=(32, 32, 64, 64),
        hidden=512,
    ),
}
PARTS = ("denoiser", "reward_end_model", "actor_critic")
MOST_LOG_SIGMA = 20.0  # exp of it is as much noise as float32 can tell from more
CLIPS = {"denoiser": 1.0, "reward_end_model": 100.0, "actor_critic": 100.0}


class Clock(NamedTuple):
    """Where a training is: the epoch, the part that learns, and how often it has learnt before."""

    epoch: int
    part: str
    learnt: int


class Diamond(
    ZooModel,
    repo_url="https://github.com/eloialonso/diamond",
    paper_url="https://arxiv.org/abs/2405.12399",
):
    """DIAMOND.

    Args:
        spec: one image, 16 pixels each way or more ("nano": 8), and actions (any kind).
        size: one of `SIZES`.
        past: frames and actions that the denoiser sees, L.
        sigma_data, sigma_offset: standard deviations of frames and of the noise of whole channels.
        sigma_loc, sigma_scale: of the logarithm of the noise levels in training.
        autoregressive_steps: frames in training that are predicted from predicted ones.
        past_sigma: noise on past frames when sampling, in training of all levels (the variant for
            Counter-Strike has 0.005); 0 is without.
        sampler: one of `SAMPLERS` by name, "published" or "faithful", or arguments of a `Sampler`.
        first_updates: updates of denoiser, reward and end model, and actor-critic in the first
            epoch.
        epoch_updates: the same in every other epoch. Parts with 0 in both never learn: with
            [1, 0, 0] twice this is a world model alone, in whose dreams nothing is earned and
            nothing ends.
        horizon: steps H of a dream, and between two updates of the actor-critic.
        dreams: dreams side by side.
        discount, lam: gamma and lambda of the returns.
        entropy: scale of the policy's entropy bonus.
        exploration: share of random actions when collecting (see `nets.actions.add_noise`).
        lr, agent_lr: learning rates of AdamW, of the world and of the actor-critic.
        weight_decay: of the weights of denoiser and reward and end model; none of the agent.
        warmup: updates of a part over which its learning rate rises linearly.
    """

    name: ClassVar[str] = "diamond"
    replay_sampling: ClassVar[str] = "recent"

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "atari",
        past: int = 4,
        sigma_data: float = 0.5,
        sigma_offset: float = 0.3,
        sigma_loc: float = -0.4,
        sigma_scale: float = 1.2,
        autoregressive_steps: int = 1,
        past_sigma: float = 0.0,
        sampler: str | Mapping[str, Any] = "published",
        first_updates: Sequence[int] = (10_000, 10_000, 5_000),
        epoch_updates: Sequence[int] = (400, 400, 400),
        horizon: int = 15,
        dreams: int = 32,
        discount: float = 0.985,
        lam: float = 0.95,
        entropy: float = 1e-3,
        exploration: float = 0.01,
        lr: float = 1e-4,
        agent_lr: float = 1e-4,
        weight_decay: float = 1e-2,
        warmup: int = 100,
    ) -> None:
        super().__init__(spec)
        first_updates = _counts("first_updates", first_updates)
        epoch_updates = _counts("epoch_updates", epoch_updates)
        sampler = dict(sampler) if isinstance(sampler, Mapping) else sampler
        self.keep_hyperparameters(locals())
        reject_fractions("Diamond", past=past, autoregressive_steps=autoregressive_steps)
        reject_fractions("Diamond", horizon=horizon, dreams=dreams, warmup=warmup)
        reject_unknown("Diamond", SIZES, size=size)
        positive: dict[str, float] = {"past": past, "sigma_data": sigma_data, "horizon": horizon}
        positive |= {"sigma_scale": sigma_scale, "dreams": dreams, "lr": lr, "agent_lr": agent_lr}
        reject_unless_positive("Diamond", **positive)
        at_least_0: dict[str, float] = {"sigma_offset": sigma_offset, "past_sigma": past_sigma}
        at_least_0 |= {"autoregressive_steps": autoregressive_steps, "entropy": entropy}
        reject_outside("Diamond", 0, math.inf, **at_least_0, weight_decay=weight_decay)
        reject_outside("Diamond", 0, math.inf, warmup=warmup)
        reject_outside("Diamond", -MOST_LOG_SIGMA, MOST_LOG_SIGMA, sigma_loc=sigma_loc)
        reject_outside("Diamond", 0, 1, discount=discount, lam=lam, exploration=exploration)
        if not sum(epoch_updates):
            raise UserError(
                f"Diamond needs an update in each epoch, got epoch_updates {epoch_updates}"
            )
        learns = [sum(counts) > 0 for counts in zip(first_updates, epoch_updates, strict=True)]
        if learns[2] and not all(learns):
            raise UserError(
                "Diamond's actor-critic learns from dreams, for which denoiser and reward and end "
                f"model must learn, too: raise their counts in first_updates {first_updates} or "
                f"epoch_updates {epoch_updates}"
            )
        if len(self.spec.obs) != 1 or not next(iter(self.spec.obs.values())).is_image:
            raise UserError(
                f"diamond sees one image and nothing else, but the observations are "
                f"{sorted(self.spec.obs)}: leave out the others (`observations=[...]`)"
            )
        self.past, self.targets = past, 1 + autoregressive_steps
        self.first_updates, self.epoch_updates = first_updates, epoch_updates
        self.horizon, self.num_dreams = horizon, dreams
        self.discount, self.lam, self.entropy = discount, lam, entropy
        self.exploration = exploration
        self.rates = {"world": lr, "agent": agent_lr}
        self.weight_decay, self.warmup = weight_decay, warmup

        s = SIZES[size]
        (self.image_key, array), actions = next(iter(self.spec.obs.items())), self.spec.action
        height, width, colours = array.shape
        image = (height, width, colours)
        if s.width % past:
            raise UserError(f"Diamond needs a past that divides {s.width}, got {past}")
        least = s.patch * 2 ** len(s.agent_channels)
        if min(height, width) < least:
            raise UserError(
                f"images of {height}x{width} are too small for diamond: they need {least} "
                "pixels each way (`size=...` of the datamodule)"
            )
        self.codec = ActionCodec(actions)
        network = FrameNetwork(
            colours,
            past,
            actions.encoded_size,
            s.channels,
            s.depths,
            s.width,
            s.attention,
            past_noise=past_sigma > 0,
            patch=s.patch,
        )
        self.denoiser = Denoiser(
            network,
            past,
            sigma_data,
            sigma_offset,
            sigma_loc,
            sigma_scale,
            past_sigma=past_sigma,
        )
        self.sampler = make_sampler(sampler)
        self.knows_outcomes = learns[1]
        self.reward_end_model = RewardEndModel(
            image,
            actions.encoded_size,
            s.end_channels,
            s.end_depths,
            s.end_width,
            s.hidden,
            s.attention,
            s.patch,
            s.normalize,
        )
        self.actor_critic = ActorCritic(
            image, actions, s.agent_channels, s.hidden, s.patch, s.normalize
        )
        # As the images come: the fastest order for convolutions on most devices.
        self.to(memory_format=torch.channels_last)
        self._dreams: State | None = None  # those that go on from update to update

    # The epochs

    @property
    def clock(self) -> Clock:
        """The epoch, part and count of the next update."""
        first, others = sum(self.first_updates), sum(self.epoch_updates)
        epoch, update = 0, self.updates
        lengths = self.first_updates
        if update >= first:
            epoch, update = divmod(update - first, others)
            epoch, lengths = epoch + 1, self.epoch_updates
        part = 0
        while update >= lengths[part]:
            update -= lengths[part]
            part += 1
        if epoch:
            update += self.first_updates[part] + (epoch - 1) * self.epoch_updates[part]
        return Clock(epoch, PARTS[part], update)

    def updates_due(self, blocks: int) -> int:
        """Updates that come after the prefill and so many blocks of collecting."""
        return sum(self.first_updates) + blocks * sum(self.epoch_updates)

    def on_fit_start(self) -> None:
        """Refuses sequences that are too short before anything is collected."""
        data: Any = getattr(self.trainer, "datamodule", None)
        length, least = getattr(data, "sequence_length", None), self.past + self.targets
        if length is not None and length < least:
            raise UserError(
                f"diamond learns from sequences of {least} steps or more (past, next frame and "
                f"autoregressive_steps), but sequence_length is {length}: raise it to {least}"
            )

    def prepare_batch(self, data: Any) -> Portion:
        """What the next update needs: short sequences, whole ones, or starts of dreams."""
        part = self.clock.part
        if part == "denoiser":
            return Portion(steps=self.past + self.targets)
        return Portion(steps=self.past) if part == "actor_critic" else Portion()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update of the denoiser, of the reward and end model, or of the actor-critic."""
        part = self.clock.part
        if part == "denoiser":
            image, action, first = self._sequence(batch)
            targets = min(self.targets, image.shape[1] - 1)
            losses = {"denoiser": self.denoiser.loss(to_float(image), action, first, targets)}
            weights = {"denoiser": 1.0}
        elif part == "reward_end_model":
            image, action, first = self._sequence(batch)
            losses = self.reward_end_model.losses(
                to_float(image), action, first, batch["reward"], batch["is_terminal"]
            )
            weights = {"reward": 1.0, "end": 1.0}
        else:
            losses = self._practise(batch)
            weights = {"actor": 1.0, "critic": 1.0, "entropy": self.entropy}
        loss = self.total_loss(losses, weights)
        alone = self._trainer is not None and self._trainer.world_size == 1
        idle = [getattr(self, name) for name in PARTS if name != part]
        # `on_before_optimizer_step` drops these gradients
        return loss if alone else loss + zero_of(idle)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves gradients only to the part that learns now, clips them and sets the rate."""
        clock = self.clock
        for part in PARTS:
            if part != clock.part:
                for parameter in getattr(self, part).parameters():
                    parameter.grad = None  # AdamW skips it, momentum, decay and all
        nn.utils.clip_grad_norm_(getattr(self, clock.part).parameters(), CLIPS[clock.part])
        warm = min(1.0, (clock.learnt + 1) / max(1, self.warmup))
        for group in optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * warm

    def configure_optimizers(self) -> Optimizer:
        """One AdamW for the three parts; only weights of linear maps and convolutions decay."""
        world = [*self.denoiser.parameters(), *self.reward_end_model.parameters()]
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, ActionEmbedding)}
        stay = [p for p in world if p.dim() <= 1 or id(p) in embeddings]
        staying = {id(p) for p in stay}
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in world if id(p) not in staying],
                "weight_decay": self.weight_decay,
            },
            {"params": stay},
        ]
        groups = [{"lr": self.rates["world"], "name": "world", **group} for group in groups]
        agent = list(self.actor_critic.parameters())
        groups.append({"lr": self.rates["agent"], "name": "agent", "params": agent})
        return AdamW(groups, eps=1e-8, weight_decay=0.0)

    def _practise(self, batch: Batch) -> dict[str, Tensor]:
        """Goes on with the dreams for `horizon` steps, and learns from them."""
        starts = starts_of(self.observe(batch), batch["is_last"])
        now = draw(starts, self.num_dreams) if self._dreams is None else self._dreams
        now = {key: value.to(self.device) for key, value in now.items()}
        rollout, self._dreams = practise(self.actor_critic, self.dream, now, starts, self.horizon)
        returns = rollout.returns(self.discount, self.lam)
        entropy = rollout.policy.entropy()
        if self.logs_now:
            self.log_metrics(
                {
                    "dream_reward": rollout.reward.mean(),
                    "dream_end": rollout.end.float().mean(),
                    "dream_return": returns.mean(),
                    "policy_entropy": entropy.mean(),
                }
            )
        log_prob = rollout.policy.log_prob(rollout.action)
        return actor_critic_losses(log_prob, entropy, rollout.value, returns)

    @property
    def dream(self) -> Dream:
        """The world that the parts make up; without rewards and ends if these never learn."""
        outcomes = self.reward_end_model if self.knows_outcomes else None
        return Dream(self.denoiser, self.sampler, outcomes)

    def _sequence(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, T, H, W, C), encoded actions (B, T, A) and where episodes begin (B, T)."""
        image = batch["obs"][self.image_key]
        if image.shape[1] < 2:
            raise UserError(
                f"diamond learns from sequences, but the batch has {image.shape[1]} step: "
                f"set sequence_length to {self.past + self.targets} or more"
            )
        return image, self.codec.encode(batch["action"]), batch["is_first"]

    # Policy

    def initial_state(self, batch_size: int) -> State:
        """The agent's empty memory before an episode."""
        memory = self.actor_critic.lstm.empty(batch_size)
        return {"agent_h": memory.h, "agent_c": memory.c}

    @torch.no_grad()
    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Draws actions from the policy, as in the paper's evaluation, too."""
        memory = Memory(state["agent_h"], state["agent_c"])
        policy, _, memory = self.actor_critic(to_float(obs[self.image_key]), memory)
        action = policy.sample()
        if explore:
            action = add_noise(action, self.exploration, self.spec.action)
        return self.codec.decode(action), {"agent_h": memory.h, "agent_c": memory.c}

    @torch.no_grad()
    def value(self, state: State) -> Tensor:
        """The critic's estimate (N,) of the return from states {key: (N, ...)} on."""
        memory = Memory(state["agent_h"], state["agent_c"])
        out: Tensor = self.actor_critic(latest(state), memory)[1]
        return out

    # Dreaming

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """The last frames and actions at each step, and the memories of both recurrent models."""
        image, action = batch["obs"][self.image_key], self.codec.encode(batch["action"])
        first = batch["is_first"]
        state = self.dream.observe(image, action, first)
        memory = self.actor_critic.burn_in(to_float(image), first)
        return {**state, "agent_h": memory.h, "agent_c": memory.c}

    @torch.no_grad()
    def imagine(
        self, state: State, actions: Tensor | Callable[[State], Tensor] | None, horizon: int
    ) -> Imagined:
        """Dreams on; rewards are the expected signs of rewards.

        Where the reward and end model never learns, nothing is earned and nothing ends.
        """
        reject_plan(self.name, actions, horizon)
        now = dict(state)
        states, taken, reward, cont = [], [], [], []
        for t in range(horizon):
            memory = Memory(now.pop("agent_h"), now.pop("agent_c"))
            policy, _, after = self.actor_critic(latest(now), memory)
            if actions is None:
                action = policy.sample()
            else:
                known = {**now, "agent_h": memory.h, "agent_c": memory.c}
                chosen = actions(known) if callable(actions) else actions[:, t]
                action = self.codec.encode(chosen)
            now, outcome = self.dream.step(now, action)
            now |= {"agent_h": after.h, "agent_c": after.c}
            states.append(dict(now))
            taken.append(action)
            reward.append(outcome.expected_reward())
            cont.append(1 - outcome.end_probability())
        return Imagined(
            torch.stack(reward, 1),
            torch.stack(cont, 1),
            {key: torch.stack([step[key] for step in states], 1) for key in now},
            self.codec.decode(torch.stack(taken, 1)),
        )

    def decode(self, state: State) -> dict[str, Tensor]:
        """The current frames (N, H, ...) in [0, 1]."""
        return {self.image_key: state["frames"][:, :, -1].float() / 255}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the dreams that go on, of every rank."""
        super().on_save_checkpoint(checkpoint)
        if self._dreams is None:
            return
        mine = {key: value.cpu() for key, value in self._dreams.items()}
        ranks: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, mine)
        checkpoint["dreams"] = ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up this rank's dreams again; another number of dreams begins anew."""
        super().on_load_checkpoint(checkpoint)
        ranks = checkpoint.get("dreams", [])
        mine = ranks[self.global_rank] if self.global_rank < len(ranks) else None
        self._dreams = mine if mine and len(mine["age"]) == self.num_dreams else None


def _counts(name: str, counts: Sequence[int]) -> list[int]:
    """The updates of the three parts in an epoch, checked."""
    whole = isinstance(counts, Sequence) and all(isinstance(count, Integral) for count in counts)
    if not whole or len(counts) != len(PARTS) or min(counts) < 0:
        raise UserError(
            f"Diamond needs {name} of denoiser, reward and end model, and actor-critic, three "
            f"whole numbers of at least 0, got {counts}"
        )
    return list(counts)
