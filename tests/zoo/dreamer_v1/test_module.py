"""Dreamer V1: its losses in closed form, what each of them trains, and acting."""

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
from torch.distributions import Normal, kl_divergence

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.dreamer_v1.module import DreamerV1
from zoo.rssm.dynamics import features
from zoo.rssm.model import Filtered

TINY = {"deter": 8, "hidden": 6, "stoch": 3, "depth": 2, "units": 6, "imagine_length": 4}
# Discounts and lambda that a mix-up of indices would not survive.
VALUES = {"discount": 0.7, "lam": 0.6, "free_nats": 0.0}
WORLD_MODEL = {"encoder", "rssm"}
OBS = {"vector": torch.tensor([[0.5, -0.3, 0.1, 0.9], [-1.0, 0.2, 0.4, -0.7]])}


def build(spec: Spec, **options: Any) -> DreamerV1:
    torch.manual_seed(0)
    model = DreamerV1(spec, size="nano", **{**TINY, **VALUES, **options})
    shake(model)
    seed_dreams(model)
    return model


def batch_with_an_end(spec: Spec) -> dict[str, Any]:
    batch = sequences(spec)
    batch["is_terminal"][0, 3] = batch["is_last"][0, 3] = batch["is_first"][0, 4] = True
    return batch


def step(model: DreamerV1, batch: dict[str, Any]) -> Filtered:
    """A training step; returns what it saw."""
    torch.manual_seed(5)
    seen = model.filter(batch)
    torch.manual_seed(5)
    model.training_step(batch, 0)
    return seen


