"""DreamerV3 as a whole: what starts where, which loss trains what, and acting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from latent_models import (
    ACTIONS,
    BATCH,
    STEPS,
    VECTOR,
    parts_trained_by,
    sequences,
    shake,
    touched,
    train,
    vectors,
)
from torch import Tensor

from datamodules.spec import ArraySpec, Spec
from zoo.dreamer_v3.module import LOSS_SCALES, DreamerV3

IMAGE = {"image": ArraySpec((48, 48, 3), "uint8")}
SPECS = {
    **{kind: vectors(kind) for kind in ACTIONS},
    "image": Spec(IMAGE, ACTIONS["discrete"]),
    "image and vector": Spec(VECTOR | IMAGE, ACTIONS["discrete"]),
}
TINY = {"deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "depth": 2, "units": 8, "bins": 15}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> Spec:
    return SPECS[request.param]


@pytest.fixture
def constant_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.full(size, 0.37))


def build(spec: Spec, seed: int = 0, amount: float = 0.2, **options: Any) -> DreamerV3:
    """A tiny model whose zero-initialised heads are shaken, so that gradients pass them."""
    torch.manual_seed(seed)
    model = DreamerV3(spec, size="nano", **{**TINY, "imagine_length": 3, **options})
    shake(model, amount)
    return model


def make_batch(spec: Spec, latents: bool = True) -> dict[str, Any]:
    batch = sequences(spec)
    batch["step_id"] = torch.arange(STEPS).expand(BATCH, STEPS).contiguous()
    if latents:
        generator = torch.Generator().manual_seed(4)
        stoch = torch.randint(
            TINY["classes"], (BATCH, STEPS, TINY["stoch"]), generator=generator, dtype=torch.uint8
        )
        deter = torch.empty(BATCH, STEPS, TINY["deter"]).uniform_(-1, 1, generator=generator)
        batch["latents"] = {"deter": deter, "stoch": stoch}
    return batch


def written_states(model: DreamerV3, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The latents that a training step hands back to the replay, {key: (B, T, ...)}."""
    caught: list[tuple[Tensor, dict[str, Tensor]]] = []
    model.write_back = lambda ids, latents: caught.append((ids, latents))  # type: ignore
    torch.manual_seed(5)
    model.training_step(batch, 0)
    ((step_id, latents),) = caught
    assert torch.equal(step_id, batch["step_id"][:, 1:])
    return latents


