"""Behaviour learning in imagination: actor and critic losses as pure functions.

Dreamers V1 and V2 count the reward of arriving in a state into that state's own value; DreamerV3's
value begins with the next reward. Rollouts have H + 1 states (the first is real) and H actions;
`reward[:, t]` and `discount[:, t]` belong to state t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.nets.distributions import Policy, Scalar
from zoo.returns import ReturnNormalizer, lambda_returns

# Dreamers V1 and V2


def own_reward_targets(reward: Tensor, value: Tensor, discount: Tensor, lam: float) -> Tensor:
    """Lambda-targets V_t = r_t + d_t ((1 - lam) v_{t+1} + lam V_{t+1}), with V_H = v_H.

    (Dreamer V1, equation 6, by recursion; Dreamer V2, equation 4.)

    Args:
        reward, discount: (N, H) of the first H states (those of the last would not be used); the
            discount is gamma, 0 where the episode ends.
        value: (N, H + 1) of each state.
        lam: lambda in [0, 1].

    Returns:
        (N, H) targets of the first H states.
    """
    first, length = torch.zeros_like(value[:, :1]), value.shape[1] - 1
    reward, discount = (torch.cat([first, x[:, :length]], 1) for x in (reward, discount))
    return lambda_returns(reward, value, discount, None, lam)


def arrival_weights(discount: Tensor) -> Tensor:
    """Probability, discounted, to get to each state: 1, d_0, d_0 d_1, ... (N, H + 1), detached."""
    shifted = torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-1]], 1)
    return torch.cumprod(shifted, 1).detach()


def mixed_objective(
    policy: Policy, action: Tensor, target: Tensor, baseline: Tensor, mix: float
) -> Tensor:
    """What the actor of Dreamer V2 maximises, without entropy and weights (equation 6).

    Args:
        policy: distributions (N, K) in the states where actions were chosen.
        action: (N, K, A) encoded actions.
        target: (N, K) lambda-targets of the states the actions led to, with gradients through the
            dynamics.
        baseline: (N, K) values of the states where actions were chosen.
        mix: 1 - rho: 0 is REINFORCE alone, 1 back-propagation through the dynamics alone.
    """
    objective = torch.zeros_like(target)
    if mix:
        objective = objective + mix * target
    if mix < 1:
        advantage = (target - baseline).detach()
        objective = objective + (1 - mix) * policy.log_prob(action.detach()) * advantage
    return objective


# DreamerV3


class ImaginationLosses(NamedTuple):
    """Losses (N, H) of actor and critic, and the lambda-returns (N, H) they learn from."""

    policy: Tensor
    value: Tensor
    returns: Tensor


def imagination_losses(
    policy: Policy,
    value: Scalar,
    slow_value: Scalar | None,
    action: Tensor,
    reward: Tensor,
    cont: Tensor,
    normalizer: ReturnNormalizer,
    *,
    discount: float,
    lam: float,
    entropy: float,
    slow_regularizer: float,
) -> ImaginationLosses:
    """REINFORCE with normalised returns, and the two-hot critic (DreamerV3).

    Rollouts have H + 1 states (the first is real) and H actions.

    Args:
        policy: distribution at the first H states.
        value, slow_value: critics at all H + 1 states; the online one gives the bootstrap values,
            the slow one only regularises (None where its weight is zero).
        action: (N, H, A) encoded actions taken.
        reward: (N, H + 1) predicted on arriving.
        cont: (N, H + 1) predicted probability to continue; times the discount it is the discount.
        discount: extra factor per step; 1 where `cont` was trained to contain it (contdisc).
        lam, entropy, slow_regularizer: lambda, entropy scale, weight of the slow critic's loss.
    """
    with torch.no_grad():
        values = value.pred()
        factors = cont * discount
        returns = lambda_returns(reward, values, factors, None, lam)
        normalizer.update(returns)
        advantage = (returns - values[:, :-1]) / normalizer.scale
        # The weight of a state is the probability to get there, its own continuation included.
        weight = torch.cumprod(factors, 1)[:, :-1] / discount
    policy_loss = -weight * (policy.log_prob(action) * advantage + entropy * policy.entropy())
    value_loss = _critic_loss(value, slow_value, returns, slow_regularizer)
    return ImaginationLosses(policy_loss, weight * value_loss, returns)


def replay_value_loss(
    value: Scalar,
    slow_value: Scalar | None,
    bootstrap: Tensor,
    reward: Tensor,
    is_terminal: Tensor,
    is_last: Tensor,
    *,
    discount: float,
    lam: float,
    slow_regularizer: float,
) -> Tensor:
    """Critic loss (B, T - 1) on real sequences; its gradient also shapes the world model.

    Lambda-returns over the rewards of the replay, bootstrapped at each step from the imagined
    return that starts there (DreamerV3, Methods, "Critic learning"; scale 0.3).

    Args:
        value, slow_value: critics at the T posterior states.
        bootstrap: (B, T) imagined lambda-returns.
        reward, is_terminal, is_last: (B, T) of the replayed steps.
        discount, lam, slow_regularizer: as above.
    """
    live = (~is_terminal).float() * discount
    returns = lambda_returns(reward, bootstrap, live, is_last, lam)
    loss = _critic_loss(value, slow_value, returns, slow_regularizer)
    # After the last step of a recording comes another episode: nothing to learn there.
    return loss * (~is_last[:, :-1]).float()


def _critic_loss(
    value: Scalar, slow_value: Scalar | None, returns: Tensor, slow_regularizer: float
) -> Tensor:
    """Towards the returns, and a little towards the slow critic's own predictions."""
    critic = value[:, :-1]
    loss = critic.loss(returns)
    if slow_value is not None:
        loss = loss + slow_regularizer * critic.loss(slow_value.pred()[:, :-1])
    return loss
