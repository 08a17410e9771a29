"""The catalogue: which models there are, what each can do, and how to build one by its name.

A model is described by a `ModelCard` and found without importing torch. Our own cards are listed in
`BUILT_IN`; another package adds its model through the entry-point group `zoo.models` with the value
`package.module:CARD`. A preset is a yaml file in the folder `presets` beside the card's module: a
LightningCLI configuration whose first comment line says what it is for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from datamodules.errors import UserError

if TYPE_CHECKING:
    from datamodules.spec import Spec
    from zoo.base import ZooModel

BUILT_IN = (
    "zoo.world_models.card:CARD",
    "zoo.planet.card:CARD",
    "zoo.dreamer_v1.card:CARD",
    "zoo.dreamer_v2.card:CARD",
    "zoo.dreamer_v3.card:CARD",
    "zoo.diamond.card:CARD",
    "zoo.decision_transformer.card:CARD",
    "zoo.i_jepa.card:CARD",
    "zoo.v_jepa.card:CARD",
    "zoo.jepa_wm.card:CARD",
    "zoo.genie.card:CARD",
)

DataKind = Literal["online", "offline", "video"]


@dataclass(frozen=True)
class ModelCard:
    """What the catalogue knows of a model.

    Args:
        name: the one name used in the registry, the command line, presets and docs.
        title: the name as the paper writes it.
        summary: one line for `zoo list`.
        class_path: `package.module:Class` of the LightningModule; imported only when asked for.
        paper: title of the paper; `authors`, `year` and `url` belong to it.
        data: kinds of data it learns from: `online` in an environment, `offline` from recorded
            actions and rewards, `video` from observations alone.
        can: names of the Protocols in `zoo.base` that it fulfils.
        observations: kinds of observations it reads: `image`, `vector`.
        actions: kinds of action spaces it takes: `discrete`, `box`, `multi_discrete`; none if it
            needs no actions and does not read them.
        sizes: name of each size and what it is, for example `{"12m": "9.7 million parameters"}`.
        weights: hub id of the published weights of each preset.
        licence: licence of the code and the published weights.
    """

    name: str
    title: str
    summary: str
    class_path: str
    paper: str
    authors: str
    year: int
    url: str
    data: tuple[DataKind, ...]
    can: tuple[str, ...]
    observations: tuple[str, ...]
    actions: tuple[str, ...]
    sizes: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    licence: str = "Apache-2.0"


@dataclass(frozen=True)
class _Entry:
    card: ModelCard
    presets: Mapping[str, Path]


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a name that does not exist, with the nearest ones that do."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        mend = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        mend = f"there is {', '.join(known)}" if known else "there is none"
    return UserError(f"unknown {kind} '{name}' ({mend}){hint}")


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted.

    Example:
        >>> "dreamer-v3" in list_models("dreamer*")
        True
    """
    return sorted(name for name in _catalogue() if fnmatchcase(name, pattern))


def card(name: str) -> ModelCard:
    """The card of `MODEL` or `MODEL/PRESET`.

    Raises:
        UserError: unknown model or preset, with the nearest names.
    """
    return _entry(name).card


def presets(name: str) -> list[str]:
    """Names of the presets of a model, sorted."""
    return sorted(_entry(name).presets)


def preset_path(name: str) -> Path:
    """The yaml file of `MODEL/PRESET`.

    Raises:
        UserError: unknown model or preset, or no preset named.
    """
    model, preset = split(name)
    if preset is None:
        choice = ", ".join(f"{model}/{p}" for p in presets(model)) or "none yet"
        raise UserError(f"'{model}' names no preset: choose one of {choice}")
    return _entry(name).presets[preset]


def preset_config(name: str) -> dict[str, Any]:
    """The settings of `MODEL/PRESET`: a LightningCLI configuration as plain data."""
    import yaml

    return yaml.safe_load(preset_path(name).read_text()) or {}


def preset_summary(name: str) -> str:
    """What `MODEL/PRESET` is for: the first comment line of its file."""
    for line in preset_path(name).read_text().splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


def split(name: str) -> tuple[str, str | None]:
    """`MODEL/PRESET` to its two names, of which the second may be missing; both are checked."""
    model, _, preset = name.partition("/")
    entries = _catalogue()
    if model not in entries:
        raise unknown("model", model, entries, "; `zoo list` shows them all")
    if preset and preset not in entries[model].presets:
        raise unknown(f"preset of {model}", preset, entries[model].presets)
    return model, preset or None


def model_class(name: str) -> type[ZooModel]:
    """The class of a model; imports it."""
    return cast("type[ZooModel]", import_object(card(name).class_path))


def create(name: str, spec: Spec, **options: Any) -> ZooModel:
    """Builds a model with fresh weights.

    Args:
        name: `MODEL`, or `MODEL/PRESET` for the model settings of that preset.
        spec: what the data looks like; every datamodule has one as `.spec`.
        options: arguments of the model's class; they win over the preset's.

    Raises:
        UserError: unknown name or option.
    """
    settings: dict[str, Any] = {}
    cls = model_class(name)
    if split(name)[1]:
        model = preset_config(name).get("model", {})
        settings = model.get("init_args", {})
        cls = import_object(model.get("class_path", card(name).class_path))
    _check_options(name, cls, options)
    return cls(spec, **{**settings, **options})


def name_of(class_path: str) -> str | None:
    """The catalogue name of a class `package.module.Class`; None if it is not in the catalogue."""
    paths = {entry.card.class_path.replace(":", "."): n for n, entry in _catalogue().items()}
    return paths.get(class_path.replace(":", "."))


def import_object(path: str) -> Any:
    """Imports `package.module:name` or `package.module.name`.

    Raises:
        UserError: there is no such module or name.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise UserError(f"the module {module} has no '{name}'") from error
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself needs is missing: that is not the name's fault
        raise UserError(f"there is no module '{error.name}' (asked for by '{path}')") from error


def _check_options(name: str, cls: type, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise unknown(f"option of {name}", option, set(parameters) - {"self", "spec"})


def _entry(name: str) -> _Entry:
    return _catalogue()[split(name)[0]]


@cache
def _catalogue() -> dict[str, _Entry]:
    entries = {}
    for path in BUILT_IN:
        entry = _read(path)
        entries[entry.card.name] = entry
    for point in entry_points(group="zoo.models"):
        try:
            entry = _read(point.value)
        except Exception as error:  # another package's fault must not take the whole zoo down
            warnings.warn(
                f"the model '{point.name}' ({point.value}) is left out: {error}", stacklevel=2
            )
            continue
        if entry.card.name in entries:
            warnings.warn(
                f"the model '{entry.card.name}' of {point.value} is left out: the name is taken",
                stacklevel=2,
            )
            continue
        entries[entry.card.name] = entry
    return entries


def _read(path: str) -> _Entry:
    found = import_object(path)
    if not isinstance(found, ModelCard):
        raise TypeError(f"{path} is a {type(found).__name__}, not a ModelCard")
    module = importlib.import_module(path.partition(":")[0])
    folder = Path(cast(str, module.__file__)).parent / "presets"
    return _Entry(found, {file.stem: file for file in folder.glob("*.yaml")})
