"""What every registered model must fulfil; a new model is tested by being registered."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from recordings import memory, store_at
from torch import Tensor

import zoo
from datamodules import EnvDataModule, OfflineDataModule, UserError, VideoDataModule
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo import registry
from zoo.base import Imagined, ZooModel, capabilities

OBSERVATIONS = {
    "vector": {"position": ArraySpec((3,), "float32"), "height": ArraySpec((), "float32")},
    "image": {"image": ArraySpec((64, 64, 3), "uint8")},
}
ACTIONS = {
    "discrete": ActionSpec("discrete", nvec=(3,)),
    "box": ActionSpec("box", low=(-2.0, 0.0), high=(2.0, 1.0)),
    "multi_discrete": ActionSpec("multi_discrete", nvec=(2, 4)),
}
CARTPOLE = Spec({"vector": ArraySpec((4,), "float32")}, ActionSpec("discrete", nvec=(2,)))
VIDEO = Spec({"image": ArraySpec((32, 32, 3), "uint8")}, action=None)
BATCH, STEPS = 2, 5
MODELS = zoo.list_models()
# What makes a model fast without changing what it does.
EFFORT: dict[str, dict[str, Any]] = {
    "genie": {"steps": 3},
    "planet": {"candidates": 50, "elites": 5, "iterations": 3},
}


def specs(name: str) -> list[Spec]:
    """All kinds of observations, alone and together, with all kinds of actions the card names.

    A model that reads no actions gets data without and with some.
    """
    card = registry.card(name)
    observations = [OBSERVATIONS[kind] for kind in card.observations]
    if len(observations) > 1:
        observations.append({key: a for part in observations for key, a in part.items()})
    actions = [ACTIONS[kind] for kind in card.actions] or [None, ACTIONS["discrete"]]
    return [Spec(o, a) for o, a in itertools.product(observations, actions)]


CASES = [(name, spec) for name in MODELS for spec in specs(name)]
IDS = [f"{n}-{'+'.join(s.obs)}-{s.action.kind if s.action else 'silent'}" for n, s in CASES]
every_spec = pytest.mark.parametrize(("name", "spec"), CASES, ids=IDS)
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, spec: Spec) -> ZooModel:
    """The smallest size; cards list sizes in ascending order."""
    torch.manual_seed(0)
    sizes = list(registry.card(name).sizes)
    return zoo.create(name, spec, **({"size": sizes[0]} if sizes else {}), **EFFORT.get(name, {}))


def make_batch(model: ZooModel) -> dict[str, Any]:
    """Random sequences by the batch contract, with the context steps the model asks for.

    Silent video has neither actions nor rewards. Contexts of recorded data have returns and time
    steps in place of the flags; the first begins with a step of padding.
    """
    spec, lead = model.spec, (BATCH, STEPS + model.replay_context)
    generator = torch.Generator().manual_seed(1)

    def array(shape: tuple[int, ...], dtype: str) -> Tensor:
        if dtype.startswith("float"):
            return torch.randn(*lead, *shape, generator=generator)
        high = 256 if len(shape) == 3 else 2
        return torch.randint(high, (*lead, *shape), generator=generator).to(getattr(torch, dtype))

    batch: dict[str, Any] = {}
    if (act := spec.action) is not None:
        if act.kind == "box":
            low, high = torch.tensor(act.low), torch.tensor(act.high)
            action = low + torch.rand(*lead, len(act.low), generator=generator) * (high - low)
        else:
            action = array(act.shape, act.dtype)
        batch["action"] = action
    batch["obs"] = {key: array(a.shape, a.dtype) for key, a in sorted(spec.obs.items())}
    if act is not None:
        batch["reward"] = array((), "float32")
    if model.replay_sampling == "contexts":
        batch["return_to_go"] = array((), "float32")
        batch["timestep"] = torch.arange(lead[1]).repeat(BATCH, 1)
        batch["mask"] = torch.ones(lead, dtype=torch.bool)
        batch["mask"][0, 0] = False
        return batch
    batch["step_id"] = torch.arange(lead[1]).expand(lead).contiguous()
    for key in ("is_first", "is_last", "is_terminal"):
        batch[key] = torch.zeros(lead, dtype=torch.bool)
    batch["is_last"][0, 2] = batch["is_terminal"][0, 2] = batch["is_first"][0, 3] = True
    if "ReplayLatents" in capabilities(model):
        fields: dict[str, Any] = model.latent_fields()  # type: ignore[operator]
        batch["latents"] = {key: array(*field) for key, field in fields.items()}
    return batch


def first_obs(model: ZooModel) -> dict[str, Tensor]:
    """What a policy acts on; a goal looks like an observation."""
    obs = make_batch(model)["obs"]
    if "GoalConditioned" in capabilities(model):
        goal_key: str = model.goal_key  # type: ignore[assignment]
        obs[goal_key] = next(iter(obs.values())).flip(0)
    return {key: value[:, 0] for key, value in obs.items()}


def outputs(model: ZooModel) -> dict[str, Tensor]:
    """Whatever the model can compute, with one seed."""
    model.trainer = None  # losses are logged only inside of a trainer's loop
    torch.manual_seed(7)
    found: dict[str, Tensor] = {}
    can = capabilities(model)
    any_model: Any = model
    with torch.no_grad():
        if "Policy" in can and model.spec.action is not None:
            state = any_model.initial_state(BATCH)
            if "ReturnConditioned" in can:
                state = any_model.rewarded(state, torch.ones(BATCH))
            found["action"], state = any_model.act(first_obs(model), state, explore=False)
            found |= state
        if "Imaginer" in can:
            found |= {f"observed {k}": v for k, v in any_model.observe(make_batch(model)).items()}
        found["loss"] = any_model.training_step(make_batch(model), 0)
    return found


def assert_same_outputs(a: ZooModel, b: ZooModel) -> None:
    ours, theirs = outputs(a.eval()), outputs(b.eval())
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


class SaveAtEnd(pl.Callback):
    """Leaves `last.ckpt` in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.directory / "last.ckpt")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ZooModel], str]:
    """The store of random episodes, like CartPole's or silent video, that suits a model."""
    folder = tmp_path_factory.mktemp("recording")

    @cache
    def made(silent: bool) -> str:
        data = memory(VIDEO if silent else CARTPOLE, (7, 30, 3, 12))
        return str(store_at(folder / str(silent), data))

    return lambda model: made(model.spec.action is None)


