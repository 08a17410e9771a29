"""Dreamer V2: its losses in closed form, what each of them trains, and the slow critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_models import (
    ACTIONS,
    BATCH,
    STEPS,
    images,
    lambda_targets,
    parts_trained_by,
    reached,
    seed_dreams,
    sequences,
    shake,
    touched,
    train,
    vectors,
)
from torch import Tensor

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.dreamer_v2.module import DreamerV2
from zoo.rssm.dynamics import features
from zoo.rssm.model import Filtered

TINY = {
    "deter": 8,
    "hidden": 6,
    "stoch": 3,
    "classes": 4,
    "depth": 2,
    "units": 6,
    "imagine_length": 4,
}
# Discounts, lambda and scales that a mix-up of indices would not survive.
VALUES = {"discount": 0.7, "lam": 0.6, "entropy": 0.05, "reward_transform": "identity"}
WORLD_MODEL = {"encoder", "rssm"}
GRADIENTS = ("reinforce", "dynamics", "both")
MIXES = {"reinforce": 0.0, "dynamics": 1.0, "both": 0.3}


def build(spec: Spec, **options: Any) -> DreamerV2:
    torch.manual_seed(0)
    model = DreamerV2(spec, size="nano", **{**TINY, **VALUES, "actor_mix": 0.3, **options})
    shake(model)  # which parts the slow critic from the critic, too
    seed_dreams(model)
    return model


def batch_with_an_end(spec: Spec) -> dict[str, Any]:
    batch = sequences(spec)
    batch["is_terminal"][0, 3] = batch["is_last"][0, 3] = batch["is_first"][0, 4] = True
    return batch


def step(model: DreamerV2, batch: dict[str, Any]) -> Filtered:
    """A training step; returns what it saw."""
    torch.manual_seed(5)
    seen = model.filter(batch)
    torch.manual_seed(5)
    model.training_step(batch, 0)
    return seen


class Dreamed:
    """A rollout z_0 ... z_H with what is defined at each of its states."""

    def __init__(self, model: DreamerV2, seen: Filtered) -> None:
        starts = {key: value.detach().flatten(0, 1) for key, value in seen.states.items()}
        dream, self.action = model.rssm.imagine(
            starts, lambda s, t: model.actor(features(s).detach()).sample(), model.imagine_length
        )
        self.x = features(dream)
        assert self.x.shape[1] == model.imagine_length + 1
        reward = model.reward_head(self.x).mean
        self.value = model.slow_critic(self.x).mean
        discount = torch.full_like(reward, model.discount)
        if model.continue_head is not None:
            discount = torch.sigmoid(model.continue_head(self.x).logit)
            first = 0.7 * (~seen.is_terminal).flatten().float()
            discount = torch.cat([first[:, None], discount[:, 1:]], 1)
        self.target = lambda_targets(reward, self.value, discount, model.lam)
        self.weight = reached(discount).detach()

    def actor_loss(self, model: DreamerV2, gradient: str) -> Tensor:
        """In a loop over states t = 0 ... H - 2: action t leads to state t + 1, which has target
        t + 1."""
        steps, mix = [], MIXES[gradient]
        for t in range(model.imagine_length - 1):
            policy = model.actor(self.x[:, t].detach())
            advantage = (self.target[:, t + 1] - self.value[:, t]).detach()
            reinforce = policy.log_prob(self.action[:, t].detach()) * advantage
            objective = mix * self.target[:, t + 1] + (1 - mix) * reinforce
            objective = objective + model.entropy * policy.entropy()
            steps.append(self.weight[:, t] * objective)
        return -torch.stack(steps, 1).mean()

    def critic_loss(self, model: DreamerV2) -> Tensor:
        """In a loop over states t = 0 ... H - 1."""
        steps = []
        for t in range(model.imagine_length):
            error = model.critic(self.x[:, t].detach()).mean - self.target[:, t].detach()
            steps.append(self.weight[:, t] * 0.5 * error.square())
        return torch.stack(steps, 1).mean()


@pytest.fixture(params=ACTIONS)
def spec(request: pytest.FixtureRequest) -> Spec:
    return vectors(request.param)


class TestWorldModelLosses:
    def test_reconstruction_and_reward_are_half_squared_errors(self) -> None:
        model, batch = build(images()), sequences(images())
        seen = step(model, batch)
        outputs = model.decoder(seen.features)
        pixels = batch["obs"]["image"][:, 1:] / 255 - 0.5
        expected = 0.5 * (outputs["image"].mean - pixels).square().flatten(2).sum(-1)
        vector = outputs["vector"].mean - batch["obs"]["vector"][:, 1:]
        expected = expected + 0.5 * vector.square().sum(-1)
        torch.testing.assert_close(model.last_losses["reconstruction"], expected.mean().detach())
        error = model.reward_head(seen.features).mean - batch["reward"][:, 1:]
        expected = 0.5 * error.square().mean()
        torch.testing.assert_close(model.last_losses["reward"], expected.detach())

    @pytest.mark.parametrize(
        ("transform", "function"), [("tanh", torch.tanh), ("sign", torch.sign)]
    )
    def test_rewards_are_transformed(self, transform: str, function: Any) -> None:
        model, batch = build(vectors(), reward_transform=transform), sequences(vectors())
        batch["reward"] = 4 * batch["reward"] - 1
        seen = step(model, batch)
        wanted = function(batch["reward"][:, 1:])
        expected = 0.5 * (model.reward_head(seen.features).mean - wanted).square().mean()
        torch.testing.assert_close(model.last_losses["reward"], expected.detach())
        scaled = build(vectors(), reward_transform=transform, reward_unit=4.0)
        batch["reward"] *= 4
        step(scaled, batch)
        torch.testing.assert_close(scaled.last_losses["reward"], model.last_losses["reward"])

    def test_dreamed_rewards_are_in_the_units_of_the_environment(self) -> None:
        model = build(vectors(), reward_transform="tanh", reward_unit=4.0)
        rewards = torch.tensor([-8.0, -1.0, 0.0, 0.5, 6.0])
        torch.testing.assert_close(model.untransform(model.transform(rewards)), rewards)
        assert model.untransform(torch.tensor([-3.0, 3.0])).isfinite().all()
        with torch.no_grad():
            model.reward_head.out.weight.zero_()
            model.reward_head.out.bias.fill_(0.5)
        dream = model.imagine(model.initial_state(BATCH), None, 2)
        expected = 4 * torch.atanh(torch.tensor(0.5))
        torch.testing.assert_close(dream.reward, expected.expand(BATCH, 2))

    @pytest.mark.parametrize("latent", ["categorical", "gaussian"])
    def test_the_divergence_is_balanced(self, latent: str) -> None:
        batch = sequences(vectors())
        model = build(vectors(), latent=latent, kl_balance=0.9)
        kl = (lambda seen: seen.posterior.kl(seen.prior).mean())(step(model, batch))
        torch.testing.assert_close(model.last_losses["kl"], kl.detach())
        # Nine parts for the prior, one for the posterior; no part of a free divergence.
        wrt = [model.rssm.prior_net[1].weight, model.rssm.posterior_out.weight]
        batch["is_first"][:] = True  # so that nothing flows through later states

        def gradients(balance: float) -> tuple[Tensor, ...]:
            torch.manual_seed(5)
            model.kl_balance = balance
            model.loss_scales = {key: float(key == "kl") for key in model.loss_scales}
            return torch.autograd.grad(model.training_step(batch, 0), wrt, allow_unused=True)

        to_prior, to_posterior = gradients(0.5)
        found = gradients(0.9)
        torch.testing.assert_close(found[0], 1.8 * to_prior)
        torch.testing.assert_close(found[1], 0.2 * to_posterior)
        assert (to_prior != 0).any()
        assert (to_posterior != 0).any()

    def test_free_nats_are_of_the_mean_divergence(self) -> None:
        model, batch = build(vectors()), sequences(vectors())
        seen = step(model, batch)
        kl = seen.posterior.kl(seen.prior)
        model.free_nats = (0.5 * (kl.min() + kl.mean())).item()
        step(model, batch)
        torch.testing.assert_close(model.last_losses["kl"], kl.mean().detach())
        model.free_nats = 1.1 * kl.mean().item()
        step(model, batch)
        assert model.last_losses["kl"].item() == pytest.approx(model.free_nats)
        assert parts_trained_by(model, "kl", batch) == set()

    def test_the_continue_head_learns_the_discount(self) -> None:
        model, batch = build(vectors()), batch_with_an_end(vectors())
        seen = step(model, batch)
        p = torch.sigmoid(model.continue_head(seen.features).logit)
        wanted = 0.7 * (~batch["is_terminal"][:, 1:]).float()
        assert (wanted == 0).sum() == 1
        expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
        torch.testing.assert_close(model.last_losses["continue"], expected.detach())

    def test_the_defaults_are_those_of_atari(self) -> None:
        model = DreamerV2(vectors("discrete"), size="nano")
        scales = {"reconstruction": 1.0, "reward": 1.0, "kl": 0.1, "continue": 5.0}
        assert model.loss_scales == scales | {"actor": 1.0, "critic": 1.0}
        assert (model.discount, model.lam, model.entropy) == (0.999, 0.95, 1e-3)
        assert (model.kl_balance, model.free_nats, model.slow_every) == (0.8, 0.0, 100)
        assert model.transform(torch.tensor(3.0)) == torch.tensor(3.0).tanh()


@pytest.mark.parametrize("gradient", GRADIENTS)
class TestActor:
    @pytest.mark.parametrize("continue_scale", [0.0, 1.0], ids=["endless", "with ends"])
    def test_loss_and_gradient_in_closed_form(
        self, spec: Spec, gradient: str, continue_scale: float
    ) -> None:
        model = build(spec, actor_gradient=gradient, continue_scale=continue_scale)
        batch = batch_with_an_end(spec)
        dreamed = Dreamed(model, step(model, batch))
        assert dreamed.target.std() > 0.01
        assert not torch.allclose(dreamed.value, model.critic(dreamed.x).mean)
        loss = dreamed.actor_loss(model, gradient)
        torch.testing.assert_close(model.last_losses["actor"], loss.detach())
        wrt = list(model.actor.parameters())
        expected = torch.autograd.grad(loss, wrt, allow_unused=True)
        torch.manual_seed(5)
        assert parts_trained_by(model, "actor", batch) == {"actor"}
        torch.manual_seed(5)
        model.zero_grad()
        model.training_step(batch, 0).backward()
        for parameter, grad in zip(wrt, expected, strict=True):
            assert parameter.grad is not None and grad is not None
            torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-3)

    def test_dreams_carry_gradients_only_where_the_actor_needs_them(self, gradient: str) -> None:
        model, seen = build(vectors(), actor_gradient=gradient), []
        imagine = model.rssm.imagine
        model.rssm.imagine = lambda *arguments: (
            seen.append(imagine(*arguments)),
            seen[-1],
        )[1]
        model.training_step(sequences(vectors()), 0)
        assert seen[0][0]["deter"].requires_grad == (gradient != "reinforce")


def test_discrete_actions_take_reinforce_and_boxes_the_dynamics() -> None:
    assert {kind: build(vectors(kind)).actor_mix for kind in ACTIONS} == {
        "discrete": 0.0,
        "multi_discrete": 0.0,
        "box": 1.0,
    }
    assert build(vectors(), actor_gradient="both", actor_mix=0.1).actor_mix == 0.1


class TestCritic:
    @pytest.mark.parametrize("continue_scale", [0.0, 1.0], ids=["endless", "with ends"])
    def test_loss_and_gradient_in_closed_form(self, spec: Spec, continue_scale: float) -> None:
        model, batch = build(spec, continue_scale=continue_scale), batch_with_an_end(spec)
        loss = Dreamed(model, step(model, batch)).critic_loss(model)
        torch.testing.assert_close(model.last_losses["critic"], loss.detach())
        wrt = list(model.critic.parameters())
        expected = torch.autograd.grad(loss, wrt)
        assert parts_trained_by(model, "critic", batch) == {"critic"}
        torch.manual_seed(5)
        model.zero_grad()
        model.training_step(batch, 0).backward()
        for parameter, grad in zip(wrt, expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-3)

    def test_the_first_discount_is_that_of_the_replay(self) -> None:
        model, batch = build(vectors()), batch_with_an_end(vectors())
        batch["is_terminal"][1, 5] = True
        seen = step(model, batch)
        with torch.no_grad():
            # The head believes that nothing ends; the replay knows better.
            model.continue_head.out.weight.zero_()
            model.continue_head.out.bias.fill_(torch.logit(torch.tensor(0.6)))
        dream = torch.zeros(BATCH * (STEPS - 1), 3, model.rssm.feature_size)
        found = model._discounts(dream, seen)
        first = torch.full((BATCH, STEPS - 1), 0.7)
        first[0, 2] = first[1, 4] = 0.0  # without the context
        torch.testing.assert_close(found[:, 0], first.flatten())
        torch.testing.assert_close(found[:, 1:], torch.full_like(found[:, 1:], 0.6))
        model.imagine_last = 2
        found = model._discounts(dream[: 2 * BATCH], seen)
        torch.testing.assert_close(found[:, 0], first[:, -2:].flatten())

    def test_imagination_can_start_from_the_last_steps_only(self) -> None:
        for last, starts in ((0, STEPS - 1), (2, 2), (1, 1), (99, STEPS - 1)):
            model, found = build(vectors(), imagine_last=last), []
            imagine = model.rssm.imagine
            model.rssm.imagine = lambda s, *rest, f=imagine, n=found: (
                n.append(len(s["deter"])),
                f(s, *rest),
            )[1]
            assert model.training_step(batch_with_an_end(vectors()), 0).isfinite()
            assert found == [BATCH * starts]


class TestSlowCritic:
    def equal(self, model: DreamerV2) -> bool:
        fast, slow = model.critic.state_dict(), model.slow_critic.state_dict()
        return all(torch.equal(fast[key], value) for key, value in slow.items())

    def test_starts_as_a_copy(self) -> None:
        model = DreamerV2(vectors(), size="nano")
        assert self.equal(model)
        assert not any(p.requires_grad for p in model.slow_critic.parameters())

    def test_is_copied_after_updates_1_101_and_201_only(self) -> None:
        model, copied = build(vectors()), []
        for update in range(1, 251):
            with torch.no_grad():
                model.critic.out.bias.add_(1.0)
            model.updates = update
            model.after_update()
            if self.equal(model):
                copied.append(update)
        assert copied == [1, 101, 201]

    def test_updates_of_the_trainer_count(self) -> None:
        model = build(vectors(), slow_every=3, critic_lr=0.01)
        copied = []
        for update in range(1, 6):
            train(model, sequences(vectors()), 1)
            if self.equal(model):
                copied.append(update)
        assert copied == [1, 4]


class TestGradientFlow:
    @pytest.mark.parametrize(
        ("loss", "parts"),
        [
            ("reconstruction", WORLD_MODEL | {"decoder"}),
            ("reward", WORLD_MODEL | {"reward_head"}),
            ("continue", WORLD_MODEL | {"continue_head"}),
            ("kl", WORLD_MODEL),
            ("critic", {"critic"}),
        ],
    )
    @pytest.mark.parametrize("latent", ["categorical", "gaussian"])
    def test_each_loss_trains_its_parts(self, loss: str, parts: set[str], latent: str) -> None:
        model = build(vectors(), latent=latent)
        assert parts_trained_by(model, loss, sequences(vectors())) == parts

    @pytest.mark.parametrize("gradient", GRADIENTS)
    def test_everything_learns_from_one_backward_pass(self, spec: Spec, gradient: str) -> None:
        model = build(spec, actor_gradient=gradient)
        model.training_step(sequences(spec), 0).backward()
        for name in (*WORLD_MODEL, "decoder", "reward_head", "continue_head", "actor", "critic"):
            assert touched(getattr(model, name)), name
        for name, parameter in model.named_parameters():
            slow = name.startswith("slow_critic.")
            assert parameter.requires_grad != slow, name
            assert (parameter.grad is None) == slow, name

    def test_the_optimizer_is_that_of_the_official_code(self) -> None:
        model = build(vectors())
        optimizer: Any = model.configure_optimizers()
        groups = optimizer.param_groups
        assert [group["lr"] for group in groups] == [2e-4, 4e-5, 1e-4]
        assert {group["eps"] for group in groups} == {1e-5}
        for group in groups:
            assert group["lr"] * group["weight_decay"] == pytest.approx(1e-6)
        assert optimizer.clip == 100.0
        parts = [{id(p) for p in group["params"]} for group in groups]
        assert parts[1] == {id(p) for p in model.actor.parameters()}
        assert parts[2] == {id(p) for p in model.critic.parameters()}
        learning = {id(p) for p in model.parameters() if p.requires_grad}
        assert set.union(*parts) == learning
        assert sum(map(len, parts)) == len(learning)


class TestStoredLatents:
    @pytest.mark.parametrize("latent", ["categorical", "gaussian"])
    def test_sequences_go_on_from_what_the_replay_kept(self, latent: str) -> None:
        model, batch = build(vectors(), latent=latent), sequences(vectors())
        # The samples of the second half must be those of the whole: no noise.
        model.rssm.latent.noise = lambda *size, device: torch.full((*size, 3, 1), 0.4)
        states = model.observe(batch)
        batch["latents"] = model.latents(states)
        for key, (shape, dtype) in model.latent_fields().items():
            assert batch["latents"][key].shape == (BATCH, STEPS, *shape)
            assert str(batch["latents"][key].dtype) == f"torch.{dtype}"
        seen = model.filter(batch)
        torch.testing.assert_close(seen.states["deter"], states["deter"][:, 1:])
        torch.testing.assert_close(seen.states["stoch"], states["stoch"][:, 1:])
        without = {key: value for key, value in batch.items() if key != "latents"}
        assert not torch.allclose(
            model.filter(without).states["deter"][:, 0], states["deter"][:, 1]
        )


def test_is_reproducible_bit_by_bit(spec: Spec) -> None:
    results = []
    for _ in range(2):
        model = build(spec)
        train(model, batch_with_an_end(spec), 3)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_explores_with_samples_of_the_policy() -> None:
    model = build(vectors("discrete"))
    model.has_learnt.fill_(True)
    with torch.no_grad():
        model.actor.out.weight.zero_()
        model.actor.out.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    obs = {"vector": torch.randn(5000, 4)}
    chosen, _ = model.act(obs, model.initial_state(5000), explore=True)
    shares = torch.bincount(chosen, minlength=3) / 5000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)
    greedy, _ = model.act(obs, model.initial_state(5000), explore=False)
    assert (greedy == 0).all()


def test_impossible_settings_are_named() -> None:
    for options, message in (
        ({"imagine_length": 1}, "imagine_length of at least 2, got 1"),
        ({"slow_every": 0}, "slow_every > 0, got 0"),
        ({"classes": 257}, "classes is 257"),
        ({"kl_balance": 1.2}, "kl_balance from 0 to 1, got 1.2"),
        ({"actor_gradient": "none"}, "no actor_gradient 'none': choose one of auto, reinforce"),
        ({"reward_transform": "log"}, "no reward_transform 'log': choose one of identity"),
        ({"latent": "beta"}, "no latent 'beta': choose one of categorical, gaussian"),
        ({"size": "huge"}, "no size 'huge': choose one of nano, dmc, atari, crafter"),
    ):
        with pytest.raises(UserError, match=message):
            DreamerV2(vectors(), **{"size": "nano", **options})
