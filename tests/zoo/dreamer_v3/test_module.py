"""DreamerV3 as a whole: what starts where, which loss trains what, and acting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.dreamer_v3.module import LOSS_SCALES, DreamerV3

VECTOR = {"vector": ArraySpec((4,), "float32")}
IMAGE = {"image": ArraySpec((48, 48, 3), "uint8")}
DISCRETE = ActionSpec("discrete", nvec=(3,))
SPECS = {
    "discrete": Spec(VECTOR, DISCRETE),
    "box": Spec(VECTOR, ActionSpec("box", low=(-2.0, 0.0), high=(2.0, 1.0))),
    "multi_discrete": Spec(VECTOR, ActionSpec("multi_discrete", nvec=(2, 4))),
    "image": Spec(IMAGE, DISCRETE),
    "image and vector": Spec(VECTOR | IMAGE, DISCRETE),
}
TINY = {"deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "depth": 2, "units": 8, "bins": 15}
BATCH, STEPS = 2, 6  # steps with the context


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> Spec:
    return SPECS[request.param]


@pytest.fixture
def constant_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: torch.full(size, 0.37))


def build(spec: Spec, seed: int = 0, shake: float = 0.2, **options: Any) -> DreamerV3:
    """A tiny model whose zero-initialised heads are shaken, so that gradients pass them."""
    torch.manual_seed(seed)
    model = DreamerV3(spec, size="nano", **{**TINY, "imagine_length": 3, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return model


def make_batch(spec: Spec, latents: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    lead = (BATCH, STEPS)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(*lead, *shape).uniform_(generator=generator)

    obs = {
        key: (uniform(*a.shape) * 255).to(torch.uint8) if a.is_image else uniform(*a.shape) - 0.5
        for key, a in spec.obs.items()
    }
    act = spec.action
    if act.kind == "box":
        low, high = torch.tensor(act.low), torch.tensor(act.high)
        action = low + uniform(len(act.low)) * (high - low)
    else:
        action = (uniform(len(act.nvec)) * torch.tensor(act.nvec)).long()
        action = action[..., 0] if act.kind == "discrete" else action
    flags = {key: torch.zeros(lead, dtype=torch.bool) for key in ("is_first", "is_last")}
    batch = {"obs": obs, "action": action, "reward": uniform(), **flags}
    batch["is_terminal"] = torch.zeros(lead, dtype=torch.bool)
    batch["step_id"] = torch.arange(STEPS).expand(lead).contiguous()
    if latents:
        stoch = (uniform(TINY["stoch"]) * TINY["classes"]).to(torch.uint8)
        batch["latents"] = {"deter": uniform(TINY["deter"]) * 2 - 1, "stoch": stoch}
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


def train(model: DreamerV3, batch: dict[str, Any], updates: int) -> None:
    optimizer = model.configure_optimizers()
    for _ in range(updates):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
        model.after_update()


def parts_with_gradient(model: DreamerV3) -> set[str]:
    return {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and (p.grad != 0).any()
    }


class TestTrainingStep:
    def test_every_parameter_gets_a_finite_gradient(self, spec: Spec) -> None:
        model = build(spec, shake=0.0)
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
        scales = {key: float(key == name) for key in LOSS_SCALES}
        model = build(spec, loss_scales=scales, free_nats=0.0)
        batch = make_batch(spec)
        batch["is_first"][:] = apart
        model.training_step(batch, 0).backward()
        return model, parts_with_gradient(model)

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


def touched(module: nn.Module) -> bool:
    return any(p.grad is not None and (p.grad != 0).any() for p in module.parameters())


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
    model = build(SPECS["discrete"], shake=0.0)
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

        model.rssm.unimix = 0.0
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
