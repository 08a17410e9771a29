"""Published scores on the tasks of a suite, to read one's own beside.

`reference/<name>.yaml` gives every label its `source`, a `note` where there is a catch, and by task
either `runs`, the final score of every run, or `means`, where nothing else was published.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np
import yaml

from benchmarks.statistics import AGGREGATES, OF_MEANS, Array, Interval, bootstrap


@dataclass(frozen=True)
class Published:
    """What was published of one agent, in the units of the tasks' returns.

    Attributes:
        source: where the numbers come from.
        note: what a reader must know to judge them.
        runs: final scores by task; empty if only means are known.
        means: mean scores by task, over runs that are not known.
    """

    label: str
    source: str
    note: str = ""
    runs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Array]:
        """By task: `(runs,)`, or `(1,)` where it is a mean."""
        return {task: np.atleast_1d(score) for task, score in (self.runs or self.means).items()}

    def on(self, tasks: Container[str]) -> "Published":
        """What was published on these tasks."""
        runs = {task: scores for task, scores in self.runs.items() if task in tasks}
        means = {task: score for task, score in self.means.items() if task in tasks}
        return replace(self, runs=runs, means=means)

    def aggregates(self, tasks: Sequence[Array]) -> dict[str, Interval]:
        """Aggregates over the normalised `scores`, without intervals if they are means.

        IQM and optimality gap are over runs: where only means are known they are left out, because
        those of means are other numbers.
        """
        if self.runs:
            return {name: bootstrap(tasks, of) for name, of in AGGREGATES.items()}
        values = {name: float(AGGREGATES[name](tasks)) for name in OF_MEANS}
        return {name: Interval(value, value, value) for name, value in values.items()}


def list_published() -> list[str]:
    """Names that `load_published` knows."""
    folder = resources.files("benchmarks") / "reference"
    return sorted(Path(entry.name).stem for entry in folder.iterdir())


def load_published(name: str) -> list[Published]:
    """The published scores called `name`, in the order of the file."""
    text = (resources.files("benchmarks") / "reference" / f"{name}.yaml").read_text()
    return [Published(label, **row) for label, row in yaml.safe_load(text).items()]
