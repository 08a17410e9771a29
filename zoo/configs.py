"""Puts the configuration of a training together, as plain data.

Four layers, of which each wins over those before: the defaults of `zoo fit`, a preset (or the whole
`config.yaml` of an earlier run), the options of `zoo fit`, and the LightningCLI options after them.
The section `zoo` of a configuration says what it is: `model`, `preset`, `weights`, `threads`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from zoo import registry
from zoo.runs import CONFIG, read_config

DEFAULTS = Path(__file__).parent / "commands" / "defaults.yaml"
BUDGET = "callbacks.budget.Budget"
# Callbacks of the defaults that only models which dream, or act, can have.
DREAMS = ("callbacks.dream_video.DreamVideo", "callbacks.dream_gap.DreamRealityGap")
PLAYS = ("callbacks.evaluation.Evaluation",)
# Of models that find actions in video.
CONTROLS = ("callbacks.controllability.Controllability", "callbacks.action_grid.ActionGrid")
ENV_DATA = "datamodules.env_datamodule.EnvDataModule"
OFFLINE_DATA = "datamodules.offline_datamodule.OfflineDataModule"
VIDEO_DATA = "datamodules.video_datamodule.VideoDataModule"
RECORDED_DATA = (OFFLINE_DATA, VIDEO_DATA)
# What recorded data takes over from the settings of an environment.
SHARED_DATA = (
    *("env", "action_repeat", "size", "time_limit", "env_kwargs"),
    *("batch_size", "sequence_length", "sampling", "piece_length", "prioritize_ends"),
    "updates_per_epoch",
)

Config = dict[str, Any]


def compose(target: str, env: str | None = None, source: str | None = None) -> Config:
    """The configuration that a target of `zoo fit` names.

    Args:
        target: `MODEL/PRESET`; `MODEL`, which needs `env` or a preset called `default`; a yaml
            file; or a run directory, which stands for its config.yaml.
        env: an environment's id, in place of the preset's.
        source: recorded data to learn from; an environment then only evaluates.

    Raises:
        UserError: unknown names, an unreadable file, or nothing that says what to train on.
    """
    path = Path(target)
    if path.is_dir():
        path = path / CONFIG
    if path.suffix in (".yaml", ".yml"):
        config = _from_file(path)
    else:
        config = _from_catalogue(target, env, source)
    if env is not None:
        set_option(config, "data.init_args.env", env)
        config["zoo"]["preset"] = _folder_name(env)
    if source is not None:
        _learn_from(config, source)
    return config


def merge(base: Config, over: Mapping[str, Any]) -> Config:
    """`over` laid on `base`, section by section; neither is changed.

    Where both name a class and the classes differ, the whole of `over` counts. Lists of classes
    (callbacks, loggers) are merged by class path, other lists are replaced.
    """
    merged = copy.deepcopy(base)
    for key, value in over.items():
        merged[key] = _merge_value(merged.get(key), value)
    return merged


def set_option(config: Config, key: str, value: Any) -> None:
    """Sets `a.b.c`, in place, and makes the sections on the way."""
    *sections, last = key.split(".")
    for section in sections:
        if config.get(section) is None:
            config[section] = {}
        config = config[section]
    config[last] = value


def budget(config: Config) -> dict[str, Any]:
    """The settings of the Budget callback, to read and to change; made if it is not there."""
    trainer = config.setdefault("trainer", {})
    callbacks = trainer["callbacks"] = list(trainer.get("callbacks") or [])
    for entry in callbacks:
        if entry["class_path"] == BUDGET:
            entry["init_args"] = entry.get("init_args") or {}
            return entry["init_args"]
    callbacks.append({"class_path": BUDGET, "init_args": {}})
    return callbacks[-1]["init_args"]


def run_directory(config: Config, seed: int) -> Path:
    """`runs/<model>/<preset>/seed=<n>`."""
    identity = config["zoo"]
    return Path("runs") / identity["model"] / identity["preset"] / f"seed={seed}"


def _defaults(card: registry.ModelCard | None) -> Config:
    """The defaults of `zoo fit`, without what a model cannot have, as far as that is known."""
    config = read_config(DEFAULTS)
    useless: tuple[str, ...] = CONTROLS
    if card is not None:
        # Dreams of latent actions cannot be compared with what real ones did.
        finds = "LatentActions" in card.can
        dreams = "Imaginer" in card.can and not finds
        # Video alone has no environment: who names one names `Evaluation`, too.
        plays = "Policy" in card.can and card.data != ("video",)
        useless = () if finds else CONTROLS
        useless += (() if dreams else DREAMS) + (() if plays else PLAYS)
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [c for c in callbacks if c["class_path"] not in useless]
    return config


def _from_file(path: Path) -> Config:
    config = read_config(path)
    if config.get("zoo", {}).get("model"):
        return config  # the complete configuration of a run
    class_path = (config.get("model") or {}).get("class_path")
    if not class_path:
        raise UserError(f"'{path}' names no model: it needs model.class_path")
    name = registry.name_of(class_path) or class_path.rpartition(".")[2]
    identity = {"zoo": {"model": name, "preset": path.stem}}
    known = name in registry.list_models()
    return merge(merge(_defaults(registry.card(name) if known else None), config), identity)


def _from_catalogue(target: str, env: str | None, source: str | None) -> Config:
    model, preset = registry.split(target)
    if preset is None and env is None and source is None:
        if "default" not in registry.presets(model):
            choice = [f"{model}/{name}" for name in registry.presets(model)]
            raise UserError(
                f"'{model}' alone does not say what to train on: name one of its presets "
                f"({', '.join(choice) or 'it has none'}) or add --env ENVIRONMENT "
                "or --source DATA"
            )
        preset = "default"
    card = registry.card(model)
    if source is not None and not {"offline", "video"} & set(card.data):
        raise UserError(
            f"'{model}' learns from {' or '.join(card.data)} data: it takes no --source"
        )
    if env is not None and source is None and "online" not in card.data:
        raise UserError(f"'{model}' learns from {' or '.join(card.data)} data: it takes no --env")
    config = _defaults(card)
    config = merge(config, {"model": {"class_path": card.class_path.replace(":", ".")}})
    if env is not None:
        config = merge(config, {"data": {"class_path": ENV_DATA}})
    if preset is not None:
        config = merge(config, registry.preset_config(f"{model}/{preset}"))
    return merge(config, {"zoo": {"model": model, "preset": preset}})


def _learn_from(config: Config, source: str) -> None:
    """Puts recorded data in the place of an environment, with what the two have in common."""
    data = config.get("data") or {}
    if data.get("class_path") in RECORDED_DATA:
        if (data.get("init_args") or {}).get("source") not in (None, source):
            _forget_env(config)
        set_option(config, "data.init_args.source", source)
        return
    before = data.get("init_args") or {}
    kept = {key: value for key, value in before.items() if key in SHARED_DATA}
    model = registry.name_of((config.get("model") or {}).get("class_path", ""))
    video = model is not None and "video" in registry.card(model).data
    class_path = VIDEO_DATA if video else OFFLINE_DATA
    config["data"] = {"class_path": class_path, "init_args": {**kept, "source": source}}
    budget(config)["env_steps"] = None
    config["zoo"]["preset"] = _folder_name(source)


def _forget_env(config: Config) -> None:
    """Callbacks shall not measure other data in the environment that the preset's came from."""
    for entry in (config.get("trainer") or {}).get("callbacks") or []:
        (entry.get("init_args") or {}).pop("env", None)


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.")


def _merge_value(base: Any, over: Any) -> Any:
    if _is_class(base) and _is_class(over) and base["class_path"] != over["class_path"]:
        return copy.deepcopy(over)
    if isinstance(base, dict) and isinstance(over, Mapping):
        return merge(base, over)
    if isinstance(base, list) and isinstance(over, list) and all(map(_is_class, [*base, *over])):
        entries = {entry["class_path"]: entry for entry in base}
        for entry in over:
            entries[entry["class_path"]] = _merge_value(entries.get(entry["class_path"]), entry)
        return list(entries.values())
    return copy.deepcopy(over)


def _is_class(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value