class TestTrainingStep:
    def test_every_parameter_gets_a_finite_gradient(self, spec: Spec) -> None:
        model = build(spec, amount=0.0)
        loss = model.training_step(make_batch(spec), 0)
        loss.backward()
        assert loss.isfinite()
        assert model.last_losses.keys() == LOSS_SCALES.keys()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert name.startswith("slow_critic.")
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_the_loss_is_the_weighted_sum(self) -> None:
        spec = SPECS["discrete"]
        model = build(spec, loss_scales={"reward": 0.5})
        total = model.training_step(make_batch(spec), 0)
        scales = {**LOSS_SCALES, "reward": 0.5}
        expected = sum(scales[key] * value for key, value in model.last_losses.items())
        torch.testing.assert_close(total.detach(), expected)

    def test_trains_in_bfloat16(self, spec: Spec) -> None:
        model = build(spec)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.training_step(make_batch(spec), 0)
        loss.backward()
        assert loss.isfinite()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients)

    def test_is_reproducible_bit_by_bit(self) -> None:
        spec = SPECS["box"]
        results = []
        for _ in range(2):
            model = build(spec, warmup=0)
            train(model, make_batch(spec), 3)
            results.append(model.state_dict())
        assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])

    def test_imagination_can_start_from_the_last_steps_only(self) -> None:
        spec, batch = SPECS["discrete"], make_batch(SPECS["discrete"])
        starts = []
        for last in (0, 2, 99):
            model = build(spec, imagine_last=last)
            dream = model.rssm.imagine
            model.rssm.imagine = lambda s, *rest, dream=dream: (  # type: ignore[method-assign]
                starts.append(len(s["deter"])),
                dream(s, *rest),
            )[1]
            assert model.training_step(batch, 0).isfinite()
        assert starts == [BATCH * (STEPS - 1), BATCH * 2, BATCH * (STEPS - 1)]

    @pytest.mark.parametrize("contdisc", [True, False])
    def test_the_continue_head_learns_the_discount(self, contdisc: bool) -> None:
        spec, batch = SPECS["discrete"], make_batch(SPECS["discrete"])
        model = build(spec, contdisc=contdisc, horizon=10)
        logit = 1.5
        with torch.no_grad():
            model.continue_head.out.weight.zero_()
            model.continue_head.out.bias.fill_(logit)
        batch["is_terminal"][0, 2] = True
        model.training_step(batch, 0)
        p = 1 / (1 + torch.tensor(-logit).exp())
        targets = [0.9 if contdisc else 1.0] * (BATCH * (STEPS - 1) - 1) + [0.0]
        entropy = [-(y * p.log() + (1 - y) * (1 - p).log()) for y in targets]
        torch.testing.assert_close(model.last_losses["continue"], torch.stack(entropy).mean())

    def test_free_nats_are_of_each_step_after_the_sum_over_latents(self) -> None:
        spec, batch = SPECS["discrete"], make_batch(SPECS["discrete"])
        model = build(spec)
        torch.manual_seed(5)
        seen = model.filter(batch)
        kl = seen.posterior.kl(seen.prior)
        assert kl.shape == (BATCH, STEPS - 1)
        model.free_nats = kl.median().item()
        assert kl.min() < model.free_nats < kl.max()
        torch.manual_seed(5)
        model.training_step(batch, 0)
        expected = kl.clamp(min=model.free_nats).mean().detach()
        assert expected > max(kl.mean().item(), model.free_nats)
        for side in ("dynamics", "representation"):
            torch.testing.assert_close(model.last_losses[side], expected)

    def test_steps_below_the_free_nats_train_nothing(self) -> None:
        batch = make_batch(SPECS["discrete"])
        for side in ("dynamics", "representation"):
            assert parts_trained_by(build(SPECS["discrete"], free_nats=1e3), side, batch) == set()


class TestAlignment:
    def test_the_filter_starts_from_the_stored_latents_of_the_context(self) -> None:
        spec = SPECS["discrete"]
        model, batch = build(spec), make_batch(spec)
        base = written_states(model, batch)["deter"]
        for key, changes in ((0, True), (1, False), (3, False)):
            other = make_batch(spec)
            other["latents"]["deter"][:, key] *= -1
            moved = not torch.equal(written_states(model, other)["deter"], base)
            assert moved == changes
        other = make_batch(spec)
        other["latents"]["stoch"][:, 0] = (other["latents"]["stoch"][:, 0] + 1) % 4
        assert not torch.equal(written_states(model, other)["deter"], base)
        without = make_batch(spec, latents=False)
        zeros = make_batch(spec)
        zeros["latents"]["deter"].zero_()
        assert not torch.equal(written_states(model, without)["deter"], base)
        assert not torch.equal(written_states(model, zeros)["deter"], base)

    def test_stored_latents_do_not_matter_where_an_episode_begins(self) -> None:
        spec = SPECS["discrete"]
        model, batch = build(spec), make_batch(spec)
        batch["is_first"][:, 1] = True
        base = written_states(model, batch)["deter"]
        batch["latents"]["deter"] = -batch["latents"]["deter"]
        assert torch.equal(written_states(model, batch)["deter"], base)

    @pytest.mark.parametrize("step", [0, 2, STEPS - 1])
    def test_an_action_reaches_the_next_step_and_no_earlier_one(self, step: int) -> None:
        spec = SPECS["discrete"]
        model, batch = build(spec), make_batch(spec)
        base = written_states(model, batch)["deter"]
        batch["action"][:, step] = (batch["action"][:, step] + 1) % 3
        changed = (written_states(model, batch)["deter"] != base).any(-1).any(0)
        # Column i of what is written back is step i + 1 of the batch.
        assert changed.tolist() == [i + 1 > step for i in range(STEPS - 1)]

    def test_an_observation_reaches_the_latent_of_its_own_step(self) -> None:
        spec = SPECS["discrete"]
        model, batch = build(spec), make_batch(spec)
        base = written_states(model, batch)
        batch["obs"]["vector"][:, 3] = 100.0
        other = written_states(model, batch)
        deter = (other["deter"] != base["deter"]).any(-1).any(0)
        assert deter.tolist() == [False, False, False, True, True]
        assert torch.equal(other["stoch"][:, :2], base["stoch"][:, :2])
        assert not torch.equal(other["stoch"][:, 2], base["stoch"][:, 2])

    def test_what_is_written_back_fits_the_latent_fields(self, spec: Spec) -> None:
        model = build(spec)
        latents = written_states(model, make_batch(spec))
        fields = model.latent_fields()
        assert latents.keys() == fields.keys()
        for key, (shape, dtype) in fields.items():
            assert latents[key].shape == (BATCH, STEPS - 1, *shape)
            assert str(latents[key].dtype) == f"torch.{dtype}"
            assert not latents[key].requires_grad

    @pytest.mark.usefixtures("constant_noise")
    def test_stored_latents_restore_the_state(self) -> None:
        spec = SPECS["discrete"]
        model, batch = build(spec), make_batch(spec)
        states = model.observe(batch)
        batch["latents"] = model.latents(states)
        again = written_states(model, batch)
        torch.testing.assert_close(again["deter"], states["deter"][:, 1:])


