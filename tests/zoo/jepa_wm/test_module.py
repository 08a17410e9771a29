"""jepa-wm: its losses in closed form, what it is made of, rollouts, planning and dreaming."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dots import PLAN, SIDE, build, sequences, spec, truth
from torch import Tensor

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.jepa_wm.module import JEPAWorldModel, schedule
from zoo.jepa_wm.regularizers import (
    covariance_loss,
    sigreg_loss,
    similarity_loss,
    variance_loss,
)
from zoo.planning import CEM, MPPI, last_reward, predicted_return

ROWS, STEPS = 3, 6
TERMS = {"variance", "covariance", "similarity", "inverse_dynamics"}
VALID = torch.ones(ROWS, 1, dtype=torch.bool)


@pytest.fixture
def batch() -> dict[str, Any]:
    return sequences(ROWS, STEPS)


@pytest.fixture
def bordered(batch: dict[str, Any]) -> dict[str, Any]:
    """The second row has a new episode at step 3."""
    batch["is_first"][1, 3] = True
    return batch


def latents(model: JEPAWorldModel, batch: dict[str, Any]) -> Tensor:
    return model.embed(batch["obs"]["image"])


def shake(model: JEPAWorldModel) -> JEPAWorldModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class TestLosses:
    def test_prediction_is_the_error_of_a_rollout_from_the_first_latent(
        self, batch: dict[str, Any]
    ) -> None:
        model = shake(build(rollout=4))
        model.training_step(batch, 0)
        real = latents(model, batch)
        z, errors = real[:, 0], []
        for t in range(4):  # of five that there could be
            z = model.norm(model.predictor(z[:, None], batch["action"][:, t : t + 1], VALID))
            errors.append((z - real[:, t + 1]).square().mean())
        expected = torch.stack(errors).mean()
        torch.testing.assert_close(model.last_losses["prediction"], expected.detach())

    def test_a_rollout_begins_anew_where_an_episode_does(self, bordered: dict[str, Any]) -> None:
        model = shake(build())
        model.training_step(bordered, 0)
        real, errors = latents(model, bordered), []
        for row in range(ROWS):
            z = real[row : row + 1, 0]
            for t in range(STEPS - 1):
                if bordered["is_first"][row, t]:
                    z = real[row : row + 1, t]
                action = bordered["action"][row : row + 1, t : t + 1]
                z = model.norm(model.predictor(z[:, None], action, VALID[:1]))
                if not bordered["is_first"][row, t + 1]:
                    errors.append((z - real[row, t + 1]).square().mean())
        assert len(errors) == ROWS * (STEPS - 1) - 1
        expected = torch.stack(errors).mean()
        torch.testing.assert_close(model.last_losses["prediction"], expected.detach())

    @pytest.mark.parametrize("predictor", ["mlp", "recurrent"])
    def test_rollouts_may_begin_at_all_steps(
        self, predictor: str, bordered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: dict[str, Any] = {}
        monkeypatch.setattr(JEPAWorldModel, "logs_now", True)
        monkeypatch.setattr(JEPAWorldModel, "log_metrics", lambda _, m: found.update(m))
        model = shake(build(starts="all", rollout=3, predictor=predictor))
        model.training_step(bordered, 0)
        real, errors, copies = latents(model, bordered), [], []
        for row, start in product(range(ROWS), range(STEPS - 1)):
            z = real[row : row + 1, start]
            for t in range(start, min(start + 3, STEPS - 1)):
                if bordered["is_first"][row, t + 1]:
                    break
                action = bordered["action"][row : row + 1, t : t + 1]
                z = model.norm(model.predictor(z[:, None], action, VALID[:1]))
                errors.append((z - real[row, t + 1]).square().mean())
                copies.append((real[row, start] - real[row, t + 1]).square().mean())
        expected = torch.stack(errors).mean()
        torch.testing.assert_close(model.last_losses["prediction"], expected.detach())
        torch.testing.assert_close(found["copy_ratio"], expected / torch.stack(copies).mean())

    def test_a_transformer_has_three_real_frames_then_its_own(self, batch: dict[str, Any]) -> None:
        model = shake(build(predictor="transformer", rollout=2))
        model.training_step(batch, 0)
        real, action, seen = latents(model, batch), batch["action"], []
        predicted: list[Tensor] = []
        for t in range(4):  # three from real frames; the next one, from predictions, is the second
            seen.append(real[:, t] if t < 3 else predicted[-1])
            first = max(0, t - 2)
            window = torch.stack(seen[first:], 1)
            valid = torch.ones(window.shape[:2], dtype=torch.bool)
            out = model.predictor(window, action[:, first : t + 1], valid)
            predicted.append(model.norm(out))
        expected = (torch.stack(predicted, 1) - real[:, 1:5]).square().mean()
        torch.testing.assert_close(model.last_losses["prediction"], expected.detach())

    def test_a_transformer_sees_no_other_episode(self, bordered: dict[str, Any]) -> None:
        model = shake(build(predictor="transformer"))
        real, action = latents(model, bordered), bordered["action"]
        predicted = model.unroll(real, action, bordered["is_first"])
        other = real.clone()
        other[1, :3] = 9.0
        action[1, :3] = 0.5
        again = model.unroll(other, action, bordered["is_first"])
        torch.testing.assert_close(again[1, 3:], predicted[1, 3:])
        assert not torch.allclose(again[1, :2], predicted[1, :2])

    def test_terms_are_those_of_the_latents(self, bordered: dict[str, Any]) -> None:
        model = build(sigreg=1.0)
        model.updates = 5
        model.training_step(bordered, 0)
        real = latents(model, bordered)
        rows, goes_on = real.flatten(0, 1), ~bordered["is_first"][:, 1:]
        pairs = torch.cat([real[:, :-1], real[:, 1:]], -1)[goes_on]
        expected = {
            "variance": variance_loss(rows),
            "covariance": covariance_loss(rows),
            "similarity": similarity_loss(real, goes_on),
            "sigreg": sigreg_loss(rows, 5),
            "inverse_dynamics": F.mse_loss(
                model.inverse(pairs), bordered["action"][:, :-1][goes_on]
            ),
        }
        for name, value in expected.items():
            torch.testing.assert_close(model.last_losses[name], value.detach(), msg=name)

    @pytest.mark.parametrize("kind", ["discrete", "multi_discrete"])
    def test_inverse_dynamics_of_choices_is_their_cross_entropy(
        self, kind: str, batch: dict[str, Any]
    ) -> None:
        space = spec(kind)
        nvec = space.action.nvec
        action = torch.stack([torch.randint(n, (ROWS, STEPS)) for n in nvec], -1)
        batch["action"] = action if kind == "multi_discrete" else action[..., 0]
        model = build(space)
        model.training_step(batch, 0)
        real = latents(model, batch)
        logits = model.inverse(torch.cat([real[:, :-1], real[:, 1:]], -1)).split(nvec, -1)
        expected = sum(
            F.cross_entropy(part.flatten(0, 1), action[:, :-1, i].flatten())
            for i, part in enumerate(logits)
        )
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(model.last_losses["inverse_dynamics"], expected.detach())

    def test_targets_are_not_detached_but_those_of_a_slow_copy_are(
        self, batch: dict[str, Any]
    ) -> None:
        model = build(prevention="none", rollout=1)
        model.predictor.requires_grad_(False)
        loss = model.training_step(batch, 0)
        (grad,) = torch.autograd.grad(loss, model.encoder.linear.bias)
        real = latents(model, batch)
        z = model.norm(model.predictor(real[:, :1], batch["action"][:, :1], VALID))
        (expected,) = torch.autograd.grad(
            (z - real[:, 1]).square().mean(), model.encoder.linear.bias
        )
        torch.testing.assert_close(grad, expected)

        slow = build(prevention="ema", rollout=1)
        assert slow.target is not None
        shake_target(slow)
        loss = slow.training_step(batch, 0)
        (grad,) = torch.autograd.grad(loss, slow.encoder.linear.bias)
        real = latents(slow, batch)
        z = slow.norm(slow.predictor(real[:, :1], batch["action"][:, :1], VALID))
        target = slow.target(batch["obs"]["image"][:, 1]).detach()
        (expected,) = torch.autograd.grad((z - target).square().mean(), slow.encoder.linear.bias)
        torch.testing.assert_close(grad, expected)

    def test_logged_are_the_spread_and_the_ratio_to_copying(
        self, bordered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found: dict[str, Any] = {}
        monkeypatch.setattr(JEPAWorldModel, "logs_now", True)
        monkeypatch.setattr(JEPAWorldModel, "log_metrics", lambda _, m: found.update(m))
        model = build(rollout=4)
        model.training_step(bordered, 0)
        real = latents(model, bordered)
        std = real.flatten(0, 1).std(0)
        torch.testing.assert_close(found["feature_std"], std.mean())
        torch.testing.assert_close(found["feature_std_min"], std.min())
        errors = []
        for row in range(ROWS):
            known = real[row, 0]
            for t in range(1, 5):
                if bordered["is_first"][row, t]:
                    known = real[row, t]
                else:
                    errors.append((known - real[row, t]).square().mean())
        expected = model.last_losses["prediction"] / torch.stack(errors).mean()
        torch.testing.assert_close(found["copy_ratio"], expected)


def shake_target(model: JEPAWorldModel) -> None:
    assert model.target is not None
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


class TestParts:
    def test_published_weights(self) -> None:
        scales = {"prediction": 1.0, "variance": 16.0, "covariance": 8.0, "similarity": 12.0}
        assert build().loss_scales == scales | {"inverse_dynamics": 1.0}
        assert build(prevention="sigreg").loss_scales == {"prediction": 1.0, "sigreg": 10.0}
        assert build(prevention="ema").loss_scales == {"prediction": 1.0}
        assert build(prevention="none").loss_scales == {"prediction": 1.0}

    @pytest.mark.parametrize("term", sorted(TERMS))
    def test_each_term_can_be_left_out(self, term: str, batch: dict[str, Any]) -> None:
        model = build(**{term: 0.0})
        model.training_step(batch, 0).backward()
        assert model.last_losses.keys() == {"prediction"} | TERMS - {term}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name

    def test_the_published_size(self) -> None:
        space = Spec(
            {"image": ArraySpec((65, 65, 2), "uint8")},
            ActionSpec("box", low=(-1.0, -1.0), high=(1.0, 1.0)),
        )
        model = JEPAWorldModel(space)
        parts = {
            "encoder": 1_425_072,
            "norm": 2 * 512,
            "predictor": 3 * (512 * 512 + 512 * 2 + 2 * 512),
            "inverse": (1024 * 256 + 256) + (256 * 256 + 256) + (256 * 2 + 2),
        }
        for name, count in parts.items():
            assert sum(p.numel() for p in getattr(model, name).parameters()) == count, name
        assert sum(p.numel() for p in model.parameters()) == sum(parts.values())
        plan = {"horizon": 90, "block": 1, "iterations": 20, "candidates": 200, "elites": 20}
        assert model.planner == CEM(**plan, init_std=0.6)

    def test_a_norm_ends_encoder_and_predictor_unless_sigreg_needs_none(
        self, batch: dict[str, Any]
    ) -> None:
        model = build()
        norms = model.unroll(latents(model, batch), batch["action"], batch["is_first"]).norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, 8**0.5), atol=1e-2, rtol=0)
        free = latents(build(prevention="sigreg"), batch).norm(dim=-1)
        assert free.std() > 1e-3
        assert not list(build(prevention="sigreg").norm.parameters())
        assert list(build(prevention="sigreg", final_norm=True).norm.parameters())

    def test_the_slow_copy_follows_and_does_not_learn(self, batch: dict[str, Any]) -> None:
        model = build(prevention="ema", ema_decay=0.9)
        assert model.target is not None
        assert not any(p.requires_grad for p in model.target.parameters())
        before = model.target[0].linear.weight.clone()
        torch.testing.assert_close(before, model.encoder.linear.weight)
        with torch.no_grad():
            model.encoder.linear.weight.add_(1.0)
        model.after_update()
        torch.testing.assert_close(model.target[0].linear.weight, before + 0.1)
        learning = {id(p) for g in optimizer(model).param_groups for p in g["params"]}
        assert not learning & {id(p) for p in model.target.parameters()}

    def test_of_a_frozen_encoder_only_the_predictor_learns(self, batch: dict[str, Any]) -> None:
        model = shake(build(freeze_encoder=True))
        model.training_step(batch, 0).backward()
        assert model.last_losses.keys() == {"prediction"}
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("predictor."), name
        joint = build().state_dict()
        model.load_state_dict(joint)  # which fine-tuning does

    def test_planners(self) -> None:
        assert build(init_std=0.5).planner == CEM(**PLAN, init_std=0.5)
        model = build(planner="mppi", temperature=3.0)
        assert model.planner == MPPI(**PLAN, init_std=0.6, temperature=3.0)
        assert build().score is predicted_return
        assert build(cost="last").score is last_reward

    def test_gradients_of_encoder_and_predictor_are_clipped_apart(
        self, batch: dict[str, Any]
    ) -> None:
        model = build(clip=1e-3)
        model.training_step(batch, 0).backward()
        inverse = [p.grad.clone() for p in model.inverse.parameters() if p.grad is not None]
        model.configure_gradient_clipping(optimizer(model))

        def norm(*parts: torch.nn.Module) -> float:
            grads = [p.grad for part in parts for p in part.parameters() if p.grad is not None]
            return torch.stack([g.norm() for g in grads]).norm().item()

        assert norm(model.encoder, model.norm) == pytest.approx(1e-3, rel=1e-2)
        assert norm(model.predictor) == pytest.approx(1e-3, rel=1e-2)
        for before, parameter in zip(inverse, model.inverse.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.equal(before, parameter.grad)

    def test_the_learning_rate(self) -> None:
        assert [schedule(step, 4, 0) for step in (0, 3, 4, 1000)] == [0.25, 1.0, 1.0, 1.0]
        assert schedule(4, 4, 104) == pytest.approx(1.0)
        assert schedule(54, 4, 104) == pytest.approx(0.505)
        assert schedule(104, 4, 104) == schedule(500, 4, 104) == pytest.approx(0.01)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"predictor": "transformer", "heads": 3}, "latent of 8 is not divisible by 3 heads"),
            ({"encoder": "vit"}, "no encoder 'vit': choose one of conv, impala, keypoints"),
            ({"predictor": "lstm"}, "no predictor 'lstm'"),
            ({"prevention": "hope"}, "no prevention 'hope'"),
            ({"planner": "adam"}, "no planner 'adam'"),
            ({"cost": "mean"}, "no cost 'mean'"),
            ({"starts": "some"}, "no starts 'some'"),
            ({"starts": "all", "predictor": "transformer"}, "starts=all needs a predictor that"),
            ({"variance": -1.0}, "variance of at least 0, got -1"),
            ({"rollout": 0}, "rollout > 0, got 0"),
            ({"anneal": 5, "warmup": 5}, r"anneal above warmup \(5\) or 0, got 5"),
            ({"pixel_std": [0.0]}, "pixel_std must be above 0"),
            ({"block": 3}, "block of CEM must be a divisor of the horizon 4, got 3"),
        ],
    )
    def test_wrong_options(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            build(**wrong)

    @pytest.mark.parametrize(
        ("others", "message"),
        [
            ({"state": ArraySpec((3,), "float32")}, "one image, .* are image, state"),
            ({"wrist": ArraySpec((SIDE, SIDE, 1), "uint8")}, "one image, .* are image, wrist"),
            ({"goal": ArraySpec((SIDE, SIDE, 3), "uint8")}, "a goal like the image"),
        ],
    )
    def test_wrong_observations(self, others: dict[str, ArraySpec], message: str) -> None:
        with pytest.raises(UserError, match=message):
            build(spec(**others))

    def test_mppi_is_for_boxes(self) -> None:
        with pytest.raises(UserError, match="planner=mppi searches box actions only"):
            build(spec("discrete"), planner="mppi")

    def test_batches_that_teach_nothing(self, batch: dict[str, Any]) -> None:
        model = build()
        short = {**batch, "obs": {k: v[:, :1] for k, v in batch["obs"].items()}}
        silent = {key: value for key, value in batch.items() if key != "action"}
        for bad in (short, silent):
            with pytest.raises(UserError, match="at least 2 steps with their actions"):
                model.training_step(bad, 0)

    def test_video_without_actions(self) -> None:
        silent = Spec({"image": ArraySpec((SIDE, SIDE, 1), "uint8")}, None)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="learns from actions, and the data has none"):
            JEPAWorldModel(silent)


def optimizer(model: JEPAWorldModel) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = model.configure_optimizers()["optimizer"]
    return found


class TestActing:
    @pytest.mark.parametrize("planner", ["cem", "mppi"])
    def test_goes_to_the_goal_image(self, planner: str) -> None:
        model = truth(planner=planner, temperature=0.02)
        start, goal = torch.tensor([[0.2, 0.2], [0.7, 0.3]]), torch.tensor([[0.7, 0.8], [0.3, 0.3]])
        goals = images(goal)
        state = model.initial_state(2)
        position = start
        torch.manual_seed(0)
        for _ in range(4):
            obs = {"image": images(position), "goal": goals}
            action, state = model.act(obs, state, explore=False)
            position = position + 0.2 * action
        assert (position - goal).norm(dim=-1).max() < 0.08

    def test_the_last_step_alone_takes_its_time(self) -> None:
        # With the horizon of 6 that is left, the nearest plans of the sum go there at once.
        obs = {
            "image": images(torch.tensor([[0.3, 0.5]])),
            "goal": images(torch.tensor([[0.7, 0.5]])),
        }
        first = {}
        for cost in ("sum", "last"):
            model = truth(cost=cost)
            torch.manual_seed(0)
            first[cost] = float(model.act(obs, model.initial_state(1), explore=False)[0][0, 0])
        assert first["sum"] > 0.85
        assert first["last"] < first["sum"]

    def test_the_plan_is_the_start_of_the_next_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, given = build(), []
        plan = CEM.plan

        def spy(self: CEM, *args: Any, **kwargs: Any) -> Any:
            given.append(args[3])
            return plan(self, *args, **kwargs)

        monkeypatch.setattr(CEM, "plan", spy)
        image = images(torch.tensor([[0.5, 0.5]]))
        obs, state = {"image": image, "goal": image}, model.initial_state(1)
        _, after = model.act(obs, state, explore=False)
        model.act(obs, after, explore=False)
        assert not given[0].any()
        assert given[1].shape == (1, 4, 2)
        assert torch.equal(given[1], after["plan"])
        assert given[1].any()

    def test_exploring_is_random_and_needs_no_goal(self) -> None:
        model = build()
        obs = {"image": images(torch.full((500, 2), 0.5))}
        action, _ = model.act(obs, model.initial_state(500), explore=True)
        assert action.std() == pytest.approx(1 / 3**0.5, abs=0.05)
        with pytest.raises(UserError, match="have no 'goal'"):
            model.act(obs, model.initial_state(500), explore=False)

    @pytest.mark.parametrize("kind", ["mlp", "transformer"])
    def test_acting_keeps_the_windows_that_filtering_gives(self, kind: str) -> None:
        batch = sequences(1, 5)
        model = build(predictor=kind)
        state, seen = model.initial_state(1), []
        for t in range(5):
            _, state = model.act({"image": batch["obs"]["image"][:, t]}, state, explore=True)
            seen.append(state)
        batch["action"] = torch.stack([s["actions"][:, -1] for s in seen], 1)
        observed = model.observe(batch)
        for t, state in enumerate(seen):
            assert torch.equal(observed["length"][:, t], state["length"])
            known = int(state["length"])
            for key in ("latents", "actions"):
                ours, theirs = state[key][:, -known:], observed[key][:, t, -known:]
                if key == "actions":  # that of the newest frame comes after filtering it
                    ours, theirs = ours[:, :-1], theirs[:, :-1]
                torch.testing.assert_close(ours, theirs)

    def test_a_goal_is_seen_by_the_slow_copy_that_predictions_follow(self) -> None:
        model = build(prevention="ema")
        shake_target(model)
        assert model.target is not None
        image = images(torch.tensor([[0.2, 0.9]]))
        batch = sequences(1, 1) | {"obs": {"image": image[None], "goal": image[None]}}
        state = model.observe(batch)
        torch.testing.assert_close(state["goal"], model.target(image[None]))
        torch.testing.assert_close(state["latents"][:, :, -1], model.embed(image[None]))


def images(positions: Tensor) -> Tensor:
    from dots import draw

    return torch.from_numpy(draw(positions.numpy()))


class TestDreaming:
    @pytest.mark.parametrize("kind", ["recurrent", "mlp", "transformer"])
    def test_imagines_what_training_unrolls(self, kind: str, batch: dict[str, Any]) -> None:
        model = shake(build(predictor=kind))
        history = model.history
        real = latents(model, batch)
        expected = model.unroll(real, batch["action"], batch["is_first"])[:, history - 1 :]
        states = model.observe(batch)
        start = {key: value[:, history - 1] for key, value in states.items()}
        given = batch["action"][:, history - 1 : -1]
        dream = model.imagine(start, given, STEPS - history)
        torch.testing.assert_close(dream.state["latents"][:, :, -1], expected)
        assert not dream.reward.any()
        assert (dream.cont == 1).all()
        by_policy = iter(given.unbind(1))
        again = model.imagine(start, lambda state: next(by_policy), STEPS - history)
        assert torch.equal(again.state["latents"], dream.state["latents"])
        torch.testing.assert_close(again.action, given)

    def test_a_window_at_the_beginning_of_an_episode(self, bordered: dict[str, Any]) -> None:
        model = shake(build(predictor="transformer"))
        real, action = latents(model, bordered), bordered["action"]
        expected = model.unroll(real, action, bordered["is_first"])[1, 3]
        start = {key: value[1:2, 3] for key, value in model.observe(bordered).items()}
        assert start["length"].tolist() == [1]
        dream = model.imagine(start, action[1:2, 3:4], 1)
        torch.testing.assert_close(dream.state["latents"][0, 0, -1], expected)

    def test_the_reward_is_minus_the_squared_distance_to_the_goal(self) -> None:
        model = truth()
        state = model.initial_state(2)
        state |= {"latents": torch.tensor([[[0.1, 0.2]], [[0.5, 0.5]]])}
        state["goal"] = torch.tensor([[0.3, 0.2], [0.5, 0.9]])
        actions = torch.tensor([[[1.0, 0.0], [0.0, 0.5]], [[0.0, 1.0], [0.0, 1.0]]])
        dream = model.imagine(state, actions, 2)
        expected = -torch.tensor([[0.0, 0.01], [0.04, 0.0]]) / 2
        torch.testing.assert_close(dream.reward, expected)
        assert torch.equal(dream.state["goal"], state["goal"][:, None].expand(2, 2, 2))

    def test_its_own_policy_plans(self) -> None:
        model = truth()
        state = model.initial_state(1) | {"latents": torch.tensor([[[0.1, 0.2]]])}
        with pytest.raises(UserError, match="the state has none"):
            model.imagine(state, None, 3)
        state["goal"] = torch.tensor([[0.6, 0.2]])
        torch.manual_seed(0)
        dream = model.imagine(state, None, 3)
        assert (dream.state["latents"][0, -1, -1] - state["goal"][0]).norm() < 0.05
