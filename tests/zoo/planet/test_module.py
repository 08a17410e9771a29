"""PlaNet: its losses in closed form, latent overshooting, quantised images, and planning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latent_models import (
    BATCH,
    STEPS,
    images,
    parts_trained_by,
    sequences,
    shake,
    train,
    vectors,
)
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.nets.distributions import Binary, DiagonalNormal, UnitNormal
from zoo.planet.module import PlaNet
from zoo.planning import continued_return, predicted_return
from zoo.rssm.model import Filtered

TINY = {"deter": 8, "hidden": 6, "stoch": 3, "depth": 2, "units": 6}
PLAN = {"horizon": 2, "iterations": 3, "candidates": 30, "elites": 5}
WORLD_MODEL = {"encoder", "rssm"}
OBS = {"vector": torch.tensor([[0.5, -0.3, 0.1, 0.9], [-1.0, 0.2, 0.4, -0.7]])}


def build(spec: Spec, **options: Any) -> PlaNet:
    torch.manual_seed(0)
    model = PlaNet(spec, size="nano", **{**TINY, **PLAN, **options})
    shake(model)
    return model


def step(model: PlaNet, batch: dict[str, Any]) -> Filtered:
    """A training step; returns what it saw."""
    torch.manual_seed(5)
    seen = model.filter(batch)
    torch.manual_seed(5)
    model.training_step(batch, 0)
    return seen


def divergence(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    return kl_divergence(Normal(p.mean, p.std), Normal(q.mean, q.std)).sum((-2, -1))


class TestLosses:
    def test_reconstruction_and_reward_are_half_squared_errors(self) -> None:
        model, batch = build(images()), sequences(images())
        seen = step(model, batch)
        outputs = model.decoder(seen.features)
        pixels = seen.obs["image"] - 0.5  # quantised, with noise
        expected = 0.5 * (outputs["image"].mean - pixels).square().flatten(2).sum(-1)
        vector = outputs["vector"].mean - batch["obs"]["vector"][:, 1:]
        expected = expected + 0.5 * vector.square().sum(-1)
        torch.testing.assert_close(model.last_losses["reconstruction"], expected.mean().detach())
        error = model.reward_head(seen.features).mean - batch["reward"][:, 1:]
        expected = 0.5 * error.square().mean()
        torch.testing.assert_close(model.last_losses["reward"], expected.detach())

    def test_free_nats_are_taken_off_the_divergence_of_each_step(self) -> None:
        model, batch = build(vectors()), sequences(vectors())
        kl = divergence(*step(model, batch)[-2:])
        assert kl.shape == (BATCH, STEPS - 1)
        model.free_nats = kl.median().item()
        assert kl.min() < model.free_nats < kl.max()
        step(model, batch)
        expected = torch.relu(kl - model.free_nats).mean()
        torch.testing.assert_close(model.last_losses["kl"], expected.detach())

    def test_three_nats_are_free_and_rewards_count_ten_times(self) -> None:
        model = build(vectors())
        assert model.free_nats == 3.0
        assert model.loss_scales == {"reconstruction": 1.0, "reward": 10.0, "kl": 1.0}
        total = model.training_step(sequences(vectors()), 0)
        expected = sum(model.loss_scales[key] * loss for key, loss in model.last_losses.items())
        torch.testing.assert_close(total.detach(), expected)

    def test_the_continue_head_learns_the_probability_to_go_on(self) -> None:
        batch = sequences(vectors())
        batch["is_terminal"][0, 3] = True
        assert build(vectors()).continue_head is None
        model = build(vectors(), continue_scale=1.0)
        seen = step(model, batch)
        p = torch.sigmoid(model.continue_head(seen.features).logit)
        ended = batch["is_terminal"][:, 1:]
        expected = -torch.where(ended, 1 - p, p).log().mean()
        torch.testing.assert_close(model.last_losses["continue"], expected.detach())

    @pytest.mark.parametrize(
        ("loss", "parts"),
        [
            ("reconstruction", WORLD_MODEL | {"decoder"}),
            ("reward", WORLD_MODEL | {"reward_head"}),
            ("continue", WORLD_MODEL | {"continue_head"}),
            ("kl", WORLD_MODEL),
            ("overshooting", WORLD_MODEL),
        ],
    )
    def test_each_loss_trains_its_parts(self, loss: str, parts: set[str]) -> None:
        model = build(vectors(), free_nats=0.0, continue_scale=1.0, overshooting=3)
        assert parts_trained_by(model, loss, sequences(vectors())) == parts


class TestOvershooting:
    DISTANCE = 3

    def overshot(self, batch: dict[str, Any], **options: Any) -> tuple[PlaNet, Filtered]:
        model = build(vectors(), overshooting=self.DISTANCE, free_nats=0.2, **options)
        return model, step(model, batch)

    def reference(self, model: PlaNet, seen: Filtered, batch: dict[str, Any]) -> Tensor:
        """From each step roll out open loop, and compare with the posteriors ahead."""
        action = model.actions.encode(batch["action"])[:, 1:]  # the context's left out
        found = []
        length = seen.reward.shape[1]
        for b in range(BATCH):
            for start in range(length):
                state = {key: value[b : b + 1, start] for key, value in seen.states.items()}
                for distance in range(1, self.DISTANCE + 1):
                    target = start + distance
                    if target == length or batch["is_first"][b, target + 1]:
                        break
                    given = action[b : b + 1, target - 1]
                    dream, _ = model.rssm.imagine(state, lambda s, t, a=given: a, 1)
                    state = {key: value[:, 1] for key, value in dream.items()}
                    if distance == 1:  # the standard bound
                        continue
                    prior = model.rssm.prior(state["deter"])
                    q = DiagonalNormal(
                        seen.posterior.mean[b : b + 1, target],
                        seen.posterior.std[b : b + 1, target],
                    )
                    assert isinstance(prior, DiagonalNormal)
                    found.append(torch.relu(divergence(q, prior) - model.free_nats))
        return torch.cat(found)

    @pytest.fixture
    def constant_noise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randn", lambda *size, device=None: torch.full(size, 0.37))

    @pytest.mark.usefixtures("constant_noise")
    @pytest.mark.parametrize("case", ["one episode", "an episode ends"])
    def test_equals_the_loop(self, case: str) -> None:
        batch = sequences(vectors())
        if case == "an episode ends":
            batch["is_first"][1, 4] = batch["is_last"][1, 3] = True
        model, seen = self.overshot(batch)
        expected = self.reference(model, seen, batch)
        # Of 5 steps: distance 2 from three of them, distance 3 from two.
        ended = case == "an episode ends"  # leaves 3 and 2 steps of the second sequence
        assert len(expected) == 5 + (1 if ended else 5)
        assert (expected > 0).any()
        torch.testing.assert_close(model.last_losses["overshooting"], expected.mean().detach())

    @pytest.mark.usefixtures("constant_noise")
    def test_distances_beyond_the_sequence_are_left_out(self) -> None:
        batch = sequences(vectors())
        model, seen = self.overshot(batch)
        expected = model.last_losses["overshooting"]
        long = build(vectors(), overshooting=50, free_nats=0.2)
        step(long, batch)
        self.DISTANCE = 50
        reference = self.reference(long, seen, batch)
        assert len(reference) == BATCH * (3 + 2 + 1)
        torch.testing.assert_close(long.last_losses["overshooting"], reference.mean().detach())
        assert not torch.equal(long.last_losses["overshooting"], expected)

    def test_nothing_to_overshoot_costs_nothing(self) -> None:
        batch = sequences(vectors())
        batch["is_first"][:] = True
        model, _ = self.overshot(batch)
        assert model.last_losses["overshooting"] == 0

    def test_posteriors_are_targets_without_gradient(self) -> None:
        """As in the official code they still get one as the states from which dreams start."""
        model = build(vectors(), overshooting=self.DISTANCE, free_nats=0.0)
        batch = sequences(vectors())
        action = model.actions.encode(batch["action"])

        def gradients(seen: Filtered) -> list[Tensor | None]:
            wrt = [
                model.rssm.posterior_out.weight,
                model.encoder.mlp[0].linear.weight,
                model.rssm.prior_net[1].weight,
                model.rssm.core.inputs.linear.weight,
            ]
            loss = model._overshoot(seen, action)
            return list(torch.autograd.grad(loss, wrt, allow_unused=True))

        torch.manual_seed(5)
        seen = model.filter(batch)
        fixed = seen._replace(states={key: value.detach() for key, value in seen.states.items()})
        of_posterior, of_encoder, of_prior, of_core = gradients(fixed)
        assert of_posterior is None
        assert of_encoder is None
        assert of_prior is not None and (of_prior != 0).any()
        assert of_core is not None and (of_core != 0).any()
        of_posterior, of_encoder, *_ = gradients(seen)
        assert of_posterior is not None and (of_posterior != 0).any()
        assert of_encoder is not None and (of_encoder != 0).any()

    @pytest.mark.parametrize("distance", [0, 1])
    def test_short_distances_are_the_standard_bound(self, distance: int) -> None:
        model = build(vectors(), overshooting=distance)
        step(model, sequences(vectors()))
        assert "overshooting" not in model.last_losses


class TestQuantisation:
    LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_colours_keep_their_upper_bits(self, bits: int) -> None:
        model, bins = build(images(), bits=bits), 2**bits
        found = model.preprocess({"image": self.LEVELS})["image"]
        assert found.min() >= 0
        assert found.max() < 1
        expected = torch.arange(256) // 2 ** (8 - bits)
        assert (found * bins).floor().flatten().tolist() == expected.tolist()

    def test_noise_fills_the_gaps(self) -> None:
        torch.manual_seed(0)
        obs = {"image": torch.full((1, 100, 100, 1), 77, dtype=torch.uint8)}
        found = build(images()).preprocess(obs)["image"] * 32 - 77 // 8
        assert 0 <= found.min() < 0.001
        assert 0.999 < found.max() <= 1
        assert found.mean().item() == pytest.approx(0.5, abs=0.01)
        assert found.var().item() == pytest.approx(1 / 12, abs=0.005)

    def test_vectors_stay(self) -> None:
        obs = sequences(images())["obs"]
        assert torch.equal(build(images()).preprocess(obs)["vector"], obs["vector"])

    def test_impossible_numbers_of_bits_are_named(self) -> None:
        for bits in (0, 9):
            with pytest.raises(UserError, match=f"bits from 1 to 8, got {bits}"):
                build(images(), bits=bits)


class Judge(nn.Module):
    """A reward head that likes one direction of h."""

    def __init__(self, direction: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.direction, self.offset = direction, offset

    def forward(self, x: Tensor) -> UnitNormal:
        return UnitNormal(x[..., : len(self.direction)] @ self.direction + self.offset, 0)


class End(nn.Module):
    """A continue head for which the episode ends where the judge gives less than a threshold."""

    def __init__(self, judge: Judge, threshold: Tensor) -> None:
        super().__init__()
        self.judge, self.threshold = judge, threshold

    def forward(self, x: Tensor) -> Binary:
        return Binary(1e6 * (self.judge(x).mean - self.threshold))


class TestPlanning:
    def acted(self, model: PlaNet, explore: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Actions, and the latent states in which they were chosen."""
        torch.manual_seed(3)
        action, state = model.act(OBS, model.initial_state(BATCH), explore=explore)
        return action, {key: state[key] for key in ("deter", "stoch")}

    def rewards(self, model: PlaNet, latent: dict[str, Tensor], actions: Tensor) -> Tensor:
        """Reward (B, N) of each of N actions, imagined for one step."""
        starts = {key: value.repeat_interleave(len(actions), 0) for key, value in latent.items()}
        wanted = actions.repeat(BATCH, *(1,) * (actions.dim() - 1)).unsqueeze(1)
        return model.imagine(starts, wanted, 1).reward.view(BATCH, -1)

    @pytest.mark.parametrize("seed", range(5))
    def test_takes_the_better_discrete_action(self, seed: int) -> None:
        model = build(vectors("discrete"), horizon=1)
        torch.manual_seed(seed)
        model.reward_head = Judge(torch.randn(TINY["deter"]))
        action, latent = self.acted(model)
        rewards = self.rewards(model, latent, torch.arange(3))
        assert action.tolist() == rewards.argmax(1).tolist()

    def test_plans_in_dreams_of_its_own_too(self) -> None:
        model = build(vectors("discrete"), horizon=1, exploration=0.0)
        torch.manual_seed(0)
        model.reward_head = Judge(torch.randn(TINY["deter"]))
        _, latent = self.acted(model)
        dream = model.imagine(latent, None, 2)
        rewards = self.rewards(model, latent, torch.arange(3))
        assert dream.action[:, 0].tolist() == rewards.argmax(1).tolist()
        torch.testing.assert_close(dream.reward[:, 0], rewards.amax(1))

    @pytest.mark.parametrize("seed", range(3))
    def test_finds_the_best_box_action(self, seed: int) -> None:
        model = build(vectors(), horizon=1, iterations=8, candidates=100, elites=10)
        torch.manual_seed(seed)
        model.reward_head = Judge(torch.randn(TINY["deter"]))
        action, latent = self.acted(model)
        ticks, low, high = torch.linspace(0, 1, 41), model.actions.low, model.actions.high
        candidates = low + torch.cartesian_prod(ticks, ticks) * (high - low)
        grid = self.rewards(model, latent, candidates)
        taken = self.rewards(model, latent, action).diagonal()
        spread = grid.max(1).values - grid.min(1).values
        assert (spread > 0.05).all()
        assert ((grid.max(1).values - taken) < 0.02 * spread).all()

    @pytest.mark.parametrize("means", [True, False])
    def test_plans_over_the_means_of_the_latents_only_if_told_to(
        self, means: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, scores = build(vectors(), plan_means=means), []

        def plan(dreams: Any, state: dict[str, Tensor], *_: Any, **__: Any) -> Any:
            actions = torch.zeros(BATCH, 5, 2)
            scores.extend(dreams.imagine(state, actions, 5).reward for _ in range(2))
            return SimpleNamespace(action=actions)

        monkeypatch.setattr(model, "planner", SimpleNamespace(plan=plan))
        _, latent = self.acted(model)
        assert torch.equal(*scores) == means
        again = [model.imagine(latent, torch.zeros(BATCH, 5, 2), 5).reward for _ in range(2)]
        assert not torch.equal(*again)  # everything else still sees samples

    def test_explores_with_noise_once_there_is_something_to_exploit(self) -> None:
        loud = build(vectors(), horizon=1, exploration=0.3)
        silent = build(vectors(), horizon=1, exploration=0.0)
        exploited, _ = self.acted(loud)
        for model in (loud, silent):
            assert not torch.equal(self.acted(model, explore=True)[0], exploited)  # at random
            model.has_learnt.fill_(True)
            assert torch.equal(self.acted(model)[0], exploited)
        assert torch.equal(self.acted(silent, explore=True)[0], exploited)
        assert not torch.equal(self.acted(loud, explore=True)[0], exploited)

    def test_rewards_count_as_long_as_the_episode_may_go_on(self) -> None:
        asked = []

        class Spy:
            def plan(self, *arguments: Any, score: Any) -> Any:
                asked.append(score)
                raise StopIteration

        for scale in (0.0, 1.0):
            model = build(vectors(), continue_scale=scale)
            model.planner = Spy()
            with pytest.raises(StopIteration):
                self.acted(model)
        assert asked == [predicted_return, continued_return]

    def test_avoids_the_end_of_an_episode(self) -> None:
        """Rewards are 1 everywhere, and the episode goes on only after one of the actions."""
        model = build(vectors("discrete"), horizon=2, continue_scale=1.0, candidates=100)
        nothing = torch.zeros(TINY["deter"])
        torch.manual_seed(1)
        judge = Judge(torch.randn(TINY["deter"]))
        _, latent = self.acted(model)
        model.reward_head = judge
        likes = self.rewards(model, latent, torch.arange(3))
        model.reward_head = Judge(nothing, 1.0)
        for row in range(BATCH):
            best, second = likes[row].sort(descending=True).values[:2]
            model.continue_head = End(judge, (best + second) / 2)
            action, _ = self.acted(model)
            assert action[row] == likes[row].argmax()


def test_the_optimizer_is_one_adam_over_everything() -> None:
    model = build(vectors(), lr=0.02, clip=7.0, continue_scale=1.0)
    optimizer: Any = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    settings = (group["lr"], group["eps"], group["weight_decay"], optimizer.clip)
    assert settings == (0.02, 1e-4, 0.0, 7.0)


def test_the_gru_starts_by_remembering() -> None:
    cell: Any = PlaNet(vectors(), size="nano", **TINY).rssm.core.cell
    assert (cell.bias_ih + cell.bias_hh).tolist() == [1.0] * 16 + [0.0] * 8


@pytest.mark.parametrize("ablation", ["deterministic", "stochastic"])
def test_ablations_reach_the_state_space_model(ablation: str) -> None:
    model = build(vectors(), **{ablation: False})
    assert getattr(model.rssm, ablation) is False
    train(model, sequences(vectors()), 2)
    assert all(loss.isfinite() for loss in model.last_losses.values())


def test_rewards_are_learnt_in_their_unit_and_dreamed_in_the_environments() -> None:
    batch = sequences(vectors())
    plain, scaled = build(vectors()), build(vectors(), reward_unit=4.0)
    step(plain, batch)
    batch["reward"] *= 4
    step(scaled, batch)
    torch.testing.assert_close(scaled.last_losses["reward"], plain.last_losses["reward"])
    start = plain.initial_state(BATCH)
    dreams = []
    for model in (plain, scaled):
        torch.manual_seed(1)
        dreams.append(model.imagine(start, batch["action"], 3).reward)
    torch.testing.assert_close(dreams[1], 4 * dreams[0])
    with pytest.raises(UserError, match="reward_unit > 0, got 0"):
        build(vectors(), reward_unit=0.0)


def test_learns_a_constant_reward() -> None:
    batch = sequences(vectors())
    batch["reward"][:] = 2.0
    model = build(vectors(), lr=0.01)
    train(model, batch, 1)
    before = model.last_losses["reward"]
    train(model, batch, 30)
    assert model.last_losses["reward"] < 0.2 * before
