"""M: the paper's sizes, the mixture's density and temperature, resets, masks and heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F

from zoo.world_models.memory import Memory, Mixture, Point

B, T, Z, A, H = 3, 7, 4, 2, 8


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def mixture(lead: tuple[int, ...] = (B,), k: int = 5) -> Mixture:
    torch.manual_seed(2)
    return Mixture(
        2 * torch.randn(*lead, k, Z), torch.randn(*lead, k, Z), 0.5 * torch.randn(*lead, k, Z)
    )


def sequences() -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(B, T, Z, generator=generator)
    action = torch.randn(B, T, A, generator=generator)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, 0] = first[0, 3] = first[2, 5] = first[2, 6] = True
    done = torch.zeros(B, T, dtype=torch.bool)
    done[0, 2] = done[2, 4] = True
    reward = torch.randn(B, T, generator=generator)
    return z, action, {"is_first": first, "is_terminal": done, "reward": reward}


def test_sizes_of_the_paper() -> None:
    """One bias vector of the LSTM counts, as in the paper's table."""
    car = Memory(32, 3, 256, step_reward=1.0, predict_done=False)
    doom = Memory(64, 1, 512, restart=True, step_reward=1.0)
    assert count(car) == 422_368
    assert count(doom) == 1_678_785


def test_log_density_is_that_of_torch() -> None:
    ours = mixture((B, T))
    x = 2 * torch.randn(B, T, Z)
    last = [part.movedim(-2, -1) for part in (ours.logits, ours.mean, ours.log_sigma)]
    theirs = MixtureSameFamily(Categorical(logits=last[0]), Normal(last[1], last[2].exp()))
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-5, atol=1e-5)
    joint = Independent(theirs, 1).log_prob(x)
    torch.testing.assert_close(ours.loss(x), -joint / Z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pred(), theirs.mean)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.3])
def test_temperature(temperature: float) -> None:
    """Weights softmax(logits / tau), noise times sqrt(tau)."""
    ours = mixture(())
    draws, k = 20000, 5
    repeated = Mixture(*(p.expand(draws, k, Z) for p in (ours.logits, ours.mean, ours.log_sigma)))
    x = repeated.sample(temperature)
    weights = (ours.logits / temperature).softmax(0)
    mean = (weights * ours.mean).sum(0)
    variance = (weights * (ours.mean.square() + temperature * (2 * ours.log_sigma).exp())).sum(0)
    variance = variance - mean.square()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=5 * float(variance.max()) ** 0.5 / 140)
    torch.testing.assert_close(x.var(0), variance, rtol=0.1, atol=0)


def test_given_noise_picks_by_the_cumulative_weights() -> None:
    ours = Mixture(
        torch.tensor([0.2, 0.5, 0.3]).log().view(1, 3, 1),
        torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1),
        torch.full((1, 3, 1), 0.5).log(),
    )
    for choice, mean in ((0.0, 1.0), (0.19, 1.0), (0.21, 2.0), (0.69, 2.0), (0.71, 3.0)):
        x = ours.sample(1.0, torch.tensor([[choice]]), torch.tensor([[-2.0]]))
        torch.testing.assert_close(x, torch.tensor([[mean - 1.0]]))


def test_bounds_of_the_deviation() -> None:
    memory = Memory(Z, A, H, min_log_sigma=-0.1, max_log_sigma=0.05)
    with torch.no_grad():
        memory.out.weight.mul_(30)
    predicted = memory.predict(torch.randn(50, H))
    assert isinstance(predicted, Mixture)
    assert float(predicted.log_sigma.min()) == pytest.approx(-0.1)
    assert float(predicted.log_sigma.max()) == pytest.approx(0.05)


def test_without_mixtures_a_point() -> None:
    memory = Memory(Z, A, H, mixtures=0)
    predicted = memory.predict(torch.randn(5, H))
    assert isinstance(predicted, Point)
    assert memory.out.out_features == Z
    target = torch.randn(5, Z)
    torch.testing.assert_close(
        predicted.loss(target),
        0.5 * F.mse_loss(predicted.pred(), target, reduction="none").mean(-1),
    )
    assert torch.equal(predicted.sample(1.3), predicted.pred())


