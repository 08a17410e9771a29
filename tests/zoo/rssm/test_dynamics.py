"""The RSSM against a step-by-step reference, its resets and ablations, and the KL losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nets.distributions import DiagonalNormal, Latent, OneHot, draw, unimix
from zoo.nets.layers import ELU, RMS_SILU
from zoo.rssm.cores import BlockCore, GRUCore
from zoo.rssm.dynamics import RSSM, State, features, kl_losses
from zoo.rssm.latents import Categoricals, Gaussians

NOISE = 0.37
BATCH, LENGTH, TOKENS, ACTIONS = 3, 5, 6, 2
STOCH, CLASSES, UNIMIX = 3, 4, 0.01
FAMILY = ("v3, narrow blocks", "v3, wide blocks", "v3, gaussian", "v2", "v1")


def build(name: str, **ablation: bool) -> RSSM:
    """A tiny RSSM as each paper has it."""
    torch.manual_seed(0)
    gaussian = name in ("v3, gaussian", "v1")
    mixture = UNIMIX if name.startswith("v3") else 0.0
    latent = Gaussians(STOCH) if gaussian else Categoricals(STOCH, CLASSES, mixture)
    size = math.prod(latent.shape)
    if name.startswith("v3"):
        core = BlockCore(ACTIONS, size, 80 if "wide" in name else 16, 8, blocks=4)
        return RSSM(core, latent, TOKENS, 8, 2, RMS_SILU, **ablation)
    core = GRUCore(ACTIONS, size, 16, 8, ELU, layer_norm=name == "v2")
    return RSSM(core, latent, TOKENS, 8, style=ELU, **ablation)


@pytest.fixture(params=FAMILY)
def rssm(request: pytest.FixtureRequest) -> RSSM:
    return build(request.param)


@pytest.fixture
def constant_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """All noise is one number, so that runs of different lengths can be compared."""
    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, lambda *size, device=None: torch.full(size, NOISE))


def sequence(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = normal(generator, BATCH, length, TOKENS)
    actions = 2 * normal(generator, BATCH, length, ACTIONS)
    return tokens, actions, torch.zeros(BATCH, length, dtype=torch.bool)


def normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.empty(size).normal_(generator=generator)


def random_state(rssm: RSSM) -> State:
    generator = torch.Generator().manual_seed(2)
    stoch = normal(generator, BATCH, *rssm.latent.shape)
    if isinstance(rssm.latent, Categoricals):
        stoch = F.one_hot(stoch.argmax(-1), CLASSES).float()
    return {"deter": normal(generator, BATCH, rssm.deter).tanh(), "stoch": stoch}


def norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * weight
    return y * torch.sigmoid(y)


def activate(module: Any, x: Tensor) -> Tensor:
    return norm_silu(x, module.weight) if hasattr(module, "weight") else F.elu(x)


def sequence_model(rssm: RSSM, state: State, action: Tensor) -> Tensor:
    core, deter, stoch = rssm.core, state["deter"], state["stoch"].flatten(1)
    if isinstance(core, GRUCore):
        linear = core.inputs.linear
        x = torch.cat([stoch, action], -1) @ linear.weight.T + linear.bias
        return core.cell(F.elu(x), deter)
    assert isinstance(core, BlockCore)
    action = action / action.abs().clamp(min=1)
    denses = (core.deter_in, core.stoch_in, core.action_in)
    parts = []
    for dense, x in zip(denses, (deter, stoch, action), strict=True):
        x = x @ dense.linear.weight.T + dense.linear.bias
        parts.append(norm_silu(x, dense.activation.weight))
    return core.gru(torch.cat(parts, -1), deter)


def posterior(rssm: RSSM, deter: Tensor, tokens: Tensor) -> Tensor:
    """Raw outputs."""
    x = torch.cat([deter, tokens], -1) @ rssm.posterior_in.weight.T + rssm.posterior_in.bias
    return rssm.posterior_out(activate(rssm.posterior_activation, x))


def prior(rssm: RSSM, deter: Tensor) -> Tensor:
    """Raw outputs."""
    mlp, out = rssm.prior_net
    for dense in mlp:
        deter = activate(dense.activation, deter @ dense.linear.weight.T + dense.linear.bias)
    return deter @ out.weight.T + out.bias


def parameters(latent: Latent) -> Tensor:
    if isinstance(latent, OneHot):
        return latent.probs
    assert isinstance(latent, DiagonalNormal)
    return torch.cat([latent.mean, latent.std], -1)


def expected(rssm: RSSM, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of the distribution of raw outputs, and its sample with the constant noise."""
    if isinstance(rssm.latent, Categoricals):
        logits = raw.unflatten(-1, (STOCH, CLASSES))
        probs = unimix(logits, rssm.latent.mixture)
        return probs, draw(probs, torch.full((len(raw), STOCH, 1), NOISE))
    mean, std = raw[:, :STOCH, None], F.softplus(raw[:, STOCH:, None]) + 0.1
    return torch.cat([mean, std], -1), mean + std * NOISE