def recorded_data(
    model: ZooModel, recording: Callable[[ZooModel], str]
) -> OfflineDataModule | VideoDataModule:
    """Sequences of the length that the model acts on, if it has one; or clips."""
    if model.spec.action is None:
        length = getattr(model, "frames", 4)
        return VideoDataModule(recording(model), batch_size=4, clip_length=length)
    length = getattr(model, "context", 4)
    return OfflineDataModule(recording(model), batch_size=2, sequence_length=length)


def small_data(
    model: ZooModel, directory: Path, recording: Callable[[ZooModel], str]
) -> pl.LightningDataModule:
    """CartPole, played or, for models that do not learn online, recorded; or silent video."""
    if "online" not in registry.card(model.name).data:
        return recorded_data(model, recording)
    return EnvDataModule(
        "CartPole-v1",
        num_envs=2,
        batch_size=2,
        sequence_length=4,
        prefill=16,
        directory=directory / "replay",
    )


def fit(
    model: ZooModel,
    data: pl.LightningDataModule,
    directory: Path,
    updates: int = 2,
    resume: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """A few updates."""
    trainer = pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[SaveAtEnd(directory)],
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def for_small_data(name: str) -> ZooModel:
    card = registry.card(name)
    if not card.actions:
        return build(name, VIDEO)
    if not {"online", "offline"} & set(card.data) or "vector" not in card.observations:
        pytest.skip("does not learn from vector environments")
    return build(name, CARTPOLE)


@every_spec
def test_losses_are_finite_and_reach_every_parameter(name: str, spec: Spec) -> None:
    model = build(name, spec)
    loss = model.training_step(make_batch(model), 0)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert model.last_losses
    assert all(value.isfinite() for value in model.last_losses.values())
    learning = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    assert learning
    for key, parameter in learning:
        assert parameter.grad is not None, f"{key} gets no gradient"
        assert parameter.grad.isfinite().all(), key


@every_model
def test_the_card_names_what_the_model_can_do(name: str) -> None:
    card = registry.card(name)
    assert set(card.can) == set(capabilities(registry.model_class(name)))
    assert registry.model_class(name).name == name


@every_spec
def test_policy(name: str, spec: Spec) -> None:
    model: Any = build(name, spec)
    if "Policy" not in registry.card(name).can:
        pytest.skip("is no Policy")
    state = model.initial_state(BATCH)
    assert all(len(value) == BATCH for value in state.values())
    if spec.action is None:
        with pytest.raises(UserError, match="to act, train it on recordings with"):
            model.act(first_obs(model), state, explore=False)
        return
    for explore in (True, False):
        action, after = model.act(first_obs(model), state, explore=explore)
        assert action.shape == (BATCH, *spec.action.shape)
        assert str(action.dtype) == f"torch.{spec.action.dtype}"
        assert not action.requires_grad
        shapes = {key: value.shape for key, value in after.items()}
        assert shapes == {key: value.shape for key, value in state.items()}
        if spec.action.kind == "box":
            assert (action >= torch.tensor(spec.action.low)).all()
            assert (action <= torch.tensor(spec.action.high)).all()
        else:
            assert (action >= 0).all()
            assert (action.reshape(BATCH, -1) < torch.tensor(spec.action.nvec)).all()


@every_spec
def test_return_conditioned(name: str, spec: Spec) -> None:
    model: Any = build(name, spec)
    if "ReturnConditioned" not in registry.card(name).can:
        pytest.skip("is not asked for returns")
    model.target_return = 5.0
    assert model.target_return == 5.0
    state = model.initial_state(BATCH)
    after = model.rewarded(state, torch.tensor([0.0, 1.0]))
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key][0], state[key][0]) for key in state)
    assert any(not torch.equal(after[key][1], state[key][1]) for key in state)


