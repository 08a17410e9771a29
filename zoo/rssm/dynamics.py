"""The recurrent state-space model of DreamerV3: sequence model, dynamics predictor, representation.

h_t = f(h_{t-1}, z_{t-1}, a_{t-1});  prior p(z_t | h_t);  posterior q(z_t | h_t, x_t)
(DreamerV3, world model learning). A state is {"deter": h (N, D), "stoch": z (N, S, C) one-hot}.

Nothing is computed inside the time loops that can be computed outside: action and token
projections, priors of observed sequences, random numbers and the dense forms of block weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.block_gru import BlockGRU
from zoo.nets.distributions import OneHot, unimix
from zoo.nets.layers import MLP, Dense, Linear, RMSNormSiLU, norm_silu

State = dict[str, Tensor]


class RSSM(nn.Module):
    """Recurrent state-space model with categorical latents.

    Args:
        action_size: width of the encoded action.
        token_size: width of the encoder's output.
        deter: width D of the deterministic state.
        hidden: width of the hidden layers.
        stoch: number S of categoricals.
        classes: number C of classes of each.
        blocks: number of blocks of the recurrent weights.
        unimix: share of the uniform distribution in prior and posterior.
    """

    def __init__(
        self,
        action_size: int,
        token_size: int,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        blocks: int = 8,
        unimix: float = 0.01,
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.classes, self.unimix = deter, stoch, classes, unimix
        sizes = (deter, stoch * classes, action_size)
        self.deter_in, self.stoch_in, self.action_in = (Dense(size, hidden) for size in sizes)
        self.gru = BlockGRU(3 * hidden, deter, blocks)
        self.prior_net = nn.Sequential(MLP(deter, 2, hidden), Linear(hidden, stoch * classes))
        self.posterior_in = Linear(deter + token_size, hidden)
        self.posterior_norm = RMSNormSiLU(hidden)
        self.posterior_out = Linear(hidden, stoch * classes)

    def initial(self, batch_size: int) -> State:
        """The state before an episode: zeros."""
        weight = self.posterior_in.weight
        return {
            "deter": weight.new_zeros(batch_size, self.deter),
            "stoch": weight.new_zeros(batch_size, self.stoch, self.classes),
        }

    def distribution(self, logits: Tensor) -> OneHot:
        """Logits (..., S * C) as latents with uniform mixture."""
        shape = (*logits.shape[:-1], self.stoch, self.classes)
        return OneHot(unimix(logits.view(shape), self.unimix))

    def prior(self, deter: Tensor) -> OneHot:
        """The dynamics predictor p(z | h) for deter (..., D)."""
        return self.distribution(self.prior_net(deter))

    def observe(
        self, state: State, tokens: Tensor, actions: Tensor, is_first: Tensor
    ) -> tuple[State, OneHot]:
        """Filters a sequence.

        Args:
            state: the state before the first step, (B, ...).
            tokens: (B, T, E) encoded observations.
            actions: (B, T, A) encoded action taken *before* each step.
            is_first: (B, T) bool; state and action are zeroed where an episode begins.

        Returns:
            The states (B, T, ...) with sampled posteriors, and the posterior distributions.
        """
        length = tokens.shape[1]
        keep = (~is_first).to(tokens.dtype).unsqueeze(-1)
        action_in = self._embed_actions(actions * keep).unbind(1)
        weight_h, weight_x = self.posterior_in.weight.split([self.deter, tokens.shape[-1]], 1)
        token_in = F.linear(tokens, weight_x, self.posterior_in.bias).unbind(1)
        noise = torch.rand(length, len(tokens), self.stoch, 1, device=tokens.device).unbind(0)
        weights = self._rollout_weights()
        keeps = keep.unbind(1)
        deter, stoch = state["deter"], state["stoch"].flatten(1)
        deters, stochs, probs = [], [], []
        for t in range(length):
            deter = self._advance(deter * keeps[t], stoch * keeps[t], action_in[t], weights)
            x = self.posterior_norm(torch.addmm(token_in[t], deter, weight_h.t()))
            posterior = self.distribution(self.posterior_out(x))
            sample = posterior.sample(noise[t])
            stoch = sample.flatten(1)
            deters.append(deter)
            stochs.append(sample)
            probs.append(posterior.probs)
        states = {"deter": torch.stack(deters, 1), "stoch": torch.stack(stochs, 1)}
        return states, OneHot(torch.stack(probs, 1))

    def imagine(
        self, state: State, policy: Callable[[State, int], Tensor], horizon: int
    ) -> tuple[State, Tensor]:
        """Rolls out the prior.

        Args:
            state: start states (N, ...).
            policy: encoded action (N, A) for a state at a step number.
            horizon: number H of actions.

        Returns:
            The states (N, H + 1, ...) beginning with the start, and the actions (N, H, A).
        """
        deter, sample = state["deter"], state["stoch"]
        noise = torch.rand(horizon, len(deter), self.stoch, 1, device=deter.device).unbind(0)
        weights = self._rollout_weights()
        deters, stochs, actions = [deter], [sample], []
        for t in range(horizon):
            action = policy({"deter": deter, "stoch": sample}, t)
            deter = self._advance(deter, sample.flatten(1), self._embed_actions(action), weights)
            sample = self.prior(deter).sample(noise[t])
            deters.append(deter)
            stochs.append(sample)
            actions.append(action)
        states = {"deter": torch.stack(deters, 1), "stoch": torch.stack(stochs, 1)}
        return states, torch.stack(actions, 1)

    def _rollout_weights(self) -> _RolloutWeights:
        denses = (self.deter_in, self.stoch_in, self.action_in)
        norms = torch.stack([dense.norm.weight for dense in denses])
        return _RolloutWeights(norms, self.gru.weights())

    def _embed_actions(self, actions: Tensor) -> Tensor:
        return self.action_in.linear(actions / actions.abs().clamp(min=1.0).detach())

    def _advance(
        self, deter: Tensor, stoch: Tensor, action_in: Tensor, weights: _RolloutWeights
    ) -> Tensor:
        parts = [self.deter_in.linear(deter), self.stoch_in.linear(stoch), action_in]
        # The three inputs are normalised apart, but in one call.
        inputs = norm_silu(torch.stack(parts, 1), weights.norms).flatten(1)
        return self.gru.step(inputs, deter, weights.gru)


class _RolloutWeights(NamedTuple):
    """What is derived from the weights once for a whole rollout."""

    norms: Tensor
    gru: tuple[Tensor, ...]


def features(state: State) -> Tensor:
    """What heads read: [h, flattened z], (..., D + S * C)."""
    return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)


def kl_losses(posterior: OneHot, prior: OneHot, free_nats: float) -> tuple[Tensor, Tensor]:
    """The dynamics and representation losses max(free_nats, KL) per step (DreamerV3).

    Returns:
        KL(sg(posterior) || prior) and KL(posterior || sg(prior)), each (B, T) and clipped
        elementwise after the sum over latents.
    """
    dynamics = posterior.detach().kl(prior)
    representation = posterior.kl(prior.detach())
    return dynamics.clamp(min=free_nats), representation.clamp(min=free_nats)