class TestGradientFlow:
    """With one loss at a time, which parts learn."""

    world_model = frozenset({"encoder", "rssm"})

    def parts(self, name: str, apart: bool = False) -> tuple[DreamerV3, set[str]]:
        spec = SPECS["discrete"]
        model = build(spec, free_nats=0.0)
        batch = make_batch(spec)
        batch["is_first"][:] = apart
        return model, parts_trained_by(model, name, batch)

    @pytest.mark.parametrize(
        ("loss", "heads", "into_world_model"),
        [
            ("policy", {"actor"}, False),
            ("value", {"critic"}, False),
            ("replay_value", {"critic"}, True),
            ("reward", {"reward_head"}, True),
            ("continue", {"continue_head"}, True),
            ("reconstruction", {"decoder"}, True),
            ("dynamics", set(), True),
            ("representation", set(), True),
        ],
    )
    def test_each_loss_trains_its_parts(
        self, loss: str, heads: set[str], into_world_model: bool
    ) -> None:
        _, learning = self.parts(loss)
        assert learning == heads | (self.world_model if into_world_model else set())

    def test_dynamics_and_representation_train_opposite_sides(self) -> None:
        # Where every step begins an episode nothing flows through later states.
        model, learning = self.parts("dynamics", apart=True)
        assert learning == {"rssm"}
        assert touched(model.rssm.prior_net)
        assert not touched(model.rssm.posterior_out)
        model, learning = self.parts("representation", apart=True)
        assert learning == {"encoder", "rssm"}
        assert not touched(model.rssm.prior_net)
        assert touched(model.rssm.posterior_out)


class TestAblations:
    @pytest.mark.parametrize(
        "options",
        [
            {"latent": "gaussian"},
            {"deterministic": False},
            {"stochastic": False},
            {"two_hot": False},
        ],
        ids=str,
    )
    def test_trains_and_acts(self, options: dict[str, Any]) -> None:
        spec = SPECS["discrete"]
        model, batch = build(spec, **options), make_batch(spec, latents=False)
        latents = written_states(model, batch)
        for key, (shape, dtype) in model.latent_fields().items():
            assert latents[key].shape == (BATCH, STEPS - 1, *shape)
            assert str(latents[key].dtype) == f"torch.{dtype}"
        batch["latents"] = model.latents(model.observe(batch))
        train(model, batch, 2)
        assert all(loss.isfinite() for loss in model.last_losses.values())
        obs = {key: value[:, 0] for key, value in batch["obs"].items()}
        action, _ = model.act(obs, model.initial_state(BATCH), explore=True)
        assert action.shape == (BATCH,)


