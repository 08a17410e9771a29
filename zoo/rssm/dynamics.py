"""The recurrent state-space model: sequence model, dynamics predictor, representation.

h_t = f(h_{t-1}, z_{t-1}, a_{t-1});  prior p(z_t | h_t);  posterior q(z_t | h_t, x_t)
(PlaNet, section 3; DreamerV3, world model learning). A state is {"deter": h (N, D), "stoch": z
(N, S, C)}. What differs between the papers is passed in: the core f, the kind of z, the layers.

Nothing is computed inside the time loops that can be computed outside: action and token
projections, priors of observed sequences, random numbers and derived forms of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nets.distributions import Latent
from zoo.nets.layers import MLP, RMS_SILU, Style
from zoo.rssm.cores import Core
from zoo.rssm.latents import LatentKind

State = dict[str, Tensor]


class RSSM(nn.Module):
    """Recurrent state-space model.

    Args:
        core: the deterministic path, a module.
        latent: the kind of z.
        token_size: width of the encoder's output.
        hidden: width of the hidden layers of prior and posterior.
        prior_layers: hidden layers of the prior.
        style: how layers are built.
        deterministic: with False, h is computed from z_{t-1} and a_{t-1} alone and remembers
            nothing: all memory has to pass through z.
        stochastic: with False, z is the mode of its distribution instead of a sample.
    """

    core: Core

    def __init__(
        self,
        core: Core,
        latent: LatentKind,
        token_size: int,
        hidden: int,
        prior_layers: int = 1,
        style: Style = RMS_SILU,
        deterministic: bool = True,
        stochastic: bool = True,
    ) -> None:
        super().__init__()
        self.core, self.latent = core, latent
        self.deter = core.deter
        self.deterministic, self.stochastic = deterministic, stochastic
        self.prior_net = nn.Sequential(
            MLP(self.deter, prior_layers, hidden, style), style.linear(hidden, latent.outputs)
        )
        self.posterior_in = style.linear(self.deter + token_size, hidden)
        self.posterior_activation = style.activation(hidden)
        self.posterior_out = style.linear(hidden, latent.outputs)

    @property
    def feature_size(self) -> int:
        """Width of `features`."""
        stoch, classes = self.latent.shape
        return self.deter + stoch * classes

    def initial(self, batch_size: int) -> State:
        """The state before an episode: zeros."""
        weight = self.posterior_in.weight
        return {
            "deter": weight.new_zeros(batch_size, self.deter),
            "stoch": weight.new_zeros(batch_size, *self.latent.shape),
        }

    def prior(self, deter: Tensor) -> Latent:
        """The dynamics predictor p(z | h) for deter (..., D)."""
        return self.latent(self.prior_net(deter))

    def observe(
        self, state: State, tokens: Tensor, actions: Tensor, is_first: Tensor
    ) -> tuple[State, Latent]:
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
        action_in = self.core.embed_actions(actions * keep).unbind(1)
        weight_h, weight_x = self.posterior_in.weight.split([self.deter, tokens.shape[-1]], 1)
        token_in = F.linear(tokens, weight_x, self.posterior_in.bias).unbind(1)
        noise = self.latent.noise(length, len(tokens), device=tokens.device).unbind(0)
        weights = self.core.weights()
        keeps = keep.unbind(1)
        remembers = keeps if self.deterministic else (0.0,) * length
        deter, stoch = state["deter"], state["stoch"].flatten(1)
        deters, stochs, posteriors = [], [], []
        for t in range(length):
            deter = self.core.step(deter * remembers[t], stoch * keeps[t], action_in[t], weights)
            x = self.posterior_activation(torch.addmm(token_in[t], deter, weight_h.t()))
            posterior = self.latent(self.posterior_out(x))
            sample = posterior.sample(noise[t]) if self.stochastic else posterior.mode()
            stoch = sample.flatten(1)
            deters.append(deter)
            stochs.append(sample)
            posteriors.append(posterior)
        states = {"deter": torch.stack(deters, 1), "stoch": torch.stack(stochs, 1)}
        return states, type(posteriors[0]).stack(posteriors)

    def imagine(
        self,
        state: State,
        policy: Callable[[State, int], Tensor],
        horizon: int,
        sample: bool = True,
    ) -> tuple[State, Tensor]:
        """Rolls out the prior.

        Args:
            state: start states (N, ...).
            policy: encoded action (N, A) for a state at a step number.
            horizon: number H of actions.
            sample: with False, each z is the mode of its prior.

        Returns:
            The states (N, H + 1, ...) beginning with the start, and the actions (N, H, A).
        """
        deter, stoch = state["deter"], state["stoch"]
        stochastic = self.stochastic and sample
        noise = self.latent.noise(horizon, len(deter), device=deter.device).unbind(0)
        weights = self.core.weights()
        deters, stochs, actions = [deter], [stoch], []
        for t in range(horizon):
            action = policy({"deter": deter, "stoch": stoch}, t)
            memory = deter if self.deterministic else torch.zeros_like(deter)
            action_in = self.core.embed_actions(action)
            deter = self.core.step(memory, stoch.flatten(1), action_in, weights)
            prior = self.prior(deter)
            stoch = prior.sample(noise[t]) if stochastic else prior.mode()
            deters.append(deter)
            stochs.append(stoch)
            actions.append(action)
        states = {"deter": torch.stack(deters, 1), "stoch": torch.stack(stochs, 1)}
        return states, torch.stack(actions, 1)


def features(state: State) -> Tensor:
    """What heads read: [h, flattened z], (..., D + S * C)."""
    return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)


def kl_losses(posterior: Latent, prior: Latent) -> tuple[Tensor, Tensor]:
    """The two sides of the KL divergence, equal in value (Dreamer V2, algorithm 2).

    Returns:
        KL(sg(posterior) || prior), which trains the prior, and KL(posterior || sg(prior)), which
        trains the representation, each (B, T) in nats. The gradient of their sum is that of the
        whole KL(posterior || prior).
    """
    return posterior.detach().kl(prior), posterior.kl(prior.detach())