@pytest.mark.usefixtures("constant_noise")
class TestObserve:
    def test_equals_the_equations_step_by_step(self, rssm: RSSM) -> None:
        tokens, actions, is_first = sequence()
        state = random_state(rssm)
        states, posteriors = rssm.observe(state, tokens, actions, is_first)
        for t in range(LENGTH):
            deter = sequence_model(rssm, state, actions[:, t])
            values, stoch = expected(rssm, posterior(rssm, deter, tokens[:, t]))
            found = parameters(posteriors)[:, t]
            torch.testing.assert_close(states["deter"][:, t], deter, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states["stoch"][:, t], stoch, atol=1e-5, rtol=1e-4)
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

    def test_large_actions_are_divided_by_their_size_in_v3(self) -> None:
        rssm = build("v3, narrow blocks")
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
            values, stoch = expected(rssm, prior(rssm, deter))
            found = parameters(rssm.prior(deter))
            torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states["deter"][:, t + 1], deter, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states["stoch"][:, t + 1], stoch, atol=1e-5, rtol=1e-4)
            state = {"deter": deter, "stoch": stoch}

    def test_the_policy_sees_the_state_it_acts_in(self, rssm: RSSM) -> None:
        seen = []

        def policy(state: State, t: int) -> Tensor:
            seen.append(state["deter"])
            return torch.zeros(BATCH, ACTIONS)

        states, _ = rssm.imagine(random_state(rssm), policy, LENGTH)
        assert torch.equal(torch.stack(seen, 1), states["deter"][:, :-1])

    def test_without_sampling_every_latent_is_the_mode_of_its_prior(self, rssm: RSSM) -> None:
        _, actions, _ = sequence()
        states, _ = rssm.imagine(
            random_state(rssm), lambda s, t: actions[:, t], LENGTH, sample=False
        )
        modes = rssm.prior(states["deter"][:, 1:]).mode()
        torch.testing.assert_close(states["stoch"][:, 1:], modes)


class TestAblations:
    @pytest.mark.usefixtures("constant_noise")
    @pytest.mark.parametrize("name", FAMILY)
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_without_the_deterministic_path_h_is_forgotten(
        self, name: str, deterministic: bool
    ) -> None:
        rssm = build(name, deterministic=deterministic)
        tokens, actions, is_first = sequence()
        start, stoch = random_state(rssm), random_state(rssm)["stoch"]
        other = {"deter": -start["deter"], "stoch": stoch}
        for run in (
            lambda state: rssm.observe(state, tokens, actions, is_first)[0]["deter"],
            lambda state: rssm.imagine(state, lambda s, t: actions[:, t], 2)[0]["deter"][:, 1:],
        ):
            assert torch.equal(run(start), run(other)) == (not deterministic)
            elsewhere = {**start, "stoch": torch.zeros_like(stoch)}
            assert not torch.equal(run(start), run(elsewhere))  # memory through z remains

    @pytest.mark.parametrize("name", FAMILY)
    @pytest.mark.parametrize("stochastic", [True, False])
    def test_without_the_stochastic_path_nothing_is_random(
        self, name: str, stochastic: bool
    ) -> None:
        rssm = build(name, stochastic=stochastic)
        tokens, actions, is_first = sequence()
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            states, posteriors = rssm.observe(random_state(rssm), tokens, actions, is_first)
            last = {key: value[:, -1] for key, value in states.items()}
            dream, _ = rssm.imagine(last, lambda s, t: actions[:, t], LENGTH)
            found.append(features(dream))
        assert torch.equal(*found) == (not stochastic)
        if not stochastic:
            modes = rssm.prior(dream["deter"][:, 1:]).mode()
            torch.testing.assert_close(states["stoch"], posteriors.mode())
            torch.testing.assert_close(dream["stoch"][:, 1:], modes)


