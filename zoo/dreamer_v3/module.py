"""DreamerV3 (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

A world model (encoder, RSSM, decoder, reward and continue heads) learns from replayed sequences;
actor and critic learn from rollouts imagined by it. One optimizer, one summed loss: gradients are
stopped where the paper trains the parts separately. This file is the method from top to bottom;
its deviations from the official code (2026-05) are listed in README.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.arguments import choose_widths, reject_outside, reject_unknown, reject_unless_positive
from zoo.base import Batch, State
from zoo.dreamer_v3.sizes import SIZES
from zoo.nets.averaging import follow
from zoo.nets.distributions import PolicySteps, Scalar
from zoo.nets.heads import ActionHead, BinaryHead, ScalarHead, TwoHotHead
from zoo.nets.layers import randomize_biases
from zoo.nets.optim import LaProp
from zoo.returns import ReturnNormalizer
from zoo.rssm.behavior import imagination_losses, replay_value_loss
from zoo.rssm.cores import BlockCore
from zoo.rssm.dynamics import RSSM, features, kl_losses
from zoo.rssm.latents import Categoricals, Gaussians
from zoo.rssm.model import LatentModel, StoredLatents
from zoo.rssm.observations import Decoder, Encoder
from zoo.rssm.vision import BlockDecoder, PooledEncoder

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
    StoredLatents,
    LatentModel,
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
        return_rate: rate at which the range of returns follows that of a batch.
        slow_rate, slow_regularizer: the slow critic's update rate and its loss weight.
        lr, agc, warmup, anneal: LaProp's learning rate, gradient clipping, warm-up updates, and the
            update from which the learning rate is a tenth (0: it stays).
        average_rate: greedy actions come from an exponential moving average of the weights with
            this rate per update; 0 (as published) acts with the weights themselves.
        random_biases: start with random biases instead of zeros (ours, for small observations).
        reward_unit: reward that counts as 1 inside of the model (1 as published: the symexp
            two-hot heads make it unnecessary).
        latent, deterministic, stochastic, two_hot: ablations: "gaussian" latents (`stoch` of them);
            no memory in h (see `RSSM`); no noise in z; reward and value as plain regressions.
    """

    name: ClassVar[str] = "dreamer-v3"
    actor: nn.Module
    continue_head: nn.Module
    random_start: ClassVar[bool] = False

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
        return_rate: float = 0.01,
        slow_rate: float = 0.02,
        slow_regularizer: float = 1.0,
        lr: float = 4e-5,
        agc: float = 0.3,
        warmup: int = 1000,
        anneal: int = 0,
        average_rate: float = 0.0,
        random_biases: bool = False,
        reward_unit: float = 1.0,
        latent: Literal["categorical", "gaussian"] = "categorical",
        deterministic: bool = True,
        stochastic: bool = True,
        two_hot: bool = True,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        given = {"deter": deter, "hidden": hidden, "stoch": stoch, "classes": classes}
        w = choose_widths("DreamerV3", SIZES, size, {**given, "depth": depth, "units": units})
        steps = {"horizon": horizon, "imagine_length": imagine_length}
        reject_unless_positive("DreamerV3", blocks=blocks, reward_unit=reward_unit, **steps)
        reject_outside(
            "DreamerV3", 0, math.inf, lr=lr, imagine_last=imagine_last, free_nats=free_nats
        )
        reject_unknown("DreamerV3", ("categorical", "gaussian"), latent=latent)
        rates = {"return_rate": return_rate, "average_rate": average_rate}
        reject_outside("DreamerV3", 0, 1, lam=lam, unimix=unimix, **rates)
        if bins < 3 or bins % 2 == 0:
            raise UserError(f"bins is {bins}: it must be odd, for zero is in the middle")
        unknown = set(loss_scales or {}) - set(LOSS_SCALES)
        if unknown:
            raise UserError(
                f"unknown loss scale {sorted(unknown)}: choose from {', '.join(LOSS_SCALES)}"
            )
        self.loss_scales = LOSS_SCALES | (loss_scales or {})
        self.free_nats, self.lam, self.entropy = free_nats, lam, entropy
        self.reward_unit = reward_unit
        self.gamma = 1 - 1 / horizon
        self.discount = self.gamma if contdisc else 1.0
        self.imagine_length, self.imagine_last = imagine_length, imagine_last
        self.slow_rate, self.slow_regularizer = slow_rate, slow_regularizer
        self.lr, self.agc, self.warmup, self.anneal = lr, agc, warmup, anneal

        kind = Categoricals(w["stoch"], w["classes"], unimix)
        z = Gaussians(w["stoch"]) if latent == "gaussian" else kind
        z_size, action_size, units = math.prod(z.shape), self.spec.action.encoded_size, w["units"]
        self.encoder = Encoder(self.spec, partial(PooledEncoder, depth=w["depth"]), 3, units)
        core = BlockCore(action_size, z_size, w["deter"], w["hidden"], blocks)
        self.rssm = RSSM(
            core,
            z,
            self.encoder.size,
            w["hidden"],
            prior_layers=2,
            deterministic=deterministic,
            stochastic=stochastic,
        )
        feature_size = self.rssm.feature_size
        vision = partial(
            BlockDecoder,
            deter=w["deter"],
            latent=z_size,
            depth=w["depth"],
            units=units,
            blocks=blocks,
        )
        self.decoder = Decoder(self.spec, feature_size, vision, 3, units)
        scalar = partial(TwoHotHead, bins=bins) if two_hot else ScalarHead
        self.reward_head = scalar(feature_size, 1, units)
        self.continue_head = BinaryHead(feature_size, 1, units)
        self.actor = ActionHead(feature_size, 3, units, self.spec.action)
        self.critic = scalar(feature_size, 3, units)
        if random_biases:
            randomize_biases(self)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = ReturnNormalizer(return_rate)
        self.average_agent(average_rate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss for world model, actor and critic.

        Args:
            batch: T + 1 steps: the first is the context, whose stored latents (or zeros, where the
                replay has none) and action start the filter; losses are on the T others.
        """
        # World model
        seen = self.filter(batch)
        losses = self.prediction_losses(seen)
        dynamics, representation = kl_losses(seen.posterior, seen.prior)
        losses["dynamics"] = dynamics.clamp(min=self.free_nats)
        losses["representation"] = representation.clamp(min=self.free_nats)

        # Imagination: dreamed without gradients, REINFORCE needs none through it.
        length = seen.reward.shape[1]
        last = min(self.imagine_last or length, length)
        with torch.no_grad():
            dream, action, policies = self.dream(seen.starts(last), self.imagine_length)
            dreamed = features(dream)
            dream_reward = self.reward_head(dreamed).pred()
            dream_continue = self.continue_head(dreamed).pred()
        policy = PolicySteps(policies)
        learned = imagination_losses(
            policy,
            self.critic(dreamed),
            self._slow_value(dreamed),
            action,
            dream_reward,
            dream_continue,
            self.normalizer,
            discount=self.gamma / self.discount,  # 1 where the continue head contains it
            lam=self.lam,
            entropy=self.entropy,
            slow_regularizer=self.slow_regularizer,
        )
        losses["policy"], losses["value"] = learned.policy, learned.value

        # Replay value: the same critic on the real sequence, through the world model. Steps from
        # which nothing was imagined bootstrap from the critic itself.
        value = self.critic(seen.features)
        imagined = learned.returns[:, 0].unflatten(0, (-1, last))
        bootstrap = torch.cat([value[:, : length - last].pred().detach(), imagined], 1)
        losses["replay_value"] = replay_value_loss(
            value,
            self._slow_value(seen.features),
            bootstrap,
            self.transform(seen.reward),
            seen.is_terminal,
            seen.is_last,
            discount=self.gamma,
            lam=self.lam,
            slow_regularizer=self.slow_regularizer,
        )
        if self.logs_now:
            self.log_metrics(
                {
                    **self.latent_metrics(seen),
                    "policy_entropy": policy.entropy().mean(),
                    "dream_reward": dream_reward[:, 1:].mean(),
                    "dream_return": learned.returns.mean(),
                    "return_scale": self.normalizer.scale,
                }
            )
        return self.total_loss({k: v.mean() for k, v in losses.items()}, self.loss_scales)

    def after_update(self) -> None:
        """Moves the slow critic, and the averaged agent if there is one, towards the weights."""
        super().after_update()
        follow(self.slow_critic, self.critic, self.slow_rate)

    def value(self, state: State) -> Tensor:
        """The critic's estimate of the return from states on."""
        return self.critic(features(state)).pred()

    def configure_optimizers(self) -> Optimizer:
        """LaProp with AGC over everything that learns."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return LaProp(learning, self.lr, agc=self.agc, warmup=self.warmup, anneal=self.anneal)

    @torch.no_grad()
    def _slow_value(self, inputs: Tensor) -> Scalar | None:
        return self.slow_critic(inputs) if self.slow_regularizer else None
