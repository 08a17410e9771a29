"""The RSSM against a step-by-step reference, its resets, and the KL losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.nets.distributions import OneHot, draw, unimix
from zoo.rssm.dynamics import RSSM, State, features, kl_losses

NOISE = 0.37
BATCH, LENGTH, TOKENS, ACTIONS = 3, 5, 6, 2


@pytest.fixture(params=[16, 80], ids=["narrow blocks", "wide blocks"])
def rssm(request: pytest.FixtureRequest) -> RSSM:
    torch.manual_seed(0)
    return RSSM(ACTIONS, TOKENS, deter=request.param, hidden=8, stoch=3, classes=4, blocks=4)


@pytest.fixture
def constant_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """All uniform noise is one number, so that runs of different lengths can be compared."""
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.full(size, NOISE))


def sequence(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(BATCH, length, TOKENS, generator=generator)
    actions = 2 * torch.randn(BATCH, length, ACTIONS, generator=generator)
    return tokens, actions, torch.zeros(BATCH, length, dtype=torch.bool)


def random_state(rssm: RSSM) -> State:
    generator = torch.Generator().manual_seed(2)
    stoch = torch.randn(BATCH, rssm.stoch, rssm.classes, generator=generator)
    return {
        "deter": torch.randn(BATCH, rssm.deter, generator=generator).tanh(),
        "stoch": torch.nn.functional.one_hot(stoch.argmax(-1), rssm.classes).float(),
    }


def norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * weight
    return y * torch.sigmoid(y)


def sequence_model(rssm: RSSM, state: State, action: Tensor) -> Tensor:
    action = action / action.abs().clamp(min=1)
    denses = (rssm.deter_in, rssm.stoch_in, rssm.action_in)
    parts = []
    for dense, x in zip(denses, (state["deter"], state["stoch"].flatten(1), action), strict=True):
        parts.append(norm_silu(x @ dense.linear.weight.T + dense.linear.bias, dense.norm.weight))
    return rssm.gru(torch.cat(parts, -1), state["deter"])


def posterior(rssm: RSSM, deter: Tensor, tokens: Tensor) -> Tensor:
    x = torch.cat([deter, tokens], -1) @ rssm.posterior_in.weight.T + rssm.posterior_in.bias
    logits = rssm.posterior_out(norm_silu(x, rssm.posterior_norm.weight))
    return unimix(logits.unflatten(-1, (rssm.stoch, rssm.classes)), rssm.unimix)


@pytest.mark.usefixtures("constant_noise")
class TestObserve:
    def test_equals_the_equations_step_by_step(self, rssm: RSSM) -> None:
        tokens, actions, is_first = sequence()
        state = random_state(rssm)
        states, posteriors = rssm.observe(state, tokens, actions, is_first)
        for t in range(LENGTH):
            deter = sequence_model(rssm, state, actions[:, t])
            probs = posterior(rssm, deter, tokens[:, t])
            stoch = draw(probs, torch.full((BATCH, rssm.stoch, 1), NOISE))
            torch.testing.assert_close(states["deter"][:, t], deter, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(posteriors.probs[:, t], probs, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states["stoch"][:, t], stoch)
            state = {"deter": deter, "stoch": stoch}

    def test_can_be_cut_anywhere(self, rssm: RSSM) -> None:
        tokens, actions, is_first = sequence()
        start = random_state(rssm)
        whole, _ = rssm.observe(start, tokens, actions, is_first)
        for cut in (1, 3):
            head, _ = rssm.observe(start, tokens[:, :cut], actions[:, :cut], is_first[:, :cut])
            between = {key: value[:, -1] for key, value in head.items()}
            tail, _ = rssm.observe(between, tokens[:, cut:], actions[:, cut:], is_first[:, cut:])
            torch.testing.assert_close(tail["deter"], whole["deter"][:, cut:])

    def test_an_episode_begins_from_nothing(self, rssm: RSSM) -> None:
        tokens, actions, is_first = sequence()
        is_first[1, 2] = True
        states, _ = rssm.observe(random_state(rssm), tokens, actions, is_first)
        actions = actions.clone()
        actions[:, 2] = 0
        fresh, _ = rssm.observe(
            rssm.initial(BATCH), tokens[:, 2:], actions[:, 2:], is_first[:, 2:] & False
        )
        torch.testing.assert_close(states["deter"][1, 2:], fresh["deter"][1])
        torch.testing.assert_close(states["stoch"][1, 2:], fresh["stoch"][1])
        assert not torch.allclose(states["deter"][0, 2], fresh["deter"][0, 0])

    def test_nothing_flows_back_over_the_beginning_of_an_episode(self, rssm: RSSM) -> None:
        tokens, actions, is_first = sequence()
        is_first[:, 3] = True
        tokens.requires_grad_()
        states, _ = rssm.observe(random_state(rssm), tokens, actions, is_first)
        states["deter"][:, -1].sum().backward()
        assert tokens.grad is not None
        assert (tokens.grad[:, :3] == 0).all()
        assert (tokens.grad[:, 3] != 0).any()

    def test_large_actions_are_divided_by_their_size(self, rssm: RSSM) -> None:
        tokens, actions, is_first = sequence()
        states, _ = rssm.observe(rssm.initial(BATCH), tokens, 100 * actions.sign(), is_first)
        same, _ = rssm.observe(rssm.initial(BATCH), tokens, actions.sign(), is_first)
        torch.testing.assert_close(states["deter"], same["deter"])


@pytest.mark.usefixtures("constant_noise")
class TestImagine:
    def test_equals_the_equations_step_by_step(self, rssm: RSSM) -> None:
        _, actions, _ = sequence()
        state = random_state(rssm)
        states, taken = rssm.imagine(state, lambda s, t: actions[:, t], LENGTH)
        assert torch.equal(taken, actions)
        assert states["deter"].shape == (BATCH, LENGTH + 1, rssm.deter)
        assert torch.equal(states["deter"][:, 0], state["deter"])
        for t in range(LENGTH):
            deter = sequence_model(rssm, state, actions[:, t])
            logits = rssm.prior_net(deter).unflatten(-1, (rssm.stoch, rssm.classes))
            stoch = draw(unimix(logits, 0.01), torch.full((BATCH, rssm.stoch, 1), NOISE))
            torch.testing.assert_close(states["deter"][:, t + 1], deter, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states["stoch"][:, t + 1], stoch)
            state = {"deter": deter, "stoch": stoch}

    def test_the_policy_sees_the_state_it_acts_in(self, rssm: RSSM) -> None:
        seen = []

        def policy(state: State, t: int) -> Tensor:
            seen.append(state["deter"])
            return torch.zeros(BATCH, ACTIONS)

        states, _ = rssm.imagine(random_state(rssm), policy, LENGTH)
        assert torch.equal(torch.stack(seen, 1), states["deter"][:, :-1])


def test_samples_differ_between_steps_and_latents() -> None:
    torch.manual_seed(0)
    rssm = RSSM(ACTIONS, TOKENS, deter=16, hidden=8, stoch=16, classes=8)
    with torch.no_grad():
        rssm.posterior_out.weight.zero_()
    tokens, actions, is_first = sequence()
    states, _ = rssm.observe(rssm.initial(BATCH), tokens, actions, is_first)
    chosen = states["stoch"].argmax(-1).flatten(0, 1)
    assert len(chosen.unique(dim=0)) == len(chosen)


def test_features_are_deter_then_latents() -> None:
    state = {"deter": torch.ones(2, 3), "stoch": torch.zeros(2, 2, 4)}
    assert features(state).tolist() == [[1.0] * 3 + [0.0] * 8] * 2


class TestKL:
    def distributions(self) -> tuple[Tensor, Tensor]:
        """Two steps: a KL of 0.1438 nats (below the free nats), and of 8.2 nats."""
        p = torch.tensor([[[[0.5, 0.5]], [[0.999, 0.001]]]])
        q = torch.tensor([[[[0.25, 0.75]], [[0.0002, 0.9998]]]])
        return p.requires_grad_(), q.requires_grad_()

    def test_free_nats_are_per_step(self) -> None:
        p, q = self.distributions()
        dynamics, representation = kl_losses(OneHot(p), OneHot(q), 1.0)
        large = 0.999 * math.log(0.999 / 0.0002) + 0.001 * math.log(0.001 / 0.9998)
        assert dynamics.shape == (1, 2)
        torch.testing.assert_close(dynamics, torch.tensor([[1.0, large]]))
        torch.testing.assert_close(representation, dynamics)
        small = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
        free, _ = kl_losses(OneHot(p), OneHot(q), 0.0)
        assert free[0, 0].item() == pytest.approx(small)

    def test_each_loss_trains_its_own_side_where_it_is_not_free(self) -> None:
        p, q = self.distributions()
        dynamics, representation = kl_losses(OneHot(p), OneHot(q), 1.0)
        to_p, to_q = torch.autograd.grad(dynamics.sum(), (p, q), allow_unused=True)
        assert to_p is None
        assert (to_q[0, 0] == 0).all()
        torch.testing.assert_close(to_q[0, 1], -p[0, 1] / q[0, 1])
        to_p, to_q = torch.autograd.grad(representation.sum(), (p, q), allow_unused=True)
        assert to_q is None
        assert (to_p[0, 0] == 0).all()
        torch.testing.assert_close(to_p[0, 1], (p[0, 1] / q[0, 1]).log() + 1)

    def test_free_nats_are_counted_after_the_sum_over_latents(self) -> None:
        p = torch.tensor([0.9, 0.1]).expand(1, 1, 4, 2)
        q = torch.tensor([0.5, 0.5]).expand(1, 1, 4, 2)
        one = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
        dynamics, _ = kl_losses(OneHot(p), OneHot(q), 1.0)
        assert one < 1 < 4 * one
        assert dynamics.item() == pytest.approx(4 * one)
