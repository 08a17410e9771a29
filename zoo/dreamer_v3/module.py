"""DreamerV3 (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

A world model (encoder, RSSM, decoder, reward and continue heads) learns from replayed sequences;
actor and critic learn from rollouts imagined by it. One optimizer, one summed loss: gradients are
stopped where the paper trains the parts separately. This file is the method from top to bottom;
its deviations from the official code (2026-05) are listed in README.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.base import Batch, Imagined, Obs, State, ZooModel
from zoo.nets.actions import ActionCodec
from zoo.nets.averaging import follow
from zoo.nets.distributions import TwoHot, one_hot
from zoo.nets.heads import ActionHead, BinaryHead, TwoHotHead
from zoo.nets.optim import LaProp
from zoo.returns import ReturnNormalizer
from zoo.rssm.behavior import imagination_losses, replay_value_loss
from zoo.rssm.dynamics import RSSM, features, kl_losses
from zoo.rssm.observations import Decoder, Encoder

# Official widths; `nano` is ours, for CPUs. The number of layers is the same for all.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"deter": 64, "hidden": 64, "stoch": 32, "classes": 4, "depth": 4, "units": 64},
    "1m": {"deter": 512, "hidden": 64, "stoch": 32, "classes": 4, "depth": 4, "units": 64},
    "12m": {"deter": 2048, "hidden": 256, "stoch": 32, "classes": 16, "depth": 16, "units": 256},
    "25m": {"deter": 3072, "hidden": 384, "stoch": 32, "classes": 24, "depth": 24, "units": 384},
    "50m": {"deter": 4096, "hidden": 512, "stoch": 32, "classes": 32, "depth": 32, "units": 512},
    "100m": {"deter": 6144, "hidden": 768, "stoch": 32, "classes": 48, "depth": 48, "units": 768},
    "200m": {"deter": 8192, "hidden": 1024, "stoch": 32, "classes": 64, "depth": 64, "units": 1024},
    "400m": {
        "deter": 12288,
        "hidden": 1536,
        "stoch": 32,
        "classes": 96,
        "depth": 96,
        "units": 1536,
    },
}

LOSS_SCALES = {
    "reconstruction": 1.0,
    "reward": 1.0,
    "continue": 1.0,
    "dynamics": 1.0,
    "representation": 0.1,
    "policy": 1.0,
    "value": 1.0,
    "replay_value": 0.3,
}


class DreamerV3(
    ZooModel,
    repo_url="https://github.com/danijar/dreamerv3",
    paper_url="https://arxiv.org/abs/2301.04104",
):
    """DreamerV3.

    Args:
        spec: observations (images and vectors in any mix) and actions (any kind).
        size: one of `SIZES`; single widths below override it.
        deter, hidden, stoch, classes, depth, units: widths of h, of the RSSM's hidden layers,
            number of latents, classes of each, channel multiplier, width of the MLPs.
        blocks: blocks of the recurrent weights.
        bins: bins of the two-hot reward and value.
        unimix: share of the uniform distribution in the latents.
        free_nats: clip of the KL losses, in nats.
        loss_scales: overrides of `LOSS_SCALES`.
        horizon: effective horizon in steps; the discount is 1 - 1 / horizon.
        contdisc: train the continue head towards the discount, instead of multiplying by it.
        imagine_length: steps H of imagined rollouts.
        imagine_last: start imagination only from the last so many steps of each sequence (0: all).
        lam: lambda of the returns.
        entropy: scale of the policy's entropy bonus.
        slow_rate, slow_regularizer: the slow critic's update rate and its loss weight.
        lr, agc, warmup, anneal: LaProp's learning rate, gradient clipping, warm-up updates, and the
            update from which the learning rate is a tenth (0: it stays).
        average_rate: greedy actions come from an exponential moving average of the weights with
            this rate per update; 0 (as published) acts with the weights themselves.
    """

    name: ClassVar[str] = "dreamer-v3"
    replay_context: ClassVar[int] = 1

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "12m",
        deter: int | None = None,
        hidden: int | None = None,
        stoch: int | None = None,
        classes: int | None = None,
        depth: int | None = None,
        units: int | None = None,
        blocks: int = 8,
        bins: int = 255,
        unimix: float = 0.01,
        free_nats: float = 1.0,
        loss_scales: dict[str, float] | None = None,
        horizon: int = 333,
        contdisc: bool = True,
        imagine_length: int = 15,
        imagine_last: int = 0,
        lam: float = 0.95,
        entropy: float = 3e-4,
        slow_rate: float = 0.02,
        slow_regularizer: float = 1.0,
        lr: float = 4e-5,
        agc: float = 0.3,
        warmup: int = 1000,
        anneal: int = 0,
        average_rate: float = 0.0,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        if size not in SIZES:
            raise UserError(f"DreamerV3 has no size '{size}': choose one of {', '.join(SIZES)}")
        given = {"deter": deter, "hidden": hidden, "stoch": stoch, "classes": classes}
        given |= {"depth": depth, "units": units}
        w = {k: SIZES[size][k] if v is None else v for k, v in given.items()}
        positive = {**w, "blocks": blocks, "horizon": horizon, "imagine_length": imagine_length}
        for key, value in positive.items():
            if value <= 0:
                raise UserError(f"DreamerV3 needs {key} > 0, got {value}")
        if lr < 0:
            raise UserError(f"DreamerV3 needs lr >= 0, got {lr}")
        if w["deter"] % blocks:
            raise UserError(f"deter is {w['deter']}: it must be divisible by blocks, {blocks}")
        if bins < 3 or bins % 2 == 0:
            raise UserError(f"bins is {bins}: it must be odd, for zero is in the middle")
        if w["classes"] > 256:
            raise UserError(f"classes is {w['classes']}: the replay keeps a class in one byte, 256")
        if self.spec.images and w["depth"] * 4 % blocks:
            raise UserError(f"depth {w['depth']}: 4 * depth must be divisible by {blocks} blocks")
        unknown = set(loss_scales or {}) - set(LOSS_SCALES)
        if unknown:
            raise UserError(
                f"unknown loss scale {sorted(unknown)}: choose from {', '.join(LOSS_SCALES)}"
            )
        self.loss_scales = LOSS_SCALES | (loss_scales or {})
        self.free_nats, self.lam, self.entropy = free_nats, lam, entropy
        self.discount, self.contdisc = 1 - 1 / horizon, contdisc
        self.imagine_length, self.imagine_last = imagine_length, imagine_last
        self.slow_rate, self.slow_regularizer = slow_rate, slow_regularizer
        self.lr, self.agc, self.warmup, self.anneal = lr, agc, warmup, anneal

        self.actions = ActionCodec(self.spec.action)
        latent = w["stoch"] * w["classes"]
        feature_size = w["deter"] + latent
        self.encoder = Encoder(self.spec, w["depth"], 3, w["units"])
        self.rssm = RSSM(
            self.spec.action.encoded_size,
            self.encoder.size,
            w["deter"],
            w["hidden"],
            w["stoch"],
            w["classes"],
            blocks,
            unimix,
        )
        self.decoder = Decoder(self.spec, w["deter"], latent, w["depth"], 3, w["units"], blocks)
        self.reward_head = TwoHotHead(feature_size, 1, w["units"], bins)
        self.continue_head = BinaryHead(feature_size, 1, w["units"])
        self.actor = ActionHead(feature_size, 3, w["units"], self.spec.action)
        self.critic = TwoHotHead(feature_size, 3, w["units"], bins)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer()
        # Our addition: with few updates at a high learning rate the greedy policy wobbles from one
        # update to the next; averaged weights do so less. Slower swings of the policy remain.
        self.average_rate = average_rate
        agent = nn.ModuleDict({"encoder": self.encoder, "rssm": self.rssm, "actor": self.actor})
        self.averaged = copy.deepcopy(agent).requires_grad_(False) if average_rate else None

    # Learning

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss for world model, actor and critic.

        Args:
            batch: T + 1 steps: the first is the context, whose stored latents (or zeros, where the
                replay has none) and action start the filter; losses are on the T others.
        """
        start, obs, previous_action, flags = self._split_context(batch)
        reward, is_first = flags["reward"], flags["is_first"]
        is_last, is_terminal = flags["is_last"], flags["is_terminal"]

        # World model
        tokens = self.encoder(obs)
        states, posterior = self.rssm.observe(start, tokens, previous_action, is_first)
        prior = self.rssm.prior(states["deter"])
        inputs = features(states)
        losses = {}
        losses["dynamics"], losses["representation"] = kl_losses(posterior, prior, self.free_nats)
        reconstructions = self.decoder.losses(self.decoder(inputs), obs)
        losses["reconstruction"] = torch.stack(list(reconstructions.values())).sum(0)
        losses["reward"] = self.reward_head(inputs).loss(reward)
        keep_on = (~is_terminal).float() * (self.discount if self.contdisc else 1.0)
        losses["continue"] = self.continue_head(inputs).loss(keep_on)
        if "step_id" in batch:
            self.write_back(batch["step_id"][:, 1:], self.latents(states))

        # Imagination: dreamed without gradients, REINFORCE needs none through it.
        length = is_first.shape[1]
        last = min(self.imagine_last or length, length)
        starts = {k: v.detach()[:, -last:].flatten(0, 1) for k, v in states.items()}
        with torch.no_grad():
            dream, action = self.rssm.imagine(starts, self._explore, self.imagine_length)
            dreamed = features(dream)
            dream_reward = self.reward_head(dreamed).pred()
            dream_continue = self.continue_head(dreamed).pred()
        policy = self.actor(dreamed[:, :-1])
        learned = imagination_losses(
            policy,
            self.critic(dreamed),
            self._slow_value(dreamed),
            action,
            dream_reward,
            dream_continue,
            self.normalizer,
            discount=1.0 if self.contdisc else self.discount,
            lam=self.lam,
            entropy=self.entropy,
            slow_regularizer=self.slow_regularizer,
        )
        losses["policy"], losses["value"] = learned.policy, learned.value

        # Replay value: the same critic on the real sequence, through the world model. Steps from
        # which nothing was imagined bootstrap from the critic itself.
        value = self.critic(inputs)
        imagined = learned.returns[:, 0].unflatten(0, (-1, last))
        bootstrap = torch.cat([value[:, : length - last].pred().detach(), imagined], 1)
        losses["replay_value"] = replay_value_loss(
            value,
            self._slow_value(inputs),
            bootstrap,
            reward,
            is_terminal,
            is_last,
            discount=self.discount,
            lam=self.lam,
            slow_regularizer=self.slow_regularizer,
        )
        if self.logs_now:
            self.log_metrics(
                {
                    "prior_entropy": prior.entropy().mean(),
                    "posterior_entropy": posterior.entropy().mean(),
                    "policy_entropy": policy.entropy().mean(),
                    "dream_reward": dream_reward[:, 1:].mean(),
                    "dream_return": learned.returns.mean(),
                    "return_scale": self.normalizer.scale,
                }
            )
        return self.total_loss({k: v.mean() for k, v in losses.items()}, self.loss_scales)

    def after_update(self) -> None:
        """Moves the slow critic, and the averaged agent if there is one, towards the weights."""
        follow(self.slow_critic, self.critic, self.slow_rate)
        if self.averaged is not None:
            for name, part in self.averaged.items():
                follow(part, getattr(self, name), self.average_rate)

    def configure_optimizers(self) -> Optimizer:
        """LaProp with AGC over everything that learns."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return LaProp(learning, self.lr, agc=self.agc, warmup=self.warmup, anneal=self.anneal)

    # Policy

    def initial_state(self, batch_size: int) -> State:
        """Latents and previous action before an episode: zeros."""
        state = self.rssm.initial(batch_size)
        size = (batch_size, self.spec.action.encoded_size)
        return {**state, "action": state["deter"].new_zeros(size)}

    @torch.no_grad()
    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Filters one step and acts: a sample when exploring, else the mode."""
        agent: Any = self if explore or self.averaged is None else self.averaged
        encoder, rssm, actor = agent.encoder, agent.rssm, agent.actor
        tokens = encoder({k: v.unsqueeze(1) for k, v in obs.items()})
        is_first = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        states, _ = rssm.observe(state, tokens, state["action"].unsqueeze(1), is_first)
        latent = {k: v[:, 0] for k, v in states.items()}
        policy = actor(features(latent))
        action = policy.sample() if explore else policy.pred()
        return self.actions.decode(action), {**latent, "action": action}

    def latent_fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """h as float32, z as the index of each categorical."""
        return {"deter": ((self.rssm.deter,), "float32"), "stoch": ((self.rssm.stoch,), "uint8")}

    def latents(self, state: State) -> dict[str, Tensor]:
        """What the replay keeps of states (..., D), (..., S, C)."""
        return {
            "deter": state["deter"].detach().float(),
            "stoch": state["stoch"].detach().argmax(-1).to(torch.uint8),
        }

    # Dreaming

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """Filters whole sequences from an empty state."""
        action = self.actions.encode(batch["action"])
        previous = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
        start = self.rssm.initial(len(action))
        tokens = self.encoder(batch["obs"])
        states, _ = self.rssm.observe(start, tokens, previous, batch["is_first"])
        return states

    @torch.no_grad()
    def imagine(
        self, state: State, actions: Tensor | Callable[[State], Tensor] | None, horizon: int
    ) -> Imagined:
        """Dreams with given actions, another policy, or its own."""

        def choose(current: State, t: int) -> Tensor:
            if actions is None:
                return self._explore(current, t)
            chosen = actions(current) if callable(actions) else actions[:, t]
            return self.actions.encode(chosen)

        start = {key: state[key] for key in ("deter", "stoch")}
        states, encoded = self.rssm.imagine(start, choose, horizon)
        states = {key: value[:, 1:] for key, value in states.items()}
        inputs = features(states)
        cont = self.continue_head(inputs).pred()
        if self.contdisc:
            cont = (cont / self.discount).clamp(max=1.0)
        reward = self.reward_head(inputs).pred()
        return Imagined(reward, cont, states, self.actions.decode(encoded))

    @torch.no_grad()
    def decode(self, state: State) -> dict[str, Tensor]:
        """Predicted observations of states (N, H, ...)."""
        return {key: output.pred() for key, output in self.decoder(features(state)).items()}

    @torch.no_grad()
    def encode(self, obs: Obs) -> Tensor:
        """Tokens (B, T, E)."""
        return self.encoder(obs)

    # Parts

    def _explore(self, state: State, t: int) -> Tensor:
        return self.actor(features(state)).sample()

    @torch.no_grad()
    def _slow_value(self, inputs: Tensor) -> TwoHot | None:
        return self.slow_critic(inputs) if self.slow_regularizer else None

    def _split_context(
        self, batch: Batch
    ) -> tuple[State, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Start state, and observations, previous encoded actions and flags of T steps."""
        obs = {key: value[:, 1:] for key, value in batch["obs"].items()}
        previous_action = self.actions.encode(batch["action"][:, :-1])
        names = ("reward", "is_first", "is_last", "is_terminal")
        flags = {key: batch[key][:, 1:] for key in names}
        if "latents" not in batch:
            return self.rssm.initial(len(previous_action)), obs, previous_action, flags
        stored = batch["latents"]
        stoch = one_hot(stored["stoch"][:, 0].long(), self.rssm.classes)
        return {"deter": stored["deter"][:, 0], "stoch": stoch}, obs, previous_action, flags
