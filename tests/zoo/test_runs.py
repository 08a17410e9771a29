"""Loading weights from runs, checkpoints and exported folders, and what is wrong with them."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from datamodules import ActionSpec, ArraySpec, Spec, UserError
from zoo.runs import Run, load_weights, read_checkpoint, write_identity

SPEC = Spec({"vector": ArraySpec((4,), "float32")}, ActionSpec("discrete", nvec=(2,)))
TINY = {"size": "nano", "deter": 16, "hidden": 8, "stoch": 2, "classes": 4, "units": 8}


def _model(spec: Spec = SPEC, **options) -> zoo.ZooModel:
    return zoo.create("dreamer-v3", spec, **{**TINY, **options})


def _checkpoint(model: zoo.ZooModel, env_steps: int) -> dict:
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    checkpoint["zoo"].update(updates=5, env_steps=env_steps)
    return checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose best and last checkpoint have different weights."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(_checkpoint(_model(), 10), folder / "checkpoints" / "best.ckpt")
    torch.save(_checkpoint(_model(), 20), folder / "checkpoints" / "last.ckpt")
    config = {
        "zoo": {"model": "dreamer-v3", "preset": "cartpole"},
        "model": {"class_path": "zoo.dreamer_v3.module.DreamerV3"},
        "data": {
            "class_path": "datamodules.env_datamodule.EnvDataModule",
            "init_args": {"env": "CartPole-v1", "seed": 1},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _same(model: zoo.ZooModel, checkpoint: Path) -> bool:
    wanted = torch.load(checkpoint, weights_only=True)["state_dict"]
    return all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_run_gives_its_best_checkpoint_or_the_one_asked_for(run: Path) -> None:
    best = zoo.load(run)
    assert _same(best, run / "checkpoints" / "best.ckpt")
    assert (best.updates, best.env_steps, best.training) == (5, 10, False)
    assert best.spec == SPEC
    last = zoo.load(str(run), checkpoint="last")
    assert _same(last, run / "checkpoints" / "last.ckpt")
    assert last.env_steps == 20
    (run / "checkpoints" / "best.ckpt").unlink()
    assert zoo.load(run).env_steps == 20


def test_a_checkpoint_file_loads_by_itself(run: Path, tmp_path: Path) -> None:
    alone = (run / "checkpoints" / "best.ckpt").rename(tmp_path / "mine.ckpt")
    assert zoo.load(alone).env_steps == 10


def test_the_config_names_the_class_where_the_checkpoint_does_not(run: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["zoo"]
    torch.save(checkpoint, path)
    assert type(zoo.load(run)) is zoo.DreamerV3
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="does not say which model"):
        zoo.load(run)


def test_an_exported_folder_loads_with_its_counters(run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "exported"
    model = zoo.load(run)
    model.save_pretrained(folder)
    write_identity(folder, {"model": "dreamer-v3", "env_steps": 10, "updates": 5})
    loaded = zoo.load(folder)
    assert _same(loaded, run / "checkpoints" / "best.ckpt")
    assert (loaded.env_steps, loaded.updates, loaded.training) == (10, 5, False)
    assert capsys.readouterr().out == ""

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=f"'{folder}' is damaged"):
        zoo.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        zoo.load(folder)


def test_a_run_makes_a_datamodule_like_its_own(run: Path) -> None:
    data = Run(run).datamodule()
    assert data.seed == 1
    assert data.spec == SPEC


def test_truncated_checkpoints_are_named(run: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged") as caught:
            zoo.load(run)
        assert str(path) in str(caught.value)


class _Foreign:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Foreign(), "not made by this zoo"),
        ({"state_dict": {}}, "lacks hyper_parameters"),
        ([1, 2], "lacks hyper_parameters and state_dict"),
        ({"state_dict": {}, "hyper_parameters": {}}, "no spec"),
    ],
)
def test_foreign_checkpoints_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        zoo.load(path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_of_a_model_that_is_not_here(run: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["zoo"]["model"] = "dreamer-v9"
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="unknown model 'dreamer-v9'"):
        zoo.load(run)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/run", "there is no 'no/such/run'"),
        ("dreamer-v3", "has no published weights"),
    ],
)
def test_names_that_lead_nowhere(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        zoo.load(source)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        zoo.load(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {}\n")
    with pytest.raises(UserError, match=r"has no best\.ckpt"):
        zoo.load(tmp_path)
    with pytest.raises(UserError, match="names no datamodule"):
        Run(tmp_path).datamodule()
    with pytest.raises(UserError, match="there is no run directory"):
        Run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "nothing.ckpt")


def test_fine_tuning_takes_the_weights_and_starts_the_counters_anew(run: Path) -> None:
    model = _model(lr=1e-3)
    load_weights(model, run)
    assert _same(model, run / "checkpoints" / "best.ckpt")
    assert (model.updates, model.env_steps) == (0, 0)


def test_weights_for_other_data_name_parameter_and_spec(run: Path) -> None:
    other = Spec({"vector": ArraySpec((6,), "float32")}, ActionSpec("discrete", nvec=(2,)))
    with pytest.raises(
        UserError, match=r"\(8, 4\) there and \(8, 6\) here.*float32\[4\].*float32\[6\]"
    ):
        load_weights(_model(other), run)


def test_weights_of_another_size_name_the_setting(run: Path) -> None:
    with pytest.raises(UserError, match=r"differ in units \(8, 16\)"):
        load_weights(_model(units=16), run)


def test_weights_with_more_parts_are_refused(run: Path) -> None:
    both = Spec({**SPEC.obs, "image": ArraySpec((64, 64, 3), "uint8")}, SPEC.action)
    torch.save(_checkpoint(_model(both), 0), run / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match=r"do not fit.*image uint8"):
        load_weights(_model(), run)


def test_identity_is_readable_json(tmp_path: Path) -> None:
    write_identity(tmp_path, {"model": "dreamer-v3"})
    assert json.loads((tmp_path / "zoo.json").read_text()) == {"model": "dreamer-v3"}