def dreamed(model: DreamerV1, seen: Filtered) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the H imagined states, targets and weights of the first H - 1 of them."""
    starts = {key: value.detach().flatten(0, 1) for key, value in seen.states.items()}
    dream, _ = model.rssm.imagine(
        starts, lambda s, t: model.actor(features(s).detach()).sample(), model.imagine_length
    )
    x = features(dream)[:, 1:]
    assert x.shape[1] == model.imagine_length
    reward, value = model.reward_head(x).mean, model.critic(x).mean
    discount = torch.full_like(reward, model.discount)
    if model.continue_head is not None:
        discount = torch.sigmoid(model.continue_head(x).logit)
    target = lambda_targets(reward, value, discount, model.lam)
    weight = reached(discount)[:, :-1].detach()
    if model.continue_head is not None:
        weight[seen.is_terminal.flatten()] = 0.0  # nothing follows the end of an episode
    return x, target, weight


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

    def test_free_nats_are_of_the_mean_divergence(self) -> None:
        model, batch = build(vectors()), sequences(vectors())
        seen = step(model, batch)
        p, q = (Normal(d.mean, d.std) for d in (seen.posterior, seen.prior))
        kl = kl_divergence(p, q).sum((-2, -1))
        torch.testing.assert_close(model.last_losses["kl"], kl.mean().detach())
        # Steps below the free nats still count while the mean is above.
        model.free_nats = (0.5 * (kl.min() + kl.mean())).item()
        step(model, batch)
        torch.testing.assert_close(model.last_losses["kl"], kl.mean().detach())
        model.free_nats = 1.1 * kl.mean().item()
        step(model, batch)
        assert model.last_losses["kl"].item() == pytest.approx(model.free_nats)
        assert parts_trained_by(model, "kl", batch) == set()

    def test_the_defaults_are_the_papers(self) -> None:
        model = DreamerV1(vectors(), size="nano")
        assert (model.free_nats, model.discount, model.lam) == (3.0, 0.99, 0.95)
        assert (model.imagine_length, model.exploration) == (15, 0.3)
        names = ("reconstruction", "reward", "kl", "actor", "critic")
        assert model.loss_scales == dict.fromkeys(names, 1.0)

    def test_the_continue_head_learns_the_discount(self) -> None:
        batch = batch_with_an_end(vectors())
        model = build(vectors(), continue_scale=10.0)
        seen = step(model, batch)
        p = torch.sigmoid(model.continue_head(seen.features).logit)
        wanted = 0.7 * (~batch["is_terminal"][:, 1:]).float()
        assert (wanted == 0).sum() == 1
        expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
        torch.testing.assert_close(model.last_losses["continue"], expected.detach())
        assert model.loss_scales["continue"] == 10.0

    def test_without_a_continue_head_episodes_never_end(self) -> None:
        model, batch = build(vectors()), batch_with_an_end(vectors())
        step(model, batch)
        assert model.continue_head is None
        assert "continue" not in model.last_losses
        start = model.initial_state(BATCH)
        assert (model.imagine(start, None, 3).cont == 1).all()

    def test_rewards_are_learnt_in_their_unit(self) -> None:
        batch = sequences(vectors())
        plain, scaled = build(vectors()), build(vectors(), reward_unit=4.0)
        step(plain, batch)
        batch["reward"] *= 4
        step(scaled, batch)
        for key, loss in plain.last_losses.items():
            torch.testing.assert_close(scaled.last_losses[key], loss)


@pytest.mark.parametrize("continue_scale", [0.0, 1.0], ids=["endless", "with ends"])
class TestBehaviour:
    def test_losses_in_closed_form(self, spec: Spec, continue_scale: float) -> None:
        model = build(spec, continue_scale=continue_scale)
        seen = step(model, batch_with_an_end(spec))
        x, target, weight = dreamed(model, seen)
        assert target.shape == weight.shape == (BATCH * (STEPS - 1), 3)
        assert (weight[:, 0] == 0).sum() == (1 if continue_scale else 0)
        assert target.std() > 0.01
        torch.testing.assert_close(model.last_losses["actor"], -(weight * target).mean().detach())
        error = model.critic(x[:, :-1]).mean - target
        expected = 0.5 * (weight * error.square()).mean()
        torch.testing.assert_close(model.last_losses["critic"], expected.detach())

    def test_the_actor_follows_the_gradient_through_the_dynamics(
        self, spec: Spec, continue_scale: float
    ) -> None:
        model = build(spec, continue_scale=continue_scale)
        batch = batch_with_an_end(spec)
        wrt = list(model.actor.parameters())
        _, target, weight = dreamed(model, step(model, batch))
        expected = torch.autograd.grad(-(weight * target).mean(), wrt)
        torch.manual_seed(5)
        assert parts_trained_by(model, "actor", batch) == {"actor"}
        torch.manual_seed(5)
        model.zero_grad()
        model.training_step(batch, 0).backward()
        for parameter, grad in zip(wrt, expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-3)
        assert any((grad != 0).any() for grad in expected)

    def test_an_entropy_bonus_is_weighted_like_the_targets(self, continue_scale: float) -> None:
        # Of discrete actions: the entropy of a tanh-normal is an estimate.
        model = build(vectors("discrete"), continue_scale=continue_scale, entropy=0.3)
        batch = batch_with_an_end(vectors("discrete"))
        x, target, weight = dreamed(model, step(model, batch))
        probs = torch.cat(model.actor(x[:, :-1].detach()).log_probs, -1).exp()
        bonus = 0.3 * -(probs * probs.log()).sum(-1)
        assert bonus.std() > 1e-4
        expected = -(weight * (target + bonus)).mean()
        torch.testing.assert_close(model.last_losses["actor"], expected.detach())
        wrt = list(model.actor.parameters())
        torch.manual_seed(5)
        model.zero_grad()
        model.training_step(batch, 0).backward()
        for parameter, grad in zip(wrt, torch.autograd.grad(expected, wrt), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-3)

    def test_the_critic_learns_from_targets_as_constants(
        self, spec: Spec, continue_scale: float
    ) -> None:
        model = build(spec, continue_scale=continue_scale)
        batch = batch_with_an_end(spec)
        x, target, weight = dreamed(model, step(model, batch))
        error = model.critic(x[:, :-1].detach()).mean - target.detach()
        wrt = list(model.critic.parameters())
        expected = torch.autograd.grad(0.5 * (weight * error.square()).mean(), wrt)
        assert parts_trained_by(model, "critic", batch) == {"critic"}
        torch.manual_seed(5)
        model.zero_grad()
        model.training_step(batch, 0).backward()
        for parameter, grad in zip(wrt, expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-3)


class TestGradientFlow:
    @pytest.mark.parametrize(
        ("loss", "parts"),
        [
            ("reconstruction", WORLD_MODEL | {"decoder"}),
            ("reward", WORLD_MODEL | {"reward_head"}),
            ("continue", WORLD_MODEL | {"continue_head"}),
            ("kl", WORLD_MODEL),
            ("actor", {"actor"}),
            ("critic", {"critic"}),
        ],
    )
    def test_each_loss_trains_its_parts(self, loss: str, parts: set[str]) -> None:
        model = build(vectors(), continue_scale=1.0)
        assert parts_trained_by(model, loss, sequences(vectors())) == parts

    def test_everything_learns_from_one_backward_pass(self, spec: Spec) -> None:
        model = build(spec, continue_scale=1.0)
        model.training_step(sequences(spec), 0).backward()
        for name in (*WORLD_MODEL, "decoder", "reward_head", "continue_head", "actor", "critic"):
            assert touched(getattr(model, name)), name
        assert all(p.requires_grad for p in model.parameters())  # nothing is left frozen

    def test_model_actor_and_critic_are_clipped_apart_with_rates_of_their_own(self) -> None:
        model = build(vectors(), continue_scale=1.0)
        optimizer: Any = model.configure_optimizers()
        groups = optimizer.param_groups
        assert [group["lr"] for group in groups] == [6e-4, 8e-5, 8e-5]
        assert {group["eps"] for group in groups} == {1e-7}
        assert {group["weight_decay"] for group in groups} == {0.0}
        assert optimizer.clip == 100.0
        parts = [{id(p) for p in group["params"]} for group in groups]
        assert parts[1] == {id(p) for p in model.actor.parameters()}
        assert parts[2] == {id(p) for p in model.critic.parameters()}
        assert set.union(*parts) == {id(p) for p in model.parameters()}
        assert sum(map(len, parts)) == len(list(model.parameters()))


class TestStarts:
    def counted(self, **options: Any) -> int:
        model, found = build(vectors(), **options), []
        imagine = model.rssm.imagine
        model.rssm.imagine = lambda s, *rest: (
            found.append(len(s["deter"])),
            imagine(s, *rest),
        )[1]
        assert model.training_step(sequences(vectors()), 0).isfinite()
        return found[0]

    @pytest.mark.parametrize("continue_scale", [0.0, 1.0])
    def test_from_all_steps_or_from_the_last(self, continue_scale: float) -> None:
        for last, starts in ((0, STEPS - 1), (1, 1), (2, 2), (99, STEPS - 1)):
            found = self.counted(imagine_last=last, continue_scale=continue_scale)
            assert found == BATCH * starts

    def test_ends_are_found_among_the_last_steps(self) -> None:
        batch = sequences(vectors())
        batch["is_terminal"][0, -2] = batch["is_terminal"][1, 1] = True
        model = build(vectors(), continue_scale=1.0, imagine_last=2)
        seen = step(model, batch)
        parts = {key: value[:, -2:] for key, value in seen.states.items()}
        recent = seen._replace(states=parts, is_terminal=seen.is_terminal[:, -2:])
        _, target, weight = dreamed(model, recent)
        assert (weight[:, 0] == 0).tolist() == [True, False, False, False]
        torch.testing.assert_close(model.last_losses["actor"], -(weight * target).mean().detach())


class TestActing:
    def acted(self, model: DreamerV1, explore: bool, seed: int = 3) -> Tensor:
        torch.manual_seed(seed)
        return model.act(OBS, model.initial_state(BATCH), explore=explore)[0]

    def test_explores_with_noise_on_samples(self) -> None:
        silent, loud = build(vectors(), exploration=0.0), build(vectors(), exploration=0.3)
        for model in (silent, loud):
            model.has_learnt.fill_(True)
        noise = self.acted(loud, True) - self.acted(silent, True)
        assert (noise != 0).all()
        assert torch.equal(self.acted(loud, False), self.acted(silent, False))

    def test_the_first_actions_are_random(self) -> None:
        model = build(vectors(), exploration=0.0)
        with torch.no_grad():
            model.actor.out.bias.fill_(100.0)
            model.actor.std.bias.fill_(-100.0)
        actions = torch.stack([self.acted(model, True, seed) for seed in range(50)])
        scaled = model.actions.encode(actions)
        assert scaled.min() < -0.8
        assert scaled.max() > 0.8
        assert scaled.mean().abs() < 0.2
        expected = torch.tensor([[2.0, 1.0]] * BATCH)
        torch.testing.assert_close(self.acted(model, False), expected, atol=1e-3, rtol=0)
        model.after_update()
        assert model.state_dict()["has_learnt"]  # a loaded policy acts at once
        torch.testing.assert_close(self.acted(model, True), expected, atol=1e-3, rtol=0)

    def test_a_new_policy_is_as_wide_as_asked(self) -> None:
        for width in (5.0, 1.0):
            model = DreamerV1(vectors(), size="nano", init_std=width)
            std = model.actor(torch.zeros(1, model.rssm.feature_size)).std
            torch.testing.assert_close(std, torch.full((1, 2), width + 1e-4))


class TestDreaming:
    def test_cont_is_without_the_discount(self) -> None:
        model = build(vectors(), continue_scale=1.0)
        assert model.continue_head is not None
        with torch.no_grad():
            model.continue_head.out.weight.zero_()
            for probability, cont in ((0.35, 0.5), (0.7, 1.0), (0.9, 1.0)):
                model.continue_head.out.bias.copy_(torch.logit(torch.tensor(probability)))
                found = model.imagine(model.initial_state(BATCH), None, 1).cont
                torch.testing.assert_close(found, torch.full((BATCH, 1), cont))


def test_is_reproducible_bit_by_bit(spec: Spec) -> None:
    results = []
    for _ in range(2):
        model = build(spec, continue_scale=1.0)
        train(model, batch_with_an_end(spec), 3)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_impossible_settings_are_named() -> None:
    for options, message in (
        ({"imagine_length": 1}, "imagine_length of at least 2, got 1"),
        ({"imagine_last": -1}, "imagine_last of at least 0, got -1"),
        ({"actor_lr": 0.0}, "actor_lr > 0, got 0"),
        ({"init_std": 0.0}, "init_std > 0, got 0"),
        ({"lam": 1.5}, "lam from 0 to 1, got 1.5"),
        ({"size": "huge"}, "no size 'huge': choose one of nano, paper"),
    ):
        with pytest.raises(UserError, match=message):
            DreamerV1(vectors(), **{"size": "nano", **options})
