"""Reads what a training left behind: run directories, checkpoints and exported weights.

A run directory holds `config.yaml`, `checkpoints/{best,last}.ckpt`, `metrics.csv`, the replay and
the videos. An exported folder is the Hugging Face layout (`config.json`, `model.safetensors`,
`README.md`) with one more file, `zoo.json`, that names the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from datamodules.errors import UserError
from zoo import registry

if TYPE_CHECKING:
    from zoo.base import ZooModel

CONFIG = "config.yaml"
IDENTITY = "zoo.json"
WEIGHTS = "model.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Which = Literal["best", "last"]


@dataclass(frozen=True)
class Run:
    """A run directory.

    Raises:
        UserError: there is no such directory, or it is not a run.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise UserError(f"there is no run directory '{self.path}'")
        if not (self.path / CONFIG).is_file() and not (self.path / "checkpoints").is_dir():
            raise UserError(
                f"'{self.path}' is not a run: it has neither {CONFIG} nor a folder checkpoints"
            )

    def config(self) -> dict[str, Any]:
        """The complete configuration that the run was made with."""
        return read_config(self.path / CONFIG)

    def checkpoint(self, which: Which | None = None) -> Path:
        """The best or the last checkpoint; without a choice the best one if there is one."""
        folder = self.path / "checkpoints"
        names = (which,) if which else ("best", "last")
        for name in names:
            if (folder / f"{name}.ckpt").is_file():
                return folder / f"{name}.ckpt"
        raise UserError(
            f"the run '{self.path}' has no {names[0]}.ckpt in checkpoints: it saved none yet; "
            f"`zoo fit {self.path} --resume` trains it"
        )

    def datamodule(self, **changes: Any) -> Any:
        """A datamodule like the one that the run trained on, but for the changed arguments.

        Nothing is set up yet.
        """
        data = self.config().get("data") or {}
        if "class_path" not in data:
            raise UserError(f"{self.path / CONFIG} names no datamodule under data.class_path")
        arguments = {**data.get("init_args", {}), **changes}
        return registry.import_object(data["class_path"])(**arguments)


def load(
    source: str | os.PathLike[str],
    *,
    checkpoint: Which | None = None,
    map_location: Any = "cpu",
) -> ZooModel:
    """Loads a trained model, in evaluation mode.

    Args:
        source: a run directory, a `.ckpt` file, an exported folder, a name of the catalogue
            (`MODEL/PRESET`) that has published weights, or a Hugging Face hub id.
        checkpoint: which checkpoint of a run; the best one if there is one, else the last.
        map_location: device that the weights are put on.

    Raises:
        UserError: nothing there, or a file that is damaged or was made by something else.
    """
    path = Path(source)
    if path.is_file():
        model = _from_checkpoint(path)
    elif (path / "config.json").is_file() or (path / WEIGHTS).is_file():
        model = _from_export(path)
    elif path.is_dir():
        model = _from_checkpoint(Run(path).checkpoint(checkpoint))
    else:
        model = _from_name(str(source))
    return model.to(map_location).eval()


def load_weights(model: ZooModel, source: str | os.PathLike[str]) -> None:
    """Puts the weights of another training into a model that was just built: fine-tuning.

    Only parameters and buffers are taken; the optimizer and the counters start anew.

    Raises:
        UserError: the weights do not fit; names the parameter and what the two models differ in.
    """
    given = load(source)
    theirs, ours = given.state_dict(), model.state_dict()
    for name, value in ours.items():
        if name not in theirs:
            trouble = f"{name} is missing there"
        elif theirs[name].shape != value.shape:
            trouble = f"{name} is {tuple(theirs[name].shape)} there and {tuple(value.shape)} here"
        else:
            continue
        raise UserError(
            f"the weights of '{source}' do not fit: {trouble}; {_contrast(given, model)}"
        )
    extra = sorted(set(theirs) - set(ours))
    if extra:
        raise UserError(
            f"the weights of '{source}' do not fit: {extra[0]} has no place here; "
            f"{_contrast(given, model)}"
        )
    model.load_state_dict(theirs)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a yaml file of settings.

    Raises:
        UserError: no such file, or not a mapping in yaml.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no file '{path}'") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is not readable as yaml: {reason}") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' does not hold a mapping of settings")
    return config


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of this zoo with `weights_only=True`; large tensors stay on disk.

    Raises:
        UserError: no such file, a damaged one, or one that was made by something else.
    """
    import pickle

    import torch

    if not path.is_file():
        raise UserError(f"there is no checkpoint '{path}'")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the checkpoint '{path}' holds more than weights and plain settings, or is damaged: "
            "it was not made by this zoo"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint '{path}' is damaged or truncated ({path.stat().st_size} bytes): "
            "use another one of the run, or train again"
        ) from error
    missing = {"state_dict", "hyper_parameters"} - set(_keys(checkpoint))
    if missing:
        raise UserError(
            f"'{path}' is not a checkpoint of this zoo: it lacks {' and '.join(sorted(missing))}"
        )
    return checkpoint


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Writes `zoo.json`, by which `load` finds the class of an exported model."""
    (folder / IDENTITY).write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n")