def test_rewards_are_learnt_in_their_unit_and_dreamed_in_the_environments() -> None:
    spec, batch = SPECS["discrete"], make_batch(SPECS["discrete"])
    plain, scaled = build(spec), build(spec, reward_unit=4.0)
    for model, factor in ((plain, 1), (scaled, 4)):
        torch.manual_seed(5)
        model.training_step({**batch, "reward": factor * batch["reward"]}, 0)
    for key, loss in plain.last_losses.items():  # the value of replayed rewards, too
        torch.testing.assert_close(scaled.last_losses[key], loss)
    dreams = []
    for model in (plain, scaled):
        torch.manual_seed(1)
        dreams.append(model.imagine(model.initial_state(BATCH), batch["action"], 3).reward)
    torch.testing.assert_close(dreams[1], 4 * dreams[0])


def test_the_slow_critic_follows_the_critic_after_each_update() -> None:
    spec = SPECS["discrete"]
    model = build(spec, warmup=0, slow_rate=0.25)
    slow = [p.clone() for p in model.slow_critic.parameters()]
    train(model, make_batch(spec), 1)
    critic, after = model.critic.parameters(), model.slow_critic.parameters()
    for old, fast, new in zip(slow, critic, after, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * fast)
        assert not new.requires_grad


def test_a_new_slow_critic_equals_the_critic() -> None:
    model = build(SPECS["discrete"], amount=0.0)
    critic, slow = model.critic.state_dict(), model.slow_critic.state_dict()
    assert all(torch.equal(slow[key], value) for key, value in critic.items())


def test_the_optimizer_has_everything_that_learns_and_nothing_else() -> None:
    model = build(SPECS["discrete"], lr=1e-3, agc=0.2, warmup=7)
    (group,) = model.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if not name.startswith("slow_critic.")
    }
    assert (group["lr"], group["agc"], group["warmup"]) == (1e-3, 0.2, 7)


class TestActing:
    def test_actions_are_in_the_units_of_the_environment(self, spec: Spec) -> None:
        model, act = build(spec), spec.action
        obs = {key: value[:, 0] for key, value in make_batch(spec)["obs"].items()}
        for explore in (True, False):
            action, state = model.act(obs, model.initial_state(BATCH), explore=explore)
            assert action.shape == (BATCH, *act.shape)
            assert str(action.dtype) == f"torch.{act.dtype}"
            low = torch.tensor(act.low or [0] * len(act.nvec))
            high = torch.tensor(act.high or [n - 1 for n in act.nvec])
            flat = action.reshape(BATCH, -1)
            assert (flat >= low).all()
            assert (flat <= high).all()
            assert state.keys() == model.initial_state(1).keys()

    @pytest.mark.usefixtures("constant_noise")
    def test_acting_filters_like_training(self, spec: Spec) -> None:
        model, batch = build(spec), make_batch(spec)
        state, deters = model.initial_state(BATCH), []
        for t in range(STEPS):
            obs = {key: value[:, t] for key, value in batch["obs"].items()}
            action, state = model.act(obs, state, explore=True)
            batch["action"][:, t] = action
            deters.append(state["deter"])
        filtered = model.observe(batch)["deter"]
        torch.testing.assert_close(filtered, torch.stack(deters, 1), atol=1e-5, rtol=1e-4)

    def test_the_mode_is_the_same_every_time_and_samples_are_not(self) -> None:
        spec = SPECS["box"]
        model = build(spec)
        with torch.no_grad():
            model.rssm.posterior_out.weight.zero_()
            model.rssm.posterior_out.bias.copy_(100 * (torch.arange(16) % 4 == 0))
        obs = {"vector": torch.ones(BATCH, 4)}

        def act(explore: bool) -> Tensor:
            return model.act(obs, model.initial_state(BATCH), explore=explore)[0]

        model.rssm.latent.mixture = 0.0
        torch.manual_seed(0)
        torch.testing.assert_close(act(False), act(False), atol=0, rtol=0)
        assert not torch.equal(act(True), act(True))


