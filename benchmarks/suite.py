"""A suite: which models are compared on which tasks, with what budgets and how many seeds.

Suites are `suites/<name>.yaml`, or any yaml file of the same form given by its path. A suite of
kind "speed" measures times instead of scores and has no cells.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from benchmarks.cell import CHECKPOINTS, ENV, METRICS, RETURN, Cell
from benchmarks.published import list_published
from datamodules.errors import UserError

KINDS = ("scores", "speed")
# As the task of an entry: one entry for each task of the suite.
EVERY_TASK = "*"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Reference:
    """Scores that put a task's returns on a common scale: 0 is random, 1 is expert.

    Attributes:
        source: where the two numbers come from; a reader must be able to check them.
    """

    random: float
    expert: float
    source: str

    def normalize(self, value: float) -> float:
        """Return on the common scale; below 0 and above 1 are possible."""
        return (value - self.random) / (self.expert - self.random)


@dataclass(frozen=True)
class Entry:
    """One model with one preset on one task.

    In a file the task may be "*": the preset is then run in every task's environment, and is called
    `<preset>-<task>` in the results, such as `atari-100k-pong`.

    Attributes:
        env_steps: budget; None means the preset's own.
        eval_every: overrides the suite's.
        options: options of `zoo fit` that win over the preset, such as `{model.lam: 0.0}`.
        variant: what the results call the preset with these options; needed if there are any.
    """

    model: str
    preset: str
    task: str
    env_steps: int | None = None
    eval_every: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""


@dataclass(frozen=True)
class Suite:
    """A comparison as data; `cells` lists the work.

    Attributes:
        kind: "scores", or "speed" for timings without cells.
        seeds: every entry is run with the seeds 0 .. seeds-1.
        episodes: of the final evaluation.
        eval_every: env steps between a baseline's evaluations during training, or updates if it
            learns from recorded data.
        eval_episodes: episodes of each of those.
        tasks: normalisation references by task.
        score: the metric that is compared; `return_mean` unless features are probed.
        probe: for a suite of probes, what is probed for; see `benchmarks.probed`.
        checkpoint: which one of a zoo model's run plays the final episodes, "best" or "last".
        seconds: training budget of every zoo model in seconds, in place of any other.
        video: for a suite of dreams, what is dreamed; see `benchmarks.video`.
        published: name of the published scores to show beside; see `benchmarks.published`.
    """

    name: str
    title: str
    about: str = ""
    kind: str = "scores"
    seeds: int = 5
    episodes: int = 100
    eval_every: int = 1000
    eval_episodes: int = 10
    tasks: Mapping[str, Reference] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    score: str = RETURN
    probe: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = "best"
    seconds: float | None = None
    video: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""

    def cells(self, seeds: int | None = None) -> list[Cell]:
        """All cells, in the order in which they are started.

        Raises:
            UserError: `seeds` is below 1.
        """
        count = self.seeds if seeds is None else seeds
        if count < 1:
            raise UserError(f"a suite needs at least one seed, not {count}")
        return [
            Cell(
                model=entry.model,
                preset=entry.variant or entry.preset,
                base=entry.preset if entry.variant else "",
                options=dict(entry.options),
                task=entry.task,
                seed=seed,
                suite=self.name,
                env_steps=entry.env_steps,
                episodes=self.episodes,
                eval_every=entry.eval_every or self.eval_every,
                eval_episodes=self.eval_episodes,
                score=self.score,
                probe=dict(self.probe),
                checkpoint=self.checkpoint,
                seconds=self.seconds,
                video=dict(self.video),
            )
            for entry in self.entries
            for seed in range(count)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `parse_suite` reads it back."""
        return asdict(self)


def list_suites() -> list[str]:
    """Names of the suites that come with the package."""
    folder = resources.files("benchmarks") / "suites"
    return sorted(Path(entry.name).stem for entry in folder.iterdir())


def load_suite(name: str) -> Suite:
    """Load a suite by its name or by the path of a yaml file.

    Raises:
        UserError: no such suite (the nearest names are given), or a mistake in the file.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no suite file {name}")
        text = path.read_text()
    elif name in list_suites():
        text = (resources.files("benchmarks") / "suites" / f"{name}.yaml").read_text()
    else:
        close = get_close_matches(name, list_suites())
        hint = f"did you mean {' or '.join(close)}?" if close else "give a yaml file, or one of: "
        raise UserError(
            f"there is no suite {name!r}; {hint}{'' if close else ', '.join(list_suites())}"
        )
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"suite {name} is not yaml: {error}") from error
    return parse_suite({"name": Path(name).stem, **_mapping(content, f"suite {name}")})


def parse_suite(content: Mapping[str, Any]) -> Suite:
    """Build a suite from plain data, checking every key.

    Raises:
        UserError: unknown or missing keys, an unknown kind, score, checkpoint or name of published
            scores, two budgets, or two entries that would share a cell.
    """
    where = f"suite {content.get('name')}"
    tasks = {
        task: _build(Reference, value, f"{where}, task {task}")
        for task, value in _mapping(content.get("tasks", {}), f"{where}, tasks").items()
    }
    entries = tuple(
        entry
        for number, value in enumerate(content.get("entries", ()), start=1)
        for entry in _expand(_build(Entry, value, f"{where}, entry {number}"), tasks)
    )
    suite = _build(Suite, {**content, "tasks": tasks, "entries": entries}, where)
    if suite.kind not in KINDS:
        raise UserError(f"{where} has kind {suite.kind!r}; kinds are {', '.join(KINDS)}")
    if suite.score not in METRICS:
        raise UserError(f"{where} has score {suite.score!r}; there is {', '.join(sorted(METRICS))}")
    if suite.checkpoint not in CHECKPOINTS:
        raise UserError(f"{where} has checkpoint {suite.checkpoint!r}; it is best or last")
    if suite.seconds is not None and any(entry.env_steps for entry in entries):
        raise UserError(f"{where} has seconds, so its entries cannot have env_steps")
    if suite.published and suite.published not in list_published():
        there = ", ".join(list_published())
        raise UserError(f"{where} has published {suite.published!r}; there is {there}")
    if suite.kind == "scores" and not entries:
        raise UserError(f"{where} has no entries, so there is nothing to run")
    for entry in entries:
        if entry.options and not entry.variant:
            raise UserError(f"{where}: {entry.model}/{entry.preset} has options but no variant")
    places = [(entry.model, entry.variant or entry.preset) for entry in entries]
    for place in places:
        if places.count(place) > 1:
            name = "/".join(place)
            raise UserError(f"{where} lists {name} twice; give each its own preset or variant")
    return suite


def _expand(entry: Entry, tasks: Mapping[str, Reference]) -> Iterator[Entry]:
    """The entry itself, or one for each task if it is for every one."""
    if entry.task != EVERY_TASK:
        yield entry
        return
    for task in tasks:
        name = f"{entry.variant or entry.preset}-{task.rpartition('/')[2].lower()}"
        yield replace(entry, task=task, variant=name, options={**entry.options, ENV: task})


def _build(kind: type[_T], value: Any, where: str) -> _T:
    """Construct a dataclass from a mapping, naming keys that do not fit."""
    given = _mapping(value, where)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known) or sorted(known)
            raise UserError(f"{where} has an unknown key {key!r}; nearest: {', '.join(close)}")
    for key, item in known.items():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and key not in given:
            raise UserError(f"{where} lacks the key {key!r}")
    return kind(**given)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} should be a mapping of keys to values, not {value!r}")
    return value