def _from_checkpoint(path: Path) -> ZooModel:
    from datamodules.spec import Spec

    checkpoint = read_checkpoint(path)
    settings = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
    if "spec" not in settings:
        raise UserError(f"the checkpoint '{path}' has no spec among its hyper_parameters")
    spec = Spec.from_dict(settings.pop("spec"))
    model = _class_of(checkpoint, path)(spec, **settings)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights in '{path}' do not fit their settings: {reason}") from error
    model.on_load_checkpoint(checkpoint)
    return model


def _class_of(checkpoint: Mapping[str, Any], path: Path) -> type[ZooModel]:
    name = checkpoint.get("zoo", {}).get("model")
    if name:
        return registry.model_class(name)
    config = path.parent.parent / CONFIG
    class_path = read_config(config)["model"]["class_path"] if config.is_file() else None
    if not class_path:
        raise UserError(
            f"'{path}' does not say which model it belongs to, and there is no {CONFIG} beside "
            "its folder"
        )
    return cast("type[ZooModel]", registry.import_object(class_path))


def _from_export(folder: Path) -> ZooModel:
    for name in ("config.json", WEIGHTS, IDENTITY):
        if not (folder / name).is_file():
            raise UserError(f"the exported model '{folder}' has no {name}")
    try:
        return _from_pretrained(folder / IDENTITY, str(folder))
    except UserError:
        raise
    except Exception as error:  # safetensors and json raise their own, many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"the exported model '{folder}' is damaged: {reason}") from error


def _from_pretrained(identity: Path, source: str) -> ZooModel:
    known = json.loads(identity.read_text())
    if "model" not in known:
        raise UserError(f"'{identity}' names no model")
    with contextlib.redirect_stdout(None):  # the hub's mixin prints where it loads from
        model = registry.model_class(known["model"]).from_pretrained(source)
    model.on_load_checkpoint({"zoo": known})
    return model


def _from_name(name: str) -> ZooModel:
    model, _, preset = name.partition("/")
    if model in registry.list_models():
        card = registry.card(name)
        if preset not in card.weights:
            raise UserError(
                f"'{name}' has no published weights: `zoo fit {name}` trains it; load that run"
            )
        return _from_hub(card.weights[preset])
    if HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise UserError(
        f"there is no '{name}': not a run directory, a checkpoint, an exported folder, a model of "
        "the catalogue or a hub id (ORGANISATION/NAME)"
    )


def _from_hub(hub_id: str) -> ZooModel:
    from huggingface_hub import hf_hub_download

    try:
        return _from_pretrained(Path(hf_hub_download(hub_id, IDENTITY)), hub_id)
    except UserError:
        raise
    except Exception as error:  # the hub raises its own, many kinds: not found, no network, ...
        reason = " ".join(str(error).split())
        raise UserError(
            f"there is no folder '{hub_id}', and the hub gave no such model: {reason}"
        ) from error


def _contrast(given: ZooModel, wanted: ZooModel) -> str:
    """What two models were built differently for."""
    if type(given) is not type(wanted):
        return f"they belong to a {type(given).__name__}, this is a {type(wanted).__name__}"
    if given.spec != wanted.spec:
        return f"they were made for {given.spec}, and the data has {wanted.spec}"
    theirs, ours = dict(given.hparams), dict(wanted.hparams)
    names = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
    return "they differ in " + ", ".join(f"{k} ({theirs.get(k)}, {ours.get(k)})" for k in names)


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []
