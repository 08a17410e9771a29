"""Dreamer V2 (Hafner et al., "Mastering Atari with Discrete World Models", ICLR 2021).

New over V1: latents are vectors of categoricals, trained straight through; the KL divergence is
balanced, so that the prior moves faster than the representation; the GRU has LayerNorm; the actor
(a truncated normal over boxes) learns by REINFORCE where actions are discrete, with an entropy
bonus instead of exploration noise, and a critic whose targets come from a slow copy; the end of an
episode is predicted; batches are pieces of episodes over which the state is carried on; weights
decay, and rewards are squashed on Atari. This file is the method from top to bottom; its deviations
from the official code are listed in README.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.spec import Spec
from zoo.arguments import choose_widths, reject_outside, reject_unknown, reject_unless_positive
from zoo.base import Batch, State
from zoo.nets.averaging import follow
from zoo.nets.distributions import PolicySteps, TruncatedNormal, UnitNormal
from zoo.nets.frozen import frozen
from zoo.nets.heads import ActionHead, BinaryHead, ScalarHead
from zoo.nets.layers import ELU
from zoo.nets.one_hot import OneHotLinear
from zoo.nets.optim import ClippedAdam
from zoo.rssm.behavior import arrival_weights, mixed_objective, own_reward_targets
from zoo.rssm.cores import GRUCore
from zoo.rssm.dynamics import RSSM, features, kl_losses
from zoo.rssm.latents import Categoricals, Gaussians
from zoo.rssm.model import Filtered, LatentModel, StoredLatents
from zoo.rssm.observations import Decoder, Encoder, same
from zoo.rssm.vision import StridedEncoder, TransposedDecoder

# `nano` is ours, for CPUs; the others are the official widths of their tasks.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"deter": 64, "hidden": 64, "stoch": 8, "classes": 8, "depth": 8, "units": 64},
    "dmc": {"deter": 200, "hidden": 200, "stoch": 32, "classes": 32, "depth": 48, "units": 400},
    "atari": {"deter": 600, "hidden": 600, "stoch": 32, "classes": 32, "depth": 48, "units": 400},
    "crafter": {
        "deter": 1024,
        "hidden": 1024,
        "stoch": 32,
        "classes": 32,
        "depth": 48,
        "units": 400,
    },
}

REWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": same,
    "tanh": torch.tanh,
    "sign": torch.sign,
}
ACTOR_GRADIENTS = ("auto", "reinforce", "dynamics", "both")


class DreamerV2(
    StoredLatents,
    LatentModel,
    repo_url="https://github.com/danijar/dreamerv2",
    paper_url="https://arxiv.org/abs/2010.02193",
):
    """Dreamer V2.

    Args:
        spec: observations (64x64 images and vectors in any mix) and actions (any kind).
        size: one of `SIZES`; single widths below override it.
        deter, hidden, stoch, classes, depth, units: widths of h and of the RSSM's hidden layers,
            number of latents, classes of each, channel multiplier, width of the MLPs.
        latent: "categorical", or "gaussian" (the paper's ablation; `stoch` of them).
        kl_balance: share of the KL divergence that trains the prior; 0.5 is no balancing.
        free_nats: smallest mean KL divergence that is still penalised, in nats.
        kl_scale, reconstruction_scale, reward_scale: weights of the model's losses.
        continue_scale: weight of the continue head's loss; 0 (as on the control suite) leaves the
            head out and assumes that episodes never end.
        reward_unit: reward that counts as 1 inside of the model (ours; 1 as published).
        reward_transform: "tanh" (Atari), "sign" or "identity" before rewards are learnt.
        discount: gamma.
        lam: lambda of the returns.
        imagine_length: steps H of imagined rollouts.
        imagine_last: start imagination only from the last so many steps of each sequence (0: all).
        actor_gradient: "reinforce", "dynamics" or "both"; "auto" is REINFORCE for discrete actions
            and dynamics for boxes.
        actor_mix: share of the dynamics gradient in "both", 1 - rho in the paper.
        entropy: scale of the policy's entropy bonus.
        slow_every: updates between copies of the critic into its slow target.
        model_lr, actor_lr, critic_lr: Adam's learning rates.
        clip: largest gradient norm of model, actor and critic each.
        weight_decay: share of all weights taken away by each update.
        average_rate: greedy actions come from an exponential moving average of the weights with
            this rate per update; 0 (as published) acts with the weights themselves.
    """

    name: ClassVar[str] = "dreamer-v2"
    actor: nn.Module
    replay_sampling: ClassVar[str] = "pieces"

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "atari",
        deter: int | None = None,
        hidden: int | None = None,
        stoch: int | None = None,
        classes: int | None = None,
        depth: int | None = None,
        units: int | None = None,
        latent: Literal["categorical", "gaussian"] = "categorical",
        kl_balance: float = 0.8,
        free_nats: float = 0.0,
        kl_scale: float = 0.1,
        reconstruction_scale: float = 1.0,
        reward_scale: float = 1.0,
        continue_scale: float = 5.0,
        reward_unit: float = 1.0,
        reward_transform: Literal["identity", "tanh", "sign"] = "tanh",
        discount: float = 0.999,
        lam: float = 0.95,
        imagine_length: int = 15,
        imagine_last: int = 0,
        actor_gradient: Literal["auto", "reinforce", "dynamics", "both"] = "auto",
        actor_mix: float = 0.1,
        entropy: float = 1e-3,
        slow_every: int = 100,
        model_lr: float = 2e-4,
        actor_lr: float = 4e-5,
        critic_lr: float = 1e-4,
        clip: float = 100.0,
        weight_decay: float = 1e-6,
        average_rate: float = 0.0,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        given = {"deter": deter, "hidden": hidden, "stoch": stoch, "classes": classes}
        w = choose_widths("DreamerV2", SIZES, size, {**given, "depth": depth, "units": units})
        rates = {"model_lr": model_lr, "actor_lr": actor_lr, "critic_lr": critic_lr}
        rates["reward_unit"] = reward_unit
        reject_unless_positive("DreamerV2", **rates, clip=clip, slow_every=slow_every)
        reject_outside("DreamerV2", 2, math.inf, imagine_length=imagine_length)
        reject_outside("DreamerV2", 0, math.inf, imagine_last=imagine_last, free_nats=free_nats)
        unit = {"discount": discount, "lam": lam, "kl_balance": kl_balance, "actor_mix": actor_mix}
        reject_outside("DreamerV2", 0, 1, **unit, average_rate=average_rate)
        reject_unknown("DreamerV2", REWARDS, reward_transform=reward_transform)
        reject_unknown("DreamerV2", ("categorical", "gaussian"), latent=latent)
        reject_unknown("DreamerV2", ACTOR_GRADIENTS, actor_gradient=actor_gradient)
        self.loss_scales = {"reconstruction": reconstruction_scale, "reward": reward_scale}
        self.loss_scales |= {"kl": kl_scale, "actor": 1.0, "critic": 1.0}
        self.kl_balance, self.free_nats = kl_balance, free_nats
        self.reward_unit, self.reward_transform = reward_unit, reward_transform
        self.discount, self.lam, self.entropy = discount, lam, entropy
        self.imagine_length, self.imagine_last = imagine_length, imagine_last
        if actor_gradient == "auto":
            actor_gradient = "dynamics" if self.spec.action.kind == "box" else "reinforce"
        self.actor_mix = {"reinforce": 0.0, "both": actor_mix, "dynamics": 1.0}[actor_gradient]
        self.slow_every = slow_every
        self.lrs, self.clip = (model_lr, actor_lr, critic_lr), clip
        self.weight_decay = weight_decay

        kind = Categoricals(w["stoch"], w["classes"])
        z = Gaussians(w["stoch"], "sigmoid2") if latent == "gaussian" else kind
        units, classes = w["units"], 0 if latent == "gaussian" else w["classes"]
        one_hot = partial(OneHotLinear, dense=w["deter"], classes=classes)
        reader = ELU._replace(first=one_hot if classes else None)  # of features [h, z]
        vision = partial(StridedEncoder, depth=w["depth"], activation=nn.ELU)
        self.encoder = Encoder(self.spec, vision, 4, units, ELU, squash=same)
        core = GRUCore(
            self.spec.action.encoded_size,
            math.prod(z.shape),
            w["deter"],
            w["hidden"],
            ELU,
            layer_norm=True,
            classes=classes,
        )
        self.rssm = RSSM(core, z, self.encoder.size, w["hidden"], style=ELU)
        inputs = self.rssm.feature_size
        picture = partial(TransposedDecoder, features=inputs, depth=w["depth"], activation=nn.ELU)
        self.decoder = Decoder(self.spec, inputs, picture, 4, units, reader, UnitNormal)
        self.reward_head = ScalarHead(inputs, 4, units, reader)
        if continue_scale:
            self.continue_head = BinaryHead(inputs, 4, units, reader)
            self.loss_scales["continue"] = continue_scale
        box = TruncatedNormal
        self.actor = ActionHead(inputs, 4, units, self.spec.action, reader, box, out_scale=None)
        self.critic = ScalarHead(inputs, 4, units, reader)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.average_agent(average_rate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss for world model, actor and critic, whose parameters it trains apart."""
        # World model (equation 2, algorithm 2): free nats are of the mean, for each side apart.
        seen = self.filter(batch)
        losses = {key: value.mean() for key, value in self.prediction_losses(seen).items()}
        prior_side, posterior_side = (
            kl.mean().clamp(min=self.free_nats) for kl in kl_losses(seen.posterior, seen.prior)
        )
        losses["kl"] = self.kl_balance * prior_side + (1 - self.kl_balance) * posterior_side

        # Imagination: gradients flow through the dynamics, but train only the actor.
        differentiable = torch.enable_grad if self.actor_mix else torch.no_grad
        with differentiable(), frozen(self.rssm, self.reward_head, self.continue_head):
            starts = seen.starts(self.imagine_last)
            dream, action, policies = self.dream(starts, self.imagine_length)
            dreamed = features(dream)
            judged = dreamed[:, :-1].contiguous()  # the last state only lends its value
            reward = self.reward_head(judged).pred()
            discount = self._discounts(judged, seen)
            slow_value = self.slow_critic(dreamed).pred()
            target = own_reward_targets(reward, slow_value, discount, self.lam)
        weight = arrival_weights(discount)

        # Actor (equation 6): action t leads from state t to t + 1, so it is judged by target t + 1;
        # the last action leads to a state that has no target.
        policy = PolicySteps(policies[:-1])
        objective = mixed_objective(
            policy, action[:, :-1], target[:, 1:], slow_value[:, :-2], self.actor_mix
        )
        entropy = policy.entropy()
        losses["actor"] = -(weight[:, :-1] * (objective + self.entropy * entropy)).mean()

        # Critic (equation 5)
        predicted = self.critic(judged.detach())
        losses["critic"] = (weight * predicted.loss(target.detach())).mean()
        if self.logs_now:
            dreamed_metrics = {"policy_entropy": entropy.mean(), "dream_reward": reward.mean()}
            dreamed_metrics |= {"dream_return": target.mean()}
            self.log_metrics({**self.latent_metrics(seen), **dreamed_metrics})
        return self.total_loss(losses, self.loss_scales)

    def after_update(self) -> None:
        """Copies the critic into its slow target after updates 1, 101, 201, ..."""
        super().after_update()
        if (self.updates - 1) % self.slow_every == 0:
            follow(self.slow_critic, self.critic, 1.0)

    def value(self, state: State) -> Tensor:
        """The critic's estimate of the return from states on."""
        return self.critic(features(state)).pred()

    def configure_optimizers(self) -> Optimizer:
        """Three Adams in one: model, actor and critic, each clipped by its own norm."""
        groups = self.parameter_groups(*self.lrs)
        return ClippedAdam(groups, self.clip, eps=1e-5, weight_decay=self.weight_decay)

    def transform(self, reward: Tensor) -> Tensor:
        """Rewards as the reward head learns them."""
        return REWARDS[self.reward_transform](super().transform(reward))

    def untransform(self, reward: Tensor) -> Tensor:
        """The inverse, as far as there is one: signs stay signs."""
        if self.reward_transform == "tanh":
            reward = torch.atanh(reward.clamp(-1 + 1e-6, 1 - 1e-6))
        return super().untransform(reward)

    def _discounts(self, judged: Tensor, seen: Filtered) -> Tensor:
        """Discount (N, H) of each dreamed state; the first is known from the replay."""
        if self.continue_head is None:
            return judged.new_full(judged.shape[:2], self.discount)
        ended = seen.is_terminal[:, -self.imagine_last :].flatten()
        first = (~ended).float().unsqueeze(1) * self.discount
        return torch.cat([first, self.continue_head(judged).pred()[:, 1:]], 1)
