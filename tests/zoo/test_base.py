"""What every model inherits: losses, counters, capabilities, checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.base import ZooModel, capabilities

SPEC = Spec({"vector": ArraySpec((3,), "float32")}, ActionSpec("discrete", nvec=(2,)))


class Line(ZooModel):
    """The smallest model: one weight."""

    name = "line"

    def __init__(self, spec: Spec | dict[str, Any], slope: float = 2.0) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        self.weight = nn.Parameter(torch.tensor(slope))
        self.weight_after: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        losses = {"small": self.weight.square(), "large": 10 * self.weight.square()}
        return self.total_loss(losses, {"small": 1.0, "large": 0.5})

    def after_update(self) -> None:
        self.weight_after.append(self.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(model: Line, steps: int, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(8, 1)))
    return trainer


def test_silent_video_is_refused_by_models_that_need_actions() -> None:
    silent = Spec({"image": ArraySpec((8, 8, 3), "uint8")})
    with pytest.raises(UserError, match="line learns from actions, and the data has none"):
        Line(silent)

    class Watcher(Line):
        needs_actions = False

    assert Spec.from_dict(Watcher(silent).hparams["spec"]) == silent
    assert str(silent).endswith("no actions")


def test_total_loss_is_weighted_and_keeps_the_parts() -> None:
    model = Line(SPEC)
    losses = {"a": torch.tensor(3.0, requires_grad=True), "b": torch.tensor(5.0)}
    assert model.total_loss(losses, {"a": 1.0, "b": 0.1}).item() == pytest.approx(3.5)
    assert model.last_losses["b"].item() == 5.0
    assert not model.last_losses["a"].requires_grad


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1, "c": 1}])
def test_losses_and_weights_must_agree(weights: dict[str, float]) -> None:
    losses = {"a": torch.tensor(3.0), "b": torch.tensor(5.0)}
    with pytest.raises(ValueError, match="do not agree"):
        Line(SPEC).total_loss(losses, weights)


def test_updates_are_counted_and_followed_by_the_hook() -> None:
    model = Line(SPEC)
    fit(model, 3)
    assert model.updates == 3
    # d/dw (w^2 + 5 w^2) = 12 w, with a learning rate of 0.01
    assert model.weight_after == pytest.approx([2 * 0.88, 2 * 0.88**2, 2 * 0.88**3])


def test_accumulated_gradients_are_one_update() -> None:
    model = Line(SPEC)
    fit(model, 2, accumulate_grad_batches=3)
    assert (model.updates, len(model.weight_after)) == (2, 2)


def test_losses_are_logged_as_often_as_the_trainer_logs() -> None:
    model = Line(SPEC)
    trainer = fit(model, 3, log_every_n_steps=3)
    names = {"train/small", "train/large", "train/loss"}
    assert names <= trainer.logged_metrics.keys()
    w = 2 * 0.88**2  # at the third step, before its update
    assert trainer.logged_metrics["train/loss"].item() == pytest.approx(6 * w * w, rel=1e-5)
    assert not names & fit(Line(SPEC), 2, log_every_n_steps=3).logged_metrics.keys()


def test_counters_survive_a_checkpoint(tmp_path: Any) -> None:
    model = Line(SPEC, slope=3.0)
    trainer = fit(model, 2)
    model._env_steps = 70
    trainer.save_checkpoint(tmp_path / "line.ckpt")
    checkpoint = torch.load(tmp_path / "line.ckpt", weights_only=True)
    assert checkpoint["zoo"] == {"model": "line", "updates": 2, "env_steps": 70}
    assert checkpoint["hyper_parameters"] == {"spec": SPEC.to_dict(), "slope": 3.0}
    restored = Line.load_from_checkpoint(tmp_path / "line.ckpt")
    assert (restored.updates, restored.env_steps, restored.spec) == (2, 70, SPEC)
    assert torch.equal(restored.weight, model.weight)


def test_the_datamodule_counts_env_steps_and_takes_latents_back() -> None:
    model = Line(SPEC)
    assert model.env_steps == 0
    model.write_back(torch.zeros(1, 1), {})  # without a datamodule nothing happens
    taken: list[Any] = []
    data = SimpleNamespace(env_steps=123, write_back=lambda *given: taken.append(given))
    model._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    assert model.env_steps == 123
    step_id, latents = torch.zeros(2, 3), {"h": torch.ones(2, 3, 1)}
    model.write_back(step_id, latents)
    assert taken == [(step_id, latents)]
    model._trainer = None
    assert model.env_steps == 123


def test_capabilities_are_the_protocols_whose_members_are_there() -> None:
    class Actor:
        def initial_state(self, batch_size: int) -> None: ...
        def act(self, obs: None, state: None, *, explore: bool) -> None: ...

    class Video:
        def infer_actions(self, video: Tensor) -> None: ...

    assert capabilities(Actor) == ["Policy"]
    assert capabilities(Video) == []
    Video.num_latent_actions = 3  # type: ignore[attr-defined]
    assert capabilities(Video()) == ["LatentActions"]
    assert capabilities(Line) == []
    Actor.goal_key = "goal"  # type: ignore[attr-defined]
    assert capabilities(Actor) == ["Policy", "GoalConditioned"]


def test_a_spec_may_be_plain_data() -> None:
    assert Line(SPEC.to_dict()).spec == SPEC