@every_spec
def test_imaginer(name: str, spec: Spec) -> None:
    model: Any = build(name, spec)
    if "Imaginer" not in registry.card(name).can:
        pytest.skip("is no Imaginer")
    batch, horizon = make_batch(model), 3
    states = model.observe(batch)
    assert all(v.shape[:2] == batch["step_id"].shape for v in states.values())
    start = {key: value[:, -1] for key, value in states.items()}
    if "LatentActions" in registry.card(name).can:
        given = torch.arange(BATCH * horizon).view(BATCH, horizon) % model.num_latent_actions
    else:
        given = batch["action"][:, :horizon]
    for actions in (given, lambda state: given[:, 0], None):
        if actions is None and "Policy" not in registry.card(name).can:
            continue
        dream = model.imagine(start, actions, horizon)
        assert isinstance(dream, Imagined)
        assert dream.reward.shape == dream.cont.shape == (BATCH, horizon)
        assert ((dream.cont >= 0) & (dream.cont <= 1)).all()
        assert dream.action.shape == given.shape
        assert all(v.shape[:2] == (BATCH, horizon) for v in dream.state.values())
    torch.testing.assert_close(model.imagine(start, given, horizon).action, given)
    with pytest.raises(UserError, match="horizon > 0, got 0"):
        model.imagine(start, given, 0)
    with pytest.raises(UserError, match=f"dream {horizon + 1} steps by actions of shape"):
        model.imagine(start, given, horizon + 1)
    decoded = model.decode(dream.state)
    assert decoded.keys() == spec.obs.keys()
    for key, value in decoded.items():
        assert value.shape == (BATCH, horizon, *spec.obs[key].shape)
        assert value.is_floating_point()
        if spec.obs[key].is_image:
            assert 0 <= value.min() <= value.max() <= 1


@every_spec
def test_latent_actions(name: str, spec: Spec) -> None:
    model: Any = build(name, spec).eval()
    if "LatentActions" not in registry.card(name).can:
        pytest.skip("finds no actions")
    (key,) = spec.images
    found = model.infer_actions(make_batch(model)["obs"][key])
    assert found.shape == (BATCH, STEPS - 1)
    assert found.dtype == torch.int64
    assert ((found >= 0) & (found < model.num_latent_actions)).all()


@every_spec
def test_encoder_and_replay_latents(name: str, spec: Spec) -> None:
    model: Any = build(name, spec)
    batch, can = make_batch(model), registry.card(name).can
    if not {"Encoder", "ReplayLatents"} & set(can):
        pytest.skip("is neither")
    if "Encoder" in can:
        encoded = model.encode(batch["obs"])
        assert encoded.shape[:2] == next(iter(batch["obs"].values())).shape[:2]
        assert encoded.dim() == 3
    if "ReplayLatents" in can:
        _, state = model.act(first_obs(model), model.initial_state(BATCH), explore=True)
        latents, fields = model.latents(state), model.latent_fields()
        assert latents.keys() == fields.keys()
        for key, (shape, dtype) in fields.items():
            assert latents[key].shape == (BATCH, *shape)
            assert str(latents[key].dtype) == f"torch.{dtype}"


@every_model
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fits(
    name: str, precision: Any, recording: Callable[[ZooModel], str], tmp_path: Path
) -> None:
    model = for_small_data(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = small_data(model, tmp_path, recording)
    trainer = fit(model, data, tmp_path, precision=precision)
    assert model.updates == trainer.global_step == 2
    assert model.env_steps >= 16 or "online" not in registry.card(name).data
    assert trainer.logged_metrics["train/loss"].isfinite()
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[key], value) for key, value in after.items())


@every_model
def test_fits_offline_without_an_environment_and_resumes(
    name: str, recording: Callable[[ZooModel], str], tmp_path: Path
) -> None:
    if registry.card(name).data == ("online",):
        pytest.skip("does not learn from recorded data")

    def run(folder: str, updates: int, resume: Path | None = None) -> ZooModel:
        model = for_small_data(name)
        fit(model, recorded_data(model, recording), tmp_path / folder, updates, resume)
        return model

    whole = run("whole", 5)
    run("part", 3)
    torch.rand(7)  # what happens to run between does not matter
    resumed = run("rest", 5, resume=tmp_path / "part" / "last.ckpt")
    assert whole.updates == 5
    assert whole.env_steps == 0
    for key, value in whole.state_dict().items():
        assert value.isfinite().all(), key
        assert torch.equal(value, resumed.state_dict()[key]), key


@every_model
def test_checkpoints_load_as_plain_weights(
    name: str, recording: Callable[[ZooModel], str], tmp_path: Path
) -> None:
    model = for_small_data(name)
    fit(model, small_data(model, tmp_path, recording), tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["zoo"]["model"] == name
    loaded = zoo.load(tmp_path / "last.ckpt")
    assert (loaded.updates, loaded.env_steps) == (model.updates, model.env_steps)
    assert_same_outputs(model, loaded)


@every_spec
def test_hub_round_trip(name: str, spec: Spec, tmp_path: Path) -> None:
    model = build(name, spec)
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, type(model).from_pretrained(tmp_path))
