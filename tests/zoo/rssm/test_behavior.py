"""Actor and critic losses against numpy loops over small hand-made rollouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.nets.distributions import Categorical, TwoHot, symexp_bins
from zoo.returns import ReturnNormalizer
from zoo.rssm.behavior import imagination_losses, replay_value_loss

BINS = symexp_bins(7, 3.0)
ROWS, HORIZON, LAM, ENTROPY = 2, 3, 0.9, 0.01


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expectation(x: np.ndarray) -> np.ndarray:
    return (np.exp(log_softmax(x)) * BINS.numpy()).sum(-1)


def cross_entropy(x: np.ndarray, target: float) -> float:
    bins = BINS.numpy()
    above = int(np.clip(np.searchsorted(bins, target), 1, len(bins) - 1))
    share = (np.clip(target, bins[0], bins[-1]) - bins[above - 1]) / (bins[above] - bins[above - 1])
    log_probs = log_softmax(x)
    return float(-(1 - share) * log_probs[above - 1] - share * log_probs[above])


def rollout() -> dict[str, Tensor]:
    action = torch.tensor([[0, 1, 2], [2, 2, 0]])
    return {
        "policy": logits(0, ROWS, HORIZON, 3),
        "value": logits(1, ROWS, HORIZON + 1, 7),
        "slow": logits(2, ROWS, HORIZON + 1, 7),
        "action": torch.nn.functional.one_hot(action, 3).float(),
        "reward": logits(3, ROWS, HORIZON + 1),
        "cont": torch.tensor([[0.9, 0.8, 0.5, 0.99], [0.1, 0.99, 0.7, 0.6]]),
    }


def losses(data: dict[str, Tensor], normalizer: ReturnNormalizer, discount: float, slow: float):
    return imagination_losses(
        Categorical(data["policy"], (3,)),
        TwoHot(data["value"], BINS),
        TwoHot(data["slow"], BINS) if slow else None,
        data["action"],
        data["reward"],
        data["cont"],
        normalizer,
        discount=discount,
        lam=LAM,
        entropy=ENTROPY,
        slow_regularizer=slow,
    )


@pytest.mark.parametrize("discount", [1.0, 0.8], ids=["contdisc", "discount beside"])
@pytest.mark.parametrize("slow", [0.0, 0.5])
def test_imagination_losses_equal_the_loop(discount: float, slow: float) -> None:
    data = rollout()
    normalizer = ReturnNormalizer(rate=1.0, floor=0.1)
    found = losses(data, normalizer, discount, slow)

    d = {key: value.double().numpy() for key, value in data.items()}
    values = expectation(d["value"])
    returns = np.zeros((ROWS, HORIZON))
    for n in range(ROWS):
        following = values[n, -1]
        for t in reversed(range(HORIZON)):
            mixed = (1 - LAM) * values[n, t + 1] + LAM * following
            following = d["reward"][n, t + 1] + discount * d["cont"][n, t + 1] * mixed
            returns[n, t] = following
    scale = np.percentile(returns, 95) - np.percentile(returns, 5)
    assert scale > 0.1
    policy, value = np.zeros_like(returns), np.zeros_like(returns)
    for n in range(ROWS):
        for t in range(HORIZON):
            # The root's own continuation counts; of the discounts only those of later steps.
            weight = np.prod(d["cont"][n, : t + 1]) * discount**t
            log_probs = log_softmax(d["policy"][n, t])
            entropy = -(np.exp(log_probs) * log_probs).sum()
            log_prob = (log_probs * d["action"][n, t]).sum()
            advantage = (returns[n, t] - values[n, t]) / scale
            policy[n, t] = -weight * (log_prob * advantage + ENTROPY * entropy)
            critic = cross_entropy(d["value"][n, t], returns[n, t])
            critic += slow * cross_entropy(d["value"][n, t], expectation(d["slow"][n, t]))
            value[n, t] = weight * critic
    np.testing.assert_allclose(found.returns, returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.policy, policy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.value, value, rtol=1e-4, atol=1e-5)


def test_returns_are_normalised_with_the_batch_they_come_from() -> None:
    normalizer = ReturnNormalizer(rate=0.5, floor=1e-6)
    found = losses(rollout(), normalizer, 1.0, 1.0)
    low, high = np.percentile(found.returns.numpy(), [5, 95])
    assert normalizer.scale.item() == pytest.approx(0.5 * (high - low), rel=1e-4)


def test_actor_and_critic_learn_apart() -> None:
    data = rollout()
    for key in ("policy", "value", "slow", "reward", "cont"):
        data[key].requires_grad_()
    found = losses(data, ReturnNormalizer(), 1.0, 1.0)
    wrt = [data[key] for key in ("policy", "value", "slow", "reward", "cont")]
    grads = torch.autograd.grad(found.policy.sum(), wrt, allow_unused=True, retain_graph=True)
    assert [g is not None for g in grads] == [True, False, False, False, False]
    grads = torch.autograd.grad(found.value.sum(), wrt, allow_unused=True)
    assert [g is not None for g in grads] == [False, True, False, False, False]
    assert grads[1] is not None
    assert (grads[1][:, -1] == 0).all()  # the last state only bootstraps
    assert not found.returns.requires_grad


def test_good_actions_become_more_likely() -> None:
    data = rollout()
    data["policy"].requires_grad_()
    found = losses(data, ReturnNormalizer(), 1.0, 0.0)
    advantage = found.returns - TwoHot(data["value"], BINS).pred()[:, :-1]
    (grad,) = torch.autograd.grad(found.policy.sum(), data["policy"])
    step = (grad * data["action"]).sum(-1)  # of the logit of the action taken
    large = advantage.abs() > 0.2  # where the entropy bonus does not matter
    assert large.any()
    assert torch.equal(step[large] < 0, advantage[large] > 0)


def test_replay_value_loss_equals_the_loop() -> None:
    discount, slow = 0.9, 0.7
    value, slow_value = logits(4, ROWS, 5, 7), logits(5, ROWS, 5, 7)
    bootstrap, reward = logits(6, ROWS, 5), logits(7, ROWS, 5)
    terminal = torch.zeros(ROWS, 5, dtype=torch.bool)
    last = torch.zeros(ROWS, 5, dtype=torch.bool)
    terminal[0, 2] = last[0, 2] = True  # an episode ends
    last[1, 1] = True  # another one is cut off
    found = replay_value_loss(
        TwoHot(value, BINS),
        TwoHot(slow_value, BINS),
        bootstrap,
        reward,
        terminal,
        last,
        discount=discount,
        lam=LAM,
        slow_regularizer=slow,
    )
    expected = np.zeros((ROWS, 4))
    for n in range(ROWS):
        following = bootstrap[n, -1].item()
        for t in reversed(range(4)):
            share = 0.0 if last[n, t + 1] else LAM
            mixed = (1 - share) * bootstrap[n, t + 1].item() + share * following
            alive = 0.0 if terminal[n, t + 1] else discount
            following = reward[n, t + 1].item() + alive * mixed
            if not last[n, t]:
                row = value[n, t].double().numpy()
                target = expectation(slow_value[n, t].double().numpy())
                expected[n, t] = cross_entropy(row, following) + slow * cross_entropy(row, target)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[0, 2], found[1, 1]) == (0, 0)