def test_episodes_start_from_zeros_whichever_way_it_is_computed() -> None:
    memory = Memory(Z, A, H, restart=True)
    z, action, batch = sequences()
    first = batch["is_first"]
    h = memory(z, action, first)
    torch.testing.assert_close(memory._packed(memory.inputs(z, action, first), first), h)
    alone = memory(z[:1, 3:], action[:1, 3:], first[:1, 3:])
    torch.testing.assert_close(h[:1, 3:], alone)

    state = {"h": torch.zeros(B, H), "c": torch.zeros(B, H)}
    for t in range(T):
        kept = (~first[:, t, None]).float()
        here = {"z": z[:, t], "first": first[:, t], "h": state["h"] * kept, "c": state["c"] * kept}
        state["h"], state["c"] = memory.step(here, action[:, t])
        torch.testing.assert_close(state["h"], h[:, t])


def test_it_is_the_lstm_of_torch() -> None:
    """With one bias vector, that starts at 1 for the forget gate."""
    memory = Memory(Z, A, H)
    theirs = torch.nn.LSTM(Z + A, H, batch_first=True)
    with torch.no_grad():
        inputs, hidden = memory.weights
        theirs.weight_ih_l0.copy_(inputs[:, :-1])
        theirs.weight_hh_l0.copy_(hidden)
        theirs.bias_hh_l0.zero_()
        theirs.bias_ih_l0.zero_()
        theirs.bias_ih_l0[H : 2 * H] = 1
    z, action, batch = sequences()
    none = torch.zeros_like(batch["is_first"])
    expected, _ = theirs(torch.cat([z, action], -1))
    torch.testing.assert_close(memory(z, action, none), expected)


@pytest.mark.parametrize("delta", [False, True])
def test_losses(delta: bool) -> None:
    """Each step from those before it in its episode; ends weigh more."""
    memory = Memory(Z, A, H, delta=delta, done_weight=10.0)
    memory.scale.fill_(0.5)
    z, action, batch = sequences()
    losses = memory.losses(z, action, batch)
    h = memory(z, action, batch["is_first"])
    expected: dict[str, list[Tensor]] = {"mixture": [], "reward": [], "done": []}
    for b in range(B):
        for t in range(T - 1):
            if batch["is_first"][b, t + 1]:
                continue
            target = (z[b, t + 1] - z[b, t]) / 0.5 if delta else z[b, t + 1]
            expected["mixture"].append(memory.predict(h[b, t]).loss(target))
            assert memory.reward_head is not None and memory.done_head is not None
            reward = memory.reward_head(h[b, t]).pred()
            expected["reward"].append(0.5 * (reward - batch["reward"][b, t + 1]).square())
            end = bool(batch["is_terminal"][b, t + 1])
            probability = memory.done_head(h[b, t]).pred()
            expected["done"].append(-10 * probability.log() if end else -(1 - probability).log())
    for key, values in expected.items():
        torch.testing.assert_close(losses[key], torch.stack(values).mean())


def test_delta_and_back() -> None:
    memory = Memory(Z, A, H, delta=True)
    memory.scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    z, following = torch.randn(5, Z), torch.randn(5, Z)
    torch.testing.assert_close(memory.following(z, memory.target(z, following)), following)
    torch.testing.assert_close(
        memory.target(torch.zeros(Z), torch.ones(Z)), torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 4])
    )


def test_heads_with_a_hidden_layer_see_the_next_z() -> None:
    linear, deep = Memory(Z, A, H), Memory(Z, A, H, head_units=16)
    h, z = torch.randn(5, H), torch.randn(5, Z)
    assert torch.equal(linear.head_inputs(h, z), h)
    assert torch.equal(deep.head_inputs(h, z), torch.cat([h, z], -1))
    assert deep.reward_head is not None
    assert deep.reward_head(deep.head_inputs(h, z)).pred().shape == (5,)


def test_mixture_learns_two_modes() -> None:
    """A coin decides between two futures: a normal cannot say that, a mixture can."""
    torch.manual_seed(0)
    memory = Memory(1, 1, H, step_reward=1.0, predict_done=False)
    optimizer = torch.optim.Adam(memory.parameters(), 1e-2)
    batch = {"is_first": torch.zeros(64, 2, dtype=torch.bool)}
    for _ in range(150):
        z = torch.zeros(64, 2, 1)
        z[:, 1] = torch.randint(2, (64, 1)) * 2.0 - 1.0 + 0.1 * torch.randn(64, 1)
        loss = memory.losses(z, torch.zeros(64, 2, 1), batch)["mixture"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert abs(float(loss) - entropy) < 0.25