@pytest.mark.parametrize("name", ["v3, narrow blocks", "v1"])
def test_samples_differ_between_steps_and_latents(name: str) -> None:
    torch.manual_seed(0)
    if name == "v1":
        rssm = RSSM(GRUCore(ACTIONS, 16, 16, 8), Gaussians(16), TOKENS, 8, style=ELU)
    else:
        core = BlockCore(ACTIONS, 16 * 8, 16, 8)
        rssm = RSSM(core, Categoricals(16, 8, UNIMIX), TOKENS, 8, 2)
    with torch.no_grad():
        rssm.posterior_out.weight.zero_()
    tokens, actions, is_first = sequence()
    states, _ = rssm.observe(rssm.initial(BATCH), tokens, actions, is_first)
    index = states["stoch"].argmax(-1) if name != "v1" else states["stoch"].squeeze(-1)
    chosen = index.flatten(0, 1)
    assert len(chosen.unique(dim=0)) == len(chosen)
    assert len(chosen[0].unique()) > 3


def test_features_are_deter_then_latents() -> None:
    state = {"deter": torch.ones(2, 3), "stoch": torch.zeros(2, 2, 4)}
    assert features(state).tolist() == [[1.0] * 3 + [0.0] * 8] * 2


class TestKL:
    def distributions(self) -> tuple[Tensor, Tensor]:
        """Two steps: a KL of 0.1438 nats (below the free nats), and of 8.2 nats."""
        p = torch.tensor([[[[0.5, 0.5]], [[0.999, 0.001]]]])
        q = torch.tensor([[[[0.25, 0.75]], [[0.0002, 0.9998]]]])
        return p.requires_grad_(), q.requires_grad_()

    def test_both_sides_are_the_divergence_of_each_step(self) -> None:
        p, q = self.distributions()
        dynamics, representation = kl_losses(OneHot(p), OneHot(q))
        small = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
        large = 0.999 * math.log(0.999 / 0.0002) + 0.001 * math.log(0.001 / 0.9998)
        assert dynamics.shape == (1, 2)
        torch.testing.assert_close(dynamics, torch.tensor([[small, large]]))
        torch.testing.assert_close(representation, dynamics)

    def test_each_side_trains_its_own_where_it_is_not_free(self) -> None:
        p, q = self.distributions()
        # Free nats as DreamerV3 counts them.
        dynamics, representation = (kl.clamp(min=1) for kl in kl_losses(OneHot(p), OneHot(q)))
        to_p, to_q = torch.autograd.grad(dynamics.sum(), (p, q), allow_unused=True)
        assert to_p is None
        assert (to_q[0, 0] == 0).all()
        torch.testing.assert_close(to_q[0, 1], -p[0, 1] / q[0, 1])
        to_p, to_q = torch.autograd.grad(representation.sum(), (p, q), allow_unused=True)
        assert to_q is None
        assert (to_p[0, 0] == 0).all()
        torch.testing.assert_close(to_p[0, 1], (p[0, 1] / q[0, 1]).log() + 1)

    def test_the_gradients_of_both_sides_add_up_to_that_of_the_whole(self) -> None:
        torch.manual_seed(0)
        raw = [torch.randn(2, 3, 2 * STOCH, requires_grad=True) for _ in range(2)]
        p, q = (Gaussians(STOCH)(x) for x in raw)
        whole = torch.autograd.grad(p.kl(q).sum(), raw, retain_graph=True)
        sides = torch.autograd.grad(sum(kl.sum() for kl in kl_losses(p, q)), raw)
        torch.testing.assert_close(sides, whole)

    def test_the_divergence_is_summed_over_latents(self) -> None:
        p = torch.tensor([0.9, 0.1]).expand(1, 1, 4, 2)
        q = torch.tensor([0.5, 0.5]).expand(1, 1, 4, 2)
        one = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
        dynamics, _ = kl_losses(OneHot(p), OneHot(q))
        assert dynamics.item() == pytest.approx(4 * one)
