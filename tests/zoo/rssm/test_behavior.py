"""Actor and critic losses against numpy loops over small hand-made rollouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.nets.distributions import BoundedNormal, Categorical, TwoHot, symexp_bins
from zoo.returns import ReturnNormalizer
from zoo.rssm.behavior import (
    arrival_weights,
    imagination_losses,
    mixed_objective,
    own_reward_targets,
    replay_value_loss,
)

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


class TestOwnRewardTargets:
    """Dreamers V1 and V2: the reward of arriving in a state belongs to its own value."""

    REWARD = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    VALUE = torch.tensor([[10.0, 20.0, 30.0, 40.0]])

    def test_four_states_by_hand(self) -> None:
        discount = torch.full((1, 4), 0.5)
        found = own_reward_targets(self.REWARD, self.VALUE, discount, 0.5)
        third = 3 + 0.5 * 40
        second = 2 + 0.5 * (0.5 * 30 + 0.5 * third)
        first = 1 + 0.5 * (0.5 * 20 + 0.5 * second)
        assert found.tolist() == [[first, second, third]] == [[9.8125, 15.25, 23.0]]
        assert arrival_weights(discount).tolist() == [[1.0, 0.5, 0.25, 0.125]]

    def test_nothing_comes_after_the_end_of_an_episode(self) -> None:
        discount = torch.tensor([[0.5, 0.0, 0.8, 0.9]])  # the second state is terminal
        found = own_reward_targets(self.REWARD, self.VALUE, discount, 0.5)
        # The reward of arriving there still counts.
        torch.testing.assert_close(found, torch.tensor([[1 + 0.5 * (10 + 1), 2.0, 3 + 0.8 * 40]]))
        torch.testing.assert_close(arrival_weights(discount), torch.tensor([[1.0, 0.5, 0.0, 0.0]]))

    def test_what_has_no_influence(self) -> None:
        discount = torch.tensor([[0.5, 0.6, 0.8, 0.9]])
        base = own_reward_targets(self.REWARD, self.VALUE, discount, 0.5)
        reward, value, later = self.REWARD.clone(), self.VALUE.clone(), discount.clone()
        # The reward and the discount of the last state are part of its value; a state's own value
        # is what its target is for.
        reward[0, -1] = value[0, 0] = later[0, -1] = 99.0
        assert torch.equal(own_reward_targets(reward, value, later, 0.5), base)
        assert torch.equal(arrival_weights(later), arrival_weights(discount))

    @pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
    def test_is_the_weighted_average_of_the_paper(self, lam: float) -> None:
        """Dreamer V1, equations 5 and 6, with n-step returns cut at the horizon."""
        horizon, gamma = 5, 0.9
        reward, value = logits(8, 1, horizon).double(), logits(9, 1, horizon).double()
        discount = torch.full_like(reward, gamma)

        def steps(start: int, count: int) -> float:
            end = min(start + count, horizon - 1)
            total = sum(gamma ** (n - start) * reward[0, n].item() for n in range(start, end))
            return total + gamma ** (end - start) * value[0, end].item()

        found = own_reward_targets(reward, value, discount, lam)
        assert found.shape == (1, horizon - 1)
        for t in range(horizon - 1):
            average = (1 - lam) * sum(lam ** (n - 1) * steps(t, n) for n in range(1, horizon))
            average += lam ** (horizon - 1) * steps(t, horizon)
            assert found[0, t].item() == pytest.approx(average)

    def test_gradients_flow_through_rewards_values_and_discounts(self) -> None:
        discount = torch.tensor([[0.5, 0.6, 0.8, 0.9]], requires_grad=True)
        reward, value = (x.clone().requires_grad_() for x in (self.REWARD, self.VALUE))
        target = own_reward_targets(reward, value, discount, 0.5)
        to_reward, to_value, to_discount = torch.autograd.grad(
            target[0, 0], (reward, value, discount)
        )
        expected = torch.tensor([[1.0, 0.5 * 0.5, 0.25 * 0.6 * 0.5, 0.0]])
        torch.testing.assert_close(to_reward, expected)
        last = 0.25 * 0.6 * 0.5 * 0.8
        expected = torch.tensor([[0.0, 0.5 * 0.5, 0.25 * 0.6 * 0.5, last]])
        torch.testing.assert_close(to_value, expected)
        assert (to_discount[0, :3] > 0).all()
        assert to_discount[0, 3] == 0
        assert not arrival_weights(discount).requires_grad


class TestMixedObjective:
    MIXES = (0.0, 0.1, 1.0)
    ACTION = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the policy, target, baseline."""
        parts = logits(10, 1, 2, 3), torch.tensor([[1.5, -0.5]]), torch.tensor([[1.0, 1.0]])
        return tuple(part.requires_grad_() for part in parts)  # type: ignore[return-value]

    @pytest.mark.parametrize("mix", MIXES)
    def test_value_and_gradients(self, mix: float) -> None:
        raw, target, baseline = self.parts()
        found = mixed_objective(Categorical(raw, (3,)), self.ACTION, target, baseline, mix)
        log_prob = (raw.log_softmax(-1) * self.ACTION).sum(-1)
        advantage = torch.tensor([[0.5, -1.5]])
        torch.testing.assert_close(found, mix * target + (1 - mix) * log_prob * advantage)
        wrt = (raw, target, baseline)
        to_raw, to_target, to_baseline = torch.autograd.grad(
            found.sum(), wrt, allow_unused=True, retain_graph=True
        )
        assert to_baseline is None
        if mix:
            torch.testing.assert_close(to_target, torch.full((1, 2), mix))
        else:
            assert to_target is None  # the advantage is a constant
        if mix < 1:
            (expected,) = torch.autograd.grad(((1 - mix) * log_prob * advantage).sum(), raw)
            torch.testing.assert_close(to_raw, expected)
        else:
            assert to_raw is None

    def test_reinforce_sees_actions_as_constants(self) -> None:
        mean = torch.zeros(1, 2, 1, requires_grad=True)
        policy = BoundedNormal(mean, torch.zeros(1, 2, 1))
        action = policy.sample()
        target, baseline = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        found = mixed_objective(policy, action, target, baseline, 0.0)
        (grad,) = torch.autograd.grad(found.sum(), mean)
        # d log N / d mean = (a - mean) / std^2, times the advantages 1 and -1; tanh'(0) = 1.
        expected = action.detach() / policy.std**2 * torch.tensor([1.0, -1.0]).view(1, 2, 1)
        torch.testing.assert_close(grad, expected)