class TestAveragedAgent:
    """Our addition: greedy actions may come from averaged weights."""

    def test_is_off_unless_asked_for(self) -> None:
        assert build(SPECS["discrete"]).averaged is None

    def test_follows_the_weights(self) -> None:
        spec = SPECS["discrete"]
        model = build(spec, warmup=0, average_rate=0.25)
        assert model.averaged is not None
        model.averaged["actor"].load_state_dict(model.actor.state_dict())
        before = [p.clone() for p in model.averaged["actor"].parameters()]
        train(model, make_batch(spec), 1)
        after = list(model.averaged["actor"].parameters())
        for old, fast, new in zip(before, model.actor.parameters(), after, strict=True):
            torch.testing.assert_close(new, 0.75 * old + 0.25 * fast)
            assert not new.requires_grad

    def test_acts_greedily_only(self) -> None:
        model = build(SPECS["box"], average_rate=0.25)
        assert model.averaged is not None
        obs = {"vector": torch.ones(BATCH, 4)}

        def act(explore: bool) -> Tensor:
            torch.manual_seed(0)
            return model.act(obs, model.initial_state(BATCH), explore=explore)[0]

        greedy, sampled = act(False), act(True)
        with torch.no_grad():
            model.averaged["actor"].out.bias.add_(10.0)
        torch.testing.assert_close(act(False), torch.tensor([[2.0, 1.0]] * BATCH))
        assert not torch.equal(act(False), greedy)
        assert torch.equal(act(True), sampled)


class TestDreaming:
    def test_shapes_and_ranges(self, spec: Spec) -> None:
        model, batch = build(spec), make_batch(spec)
        states = model.observe(batch)
        assert states["deter"].shape[:2] == (BATCH, STEPS)
        start = {key: value[:, -1] for key, value in states.items()}
        dream = model.imagine(start, None, 4)
        assert dream.reward.shape == dream.cont.shape == (BATCH, 4)
        assert dream.action.shape == (BATCH, 4, *spec.action.shape)
        assert ((dream.cont >= 0) & (dream.cont <= 1)).all()
        for key, value in model.decode(dream.state).items():
            assert value.shape == (BATCH, 4, *spec.obs[key].shape)
            assert value.dtype == torch.float32

    @pytest.mark.usefixtures("constant_noise")
    def test_given_actions_and_a_function_of_the_state_are_obeyed(self, spec: Spec) -> None:
        model, batch = build(spec), make_batch(spec)
        start = {key: value[:, -1] for key, value in model.observe(batch).items()}
        wanted = batch["action"][:, :1].expand(-1, 3, *batch["action"].shape[2:])
        given = model.imagine(start, wanted, 3)
        torch.testing.assert_close(given.action, wanted)
        chosen = model.imagine(start, lambda state: wanted[:, 0], 3)
        torch.testing.assert_close(chosen.state["deter"], given.state["deter"])

    def test_cont_is_without_the_discount(self) -> None:
        spec = SPECS["discrete"]
        probability = torch.tensor(0.72)
        found: Callable[[bool], float] = lambda contdisc: dreamed_cont(  # noqa: E731
            build(spec, contdisc=contdisc, horizon=10), probability, make_batch(spec)
        )
        assert found(True) == pytest.approx(0.8, rel=1e-5)  # 0.72 / 0.9
        assert found(False) == pytest.approx(0.72, rel=1e-5)


def dreamed_cont(model: DreamerV3, probability: Tensor, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        model.continue_head.out.weight.zero_()
        model.continue_head.out.bias.copy_(torch.logit(probability))
    start = {key: value[:, -1] for key, value in model.observe(batch).items()}
    return model.imagine(start, None, 1).cont[0, 0].item()
