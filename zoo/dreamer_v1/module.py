"""Dreamer V1 (Hafner et al., "Dream to Control", ICLR 2020).

The world model is PlaNet's: a recurrent state-space model with Gaussian latents (here with ELU
layers, reward weight 1 instead of 10, and free nats of the mean KL divergence instead of each
step's). What is new is how behaviour is learnt: a value function looks beyond the imagined horizon,
and the actor, a tanh-normal, follows the gradient of its lambda-returns back through the imagined
dynamics. This file is the method from top to bottom; its deviations from the official code are
listed in README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.spec import Spec
from zoo.arguments import choose_widths, reject_outside, reject_unless_positive
from zoo.base import Batch, State
from zoo.nets.actions import add_noise
from zoo.nets.distributions import PolicySteps, TanhNormal, UnitNormal
from zoo.nets.frozen import frozen
from zoo.nets.heads import ActionHead, BinaryHead, ScalarHead
from zoo.nets.layers import ELU
from zoo.nets.optim import ClippedAdam
from zoo.rssm.behavior import arrival_weights, own_reward_targets
from zoo.rssm.cores import GRUCore
from zoo.rssm.dynamics import RSSM, features
from zoo.rssm.latents import Gaussians
from zoo.rssm.model import LatentModel
from zoo.rssm.observations import Decoder, Encoder, same
from zoo.rssm.vision import StridedEncoder, TransposedDecoder

# `nano` is ours, for CPUs.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"deter": 64, "hidden": 64, "stoch": 16, "depth": 8, "units": 64},
    "paper": {"deter": 200, "hidden": 200, "stoch": 30, "depth": 32, "units": 400},
}


class DreamerV1(
    LatentModel,
    repo_url="https://github.com/danijar/dreamer",
    paper_url="https://arxiv.org/abs/1912.01603",
):
    """Dreamer V1.

    Args:
        spec: observations (64x64 images and vectors in any mix) and actions (any kind).
        size: one of `SIZES`; single widths below override it.
        deter, hidden, stoch, depth, units: widths of h and of the RSSM's hidden layers, number of
            latents, channel multiplier, width of the MLPs.
        free_nats: smallest mean KL divergence that is still penalised, in nats.
        kl_scale, reconstruction_scale, reward_scale: weights of the model's losses.
        continue_scale: weight of the continue head's loss; 0 (as on the control suite) leaves the
            head out and assumes that episodes never end.
        reward_unit: reward that counts as 1 inside of the model (ours; 1 as published).
        discount: gamma.
        lam: lambda of the returns.
        imagine_length: steps H of imagined rollouts.
        imagine_last: start imagination only from the last so many steps of each sequence (0: all).
        entropy: scale of an entropy bonus for the policy; 0 as published.
        init_std: standard deviation of a new policy over a box, before the tanh.
        exploration: standard deviation of the noise on box actions, or probability of a random
            discrete action.
        model_lr, actor_lr, critic_lr: Adam's learning rates.
        clip: largest gradient norm of model, actor and critic each.
        average_rate: greedy actions come from an exponential moving average of the weights with
            this rate per update; 0 (as published) acts with the weights themselves.
    """

    name: ClassVar[str] = "dreamer-v1"
    actor: nn.Module

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "paper",
        deter: int | None = None,
        hidden: int | None = None,
        stoch: int | None = None,
        depth: int | None = None,
        units: int | None = None,
        free_nats: float = 3.0,
        kl_scale: float = 1.0,
        reconstruction_scale: float = 1.0,
        reward_scale: float = 1.0,
        continue_scale: float = 0.0,
        reward_unit: float = 1.0,
        discount: float = 0.99,
        lam: float = 0.95,
        imagine_length: int = 15,
        imagine_last: int = 0,
        entropy: float = 0.0,
        init_std: float = 5.0,
        exploration: float = 0.3,
        model_lr: float = 6e-4,
        actor_lr: float = 8e-5,
        critic_lr: float = 8e-5,
        clip: float = 100.0,
        average_rate: float = 0.0,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        given = {"deter": deter, "hidden": hidden, "stoch": stoch, "depth": depth, "units": units}
        w = choose_widths("DreamerV1", SIZES, size, given)
        rates = {"model_lr": model_lr, "actor_lr": actor_lr, "critic_lr": critic_lr}
        rates |= {"reward_unit": reward_unit, "init_std": init_std}
        reject_unless_positive("DreamerV1", **rates, clip=clip)
        reject_outside("DreamerV1", 2, math.inf, imagine_length=imagine_length)
        reject_outside("DreamerV1", 0, math.inf, imagine_last=imagine_last, free_nats=free_nats)
        reject_outside("DreamerV1", 0, math.inf, exploration=exploration, entropy=entropy)
        reject_outside("DreamerV1", 0, 1, discount=discount, lam=lam, average_rate=average_rate)
        self.loss_scales = {"reconstruction": reconstruction_scale, "reward": reward_scale}
        self.loss_scales |= {"kl": kl_scale, "actor": 1.0, "critic": 1.0}
        self.reward_unit = reward_unit
        self.free_nats, self.discount, self.lam = free_nats, discount, lam
        self.imagine_length, self.imagine_last = imagine_length, imagine_last
        self.entropy, self.exploration = entropy, exploration
        self.lrs, self.clip = (model_lr, actor_lr, critic_lr), clip

        latent, units = Gaussians(w["stoch"]), w["units"]
        vision = partial(StridedEncoder, depth=w["depth"], activation=nn.ReLU)
        self.encoder = Encoder(self.spec, vision, 3, units, ELU, squash=same)
        core = GRUCore(self.spec.action.encoded_size, w["stoch"], w["deter"], w["hidden"], ELU)
        self.rssm = RSSM(core, latent, self.encoder.size, w["hidden"], style=ELU)
        inputs = self.rssm.feature_size
        picture = partial(TransposedDecoder, features=inputs, depth=w["depth"], activation=nn.ReLU)
        self.decoder = Decoder(self.spec, inputs, picture, 3, units, ELU, UnitNormal)
        self.reward_head = ScalarHead(inputs, 2, units, ELU)
        if continue_scale:
            self.continue_head = BinaryHead(inputs, 3, units, ELU)
            self.loss_scales["continue"] = continue_scale
        box = partial(TanhNormal, init_std=init_std)
        self.actor = ActionHead(inputs, 4, units, self.spec.action, ELU, box, out_scale=None)
        self.critic = ScalarHead(inputs, 3, units, ELU)
        self.average_agent(average_rate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One loss for world model, actor and critic, whose parameters it trains apart."""
        # World model (equation 10)
        seen = self.filter(batch)
        losses = {key: value.mean() for key, value in self.prediction_losses(seen).items()}
        kl = seen.posterior.kl(seen.prior).mean()
        losses["kl"] = kl.clamp(min=self.free_nats)

        # Imagination: gradients flow through the dynamics, but train only the actor. Rewards,
        # values and targets are those of the H imagined states.
        with frozen(self.rssm, self.reward_head, self.continue_head):
            starts = seen.starts(self.imagine_last)
            dream, _, policies = self.dream(starts, self.imagine_length)
            imagined = features({key: states[:, 1:] for key, states in dream.items()})
            reward = self.reward_head(imagined).pred()
            discount = torch.full_like(reward, self.discount)
            if self.continue_head is not None:
                discount = self.continue_head(imagined).pred()
            value, learning_value = self.critic.apart(imagined)
            target = own_reward_targets(reward, value.pred(), discount, self.lam)
        # Nothing follows the end of an episode; the official code leaves out each sequence's last
        # step instead, the only one where an end can be.
        alive = (~seen.is_terminal[:, -self.imagine_last :]).flatten().unsqueeze(1)
        weight = arrival_weights(discount)[:, :-1]
        if self.continue_head is not None:
            weight = weight * alive

        # Behaviour (equations 7 and 8)
        objective = target
        if self.entropy:
            objective = objective + self.entropy * PolicySteps(policies[1:]).entropy()
        losses["actor"] = -(weight * objective).mean()
        losses["critic"] = (weight * learning_value[:, :-1].loss(target.detach())).mean()
        if self.logs_now:
            entropy = self.actor(imagined.detach()).entropy().mean()
            dreamed = {"policy_entropy": entropy, "dream_reward": reward.mean()}
            dreamed |= {"dream_return": target.mean(), "kl_nats": kl}
            self.log_metrics({**self.latent_metrics(seen), **dreamed})
        return self.total_loss(losses, self.loss_scales)

    def value(self, state: State) -> Tensor:
        """The critic's estimate of the return from states on."""
        return self.critic(features(state)).pred()

    def configure_optimizers(self) -> Optimizer:
        """Three Adams in one: model, actor and critic, each clipped by its own norm."""
        return ClippedAdam(self.parameter_groups(*self.lrs), self.clip, eps=1e-7)

    def choose(self, latent: State, actor: nn.Module | None, explore: bool) -> Tensor:
        """The policy's sample with exploration noise, or its mode."""
        action = super().choose(latent, actor, explore)
        return add_noise(action, self.exploration, self.spec.action) if explore else action
