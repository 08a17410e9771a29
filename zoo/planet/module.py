"""PlaNet (Hafner et al., "Learning Latent Dynamics for Planning from Pixels", ICML 2019).

A recurrent state-space model with a deterministic and a stochastic path learns from replayed
sequences; there is no policy: every action is planned anew by the cross-entropy method over dreams.
This file is the method from top to bottom; its deviations from the official code are listed in
README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.arguments import choose_widths, reject_outside, reject_unless_positive
from zoo.base import Batch, Obs, State
from zoo.nets.actions import add_noise
from zoo.nets.distributions import DiagonalNormal, UnitNormal
from zoo.nets.heads import BinaryHead, ScalarHead
from zoo.nets.layers import RELU
from zoo.nets.optim import ClippedAdam
from zoo.planning import CEM, continued_return, predicted_return
from zoo.rssm.cores import GRUCore
from zoo.rssm.dynamics import RSSM
from zoo.rssm.latents import Gaussians
from zoo.rssm.model import Filtered, LatentModel
from zoo.rssm.observations import Decoder, Encoder, pixels, same
from zoo.rssm.vision import StridedEncoder, TransposedDecoder

# `nano` is ours, for CPUs.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"deter": 64, "hidden": 64, "stoch": 16, "depth": 8, "units": 64},
    "paper": {"deter": 200, "hidden": 200, "stoch": 30, "depth": 32, "units": 300},
}


class PlaNet(
    LatentModel,
    repo_url="https://github.com/google-research/planet",
    paper_url="https://arxiv.org/abs/1811.04551",
):
    """PlaNet.

    Args:
        spec: observations (64x64 images and vectors in any mix) and actions (any kind).
        size: one of `SIZES`; single widths below override it.
        deter, hidden, stoch, depth, units: widths of h and of the RSSM's hidden layers, number of
            latents, channel multiplier, width of the MLPs.
        free_nats: KL divergence of each step that costs nothing, in nats.
        kl_scale, reconstruction_scale, reward_scale: weights of the losses.
        continue_scale: weight of a continue head's loss; 0 (as published) has none and plans as if
            episodes never ended.
        reward_unit: reward that counts as 1 inside of the model (ours; 1 as published).
        overshooting: largest distance D over which latent overshooting predicts; 0 (the default of
            the official code) and 1 are the standard bound.
        overshooting_scale: weight of the overshooting losses (their mean over distances 2 to D).
        bits: bits per colour to which images are reduced, with noise in the gaps.
        horizon, iterations, candidates, elites: of the cross-entropy method.
        plan_means: plan over dreams in which each z is the mean of its prior instead of a sample
            (ours): scores are noisy, and few elites do not average the noise away.
        deterministic, stochastic: ablations (section 5): with False, h remembers nothing, or z has
            no noise (see `RSSM`).
        exploration: standard deviation of the noise on box actions, or probability of a random
            discrete action.
        lr: Adam's learning rate.
        clip: largest gradient norm.
    """

    name: ClassVar[str] = "planet"

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
        reward_scale: float = 10.0,
        continue_scale: float = 0.0,
        reward_unit: float = 1.0,
        overshooting: int = 0,
        overshooting_scale: float = 1.0,
        bits: int = 5,
        horizon: int = 12,
        iterations: int = 10,
        candidates: int = 1000,
        elites: int = 100,
        plan_means: bool = False,
        deterministic: bool = True,
        stochastic: bool = True,
        exploration: float = 0.3,
        lr: float = 1e-3,
        clip: float = 1000.0,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        given = {"deter": deter, "hidden": hidden, "stoch": stoch, "depth": depth, "units": units}
        w = choose_widths("PlaNet", SIZES, size, given)
        reject_unless_positive("PlaNet", lr=lr, clip=clip, reward_unit=reward_unit)
        reject_outside("PlaNet", 0, math.inf, free_nats=free_nats, overshooting=overshooting)
        reject_outside("PlaNet", 0, math.inf, exploration=exploration)
        if not 1 <= bits <= 8:
            raise UserError(f"PlaNet needs bits from 1 to 8, got {bits}")
        self.loss_scales = {"reconstruction": reconstruction_scale, "reward": reward_scale}
        self.loss_scales["kl"] = kl_scale
        self.free_nats, self.bits, self.exploration = free_nats, bits, exploration
        self.overshooting, self.reward_unit = overshooting, reward_unit
        if overshooting > 1:
            self.loss_scales["overshooting"] = overshooting_scale
        self.lr, self.clip = lr, clip
        self.plan_means = plan_means
        self.planner = CEM(
            horizon=horizon, iterations=iterations, candidates=candidates, elites=elites
        )

        units = w["units"]
        vision = partial(StridedEncoder, depth=w["depth"], activation=nn.ReLU)
        self.encoder = Encoder(self.spec, vision, 3, units, RELU, squash=same)
        action_size = self.spec.action.encoded_size
        core = GRUCore(action_size, w["stoch"], w["deter"], w["hidden"], RELU, gate_bias=1.0)
        self.rssm = RSSM(
            core,
            Gaussians(w["stoch"]),
            self.encoder.size,
            w["hidden"],
            style=RELU,
            deterministic=deterministic,
            stochastic=stochastic,
        )
        inputs = self.rssm.feature_size
        picture = partial(TransposedDecoder, features=inputs, depth=w["depth"], activation=nn.ReLU)
        self.decoder = Decoder(self.spec, inputs, picture, 3, units, RELU, UnitNormal)
        self.reward_head = ScalarHead(inputs, 3, units, RELU)
        if continue_scale:
            self.continue_head = BinaryHead(inputs, 3, units, RELU)
            self.loss_scales["continue"] = continue_scale

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The variational bound (equation 3), with rewards; the model is all that learns."""
        seen = self.filter(batch)
        losses = {key: value.mean() for key, value in self.prediction_losses(seen).items()}
        kl = seen.posterior.kl(seen.prior)
        losses["kl"] = (kl - self.free_nats).clamp(min=0).mean()
        if self.overshooting > 1:
            losses["overshooting"] = self._overshoot(seen, self.actions.encode(batch["action"]))
        if self.logs_now:
            self.log_metrics({**self.latent_metrics(seen), "kl_nats": kl.mean()})
        return self.total_loss(losses, self.loss_scales)

    def _overshoot(self, seen: Filtered, action: Tensor) -> Tensor:
        """Latent overshooting (equation 7): priors d = 2 .. D steps ahead against posteriors.

        All starts roll out as one batch. Targets beyond the end of the sequence or of the episode
        are left out; posteriors are constants, as in the official code.

        Args:
            seen: T filtered steps.
            action: (B, T + 1, A) encoded, the context's first.
        """
        length = seen.reward.shape[1]
        distance = max(1, min(self.overshooting, length - 1))
        steps = torch.arange(length, device=action.device)
        ahead = (steps[:, None] + 1 + torch.arange(distance, device=action.device)).clamp(
            max=length - 1
        )  # (T, D): the step that each start predicts at each distance
        chosen = action[:, 1:][:, ahead - 1].flatten(0, 1)
        starts = {key: value.flatten(0, 1) for key, value in seen.states.items()}
        dream, _ = self.rssm.imagine(starts, lambda state, t: chosen[:, t], distance)
        prior = self.rssm.prior(dream["deter"][:, 1:])
        posterior = seen.posterior.detach()
        assert isinstance(posterior, DiagonalNormal) and isinstance(prior, DiagonalNormal)
        target = DiagonalNormal(
            posterior.mean[:, ahead].flatten(0, 1), posterior.std[:, ahead].flatten(0, 1)
        )
        inside = steps[:, None] + 1 + torch.arange(distance, device=action.device) < length
        episode = seen.is_first.cumsum(1)
        valid = inside & (episode[:, ahead] == episode[:, :, None])  # (B, T, D)
        kl = (target.kl(prior) - self.free_nats).clamp(min=0)[:, 1:]
        mask = valid.flatten(0, 1)[:, 1:].float()
        return (kl * mask).sum() / mask.sum().clamp(min=1)

    def configure_optimizers(self) -> Optimizer:
        """Adam with a clipped gradient norm."""
        return ClippedAdam([{"params": list(self.parameters()), "lr": self.lr}], self.clip, 1e-4)

    def preprocess(self, obs: Obs) -> dict[str, Tensor]:
        """Images with fewer bits, and uniform noise to make them continuous again, in [0, 1]."""
        bins = 2**self.bits
        result = dict(obs)
        for key in self.spec.images:
            levels = (pixels(obs[key]) * 255 * bins / 256).floor()
            result[key] = (levels + torch.rand_like(levels)) / bins
        return result

    def choose(self, latent: State, actor: nn.Module | None, explore: bool) -> Tensor:
        """Plans, and takes the first action of the plan; with noise when exploring."""
        score = predicted_return if self.continue_head is None else continued_return
        dreams = SimpleNamespace(imagine=partial(self.imagine, sample=not self.plan_means))
        plan = self.planner.plan(dreams, latent, self.actions, score=score)
        action = self.actions.encode(plan.action[:, 0])
        return add_noise(action, self.exploration, self.spec.action) if explore else action
