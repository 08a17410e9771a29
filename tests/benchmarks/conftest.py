"""A results folder made up without training, as the cells of a suite would leave it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cell import Cell, write_json
from benchmarks.results import Row
from benchmarks.suite import Suite, load_suite, parse_suite

ORIGIN = {"git_sha": "abc1234", "versions": "python 3.11.7; torch 2.13.0", "hardware": "a laptop"}
FINALS = {
    "dreamer-v3": (500.0, 488.0, 497.0),
    "dqn": (500.0, 431.0, 368.0),
    "random": (21.0, 22.0, 23.0),
}


def made_up_suite(**changes: Any) -> Suite:
    content: dict[str, Any] = {
        "name": "made-up",
        "title": "Made up",
        "about": "Numbers from a seeded generator.",
        "seeds": 3,
        "tasks": {"CartPole-v1": {"random": 22.2, "expert": 500.0, "source": "measured"}},
        "entries": [
            {"model": model, "preset": "cartpole", "task": "CartPole-v1", "env_steps": budget}
            for model, budget in (("dreamer-v3", 10_000), ("dqn", 30_000), ("random", None))
        ],
    }
    return parse_suite({**content, **changes})


def rows(cell: Cell, final: float) -> list[Row]:
    def row(metric: str, value: float, step: int, n: int) -> Row:
        wall = None if cell.model == "random" else step * 0.005
        return Row(
            cell.suite, cell.model, cell.preset, cell.task, cell.seed,
            step, step // 8, metric, value, n, wall, **ORIGIN,
        )  # fmt: skip

    rng = np.random.default_rng([cell.seed, len(cell.model)])
    budget = cell.env_steps or 0
    curve = [
        row("return_mean", float(final * (1 - np.exp(-4 * step / budget)) * rng.uniform(0.8, 1)),
            step + 3 * cell.seed, 10)
        for step in range(500, budget + 1, 500)
    ]  # fmt: skip
    world_model = cell.model == "dreamer-v3"
    dreams = [row("dream_reality_gap", 1.03, budget, 10)] if world_model else []
    for k, error in ((1, 0.5), (15, 3.0)) if world_model else ():
        dreams.append(row(f"open_loop_mse@{k}", error, budget, 10))
        dreams.append(row(f"copy_last_mse@{k}", 2.0, budget, 10))
    return [
        *curve,
        *dreams,
        row("peak_rss_mb", 512.0 + cell.seed, budget, 1),
        row("return_std", 4.0, budget, 100),
        row("return_mean", final, budget, 100),
    ]


def write_cells(out: Path, made: Suite, skip: tuple[str, ...] = ()) -> None:
    """Manifest and cells of `made`; cells named in `skip` are left out."""
    command = f"zoo bench made-up --out {out.name}"
    manifest = {"suite": made.to_dict(), "seeds": made.seeds, "command": command}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "suite.json", manifest)
    for cell in made.cells():
        if cell.name in skip:
            continue
        cell.folder(out).mkdir(parents=True)
        content = [asdict(row) for row in rows(cell, FINALS[cell.model][cell.seed])]
        write_json(cell.result(out), {"cell": asdict(cell), "rows": content})


@pytest.fixture
def results(tmp_path):
    """A folder with results of three models, three seeds each."""
    write_cells(tmp_path / "results", made_up_suite())
    return tmp_path / "results"


@pytest.fixture
def incomplete(tmp_path):
    """The same with one cell that failed and one that was not run."""
    suite = made_up_suite()
    out = tmp_path / "incomplete"
    write_cells(out, suite, ("dqn/cartpole seed=1", "dqn/cartpole seed=2"))
    failed = next(cell for cell in suite.cells() if cell.name == "dqn/cartpole seed=1")
    failed.folder(out).mkdir(parents=True)
    log = "starting <b>\nzoo: the disk is full"
    write_json(failed.folder(out) / "failed.json", {"ending": "exit code 2", "log": log})
    return out


@pytest.fixture
def two_tasks(tmp_path):
    """Two models on two tasks; the second model has results on the first task only."""
    reference = {"random": 0.0, "expert": 500.0, "source": "made up"}
    entries = [
        {"model": model, "preset": task.lower(), "task": task, "env_steps": 2000}
        for model, task in (("dqn", "A"), ("dqn", "B"), ("dreamer-v3", "A"))
    ]
    tasks = {"A": reference, "B": reference}
    write_cells(tmp_path / "two", made_up_suite(tasks=tasks, entries=entries))
    return tmp_path / "two"


@pytest.fixture
def three_games(tmp_path):
    """Results of DreamerV3 on two of the three games of a suite, beside what was published."""
    human = load_suite("atari100k").tasks
    tasks = {task: vars(human[task]) for task in ("ale/Boxing", "ale/Freeway", "ale/Pong")}
    entry = {"model": "dreamer-v3", "preset": "atari", "task": "*", "env_steps": 2000}
    entries = [{**entry, "options": {"data.env_kwargs": {"grey": True}}}]
    suite = made_up_suite(tasks=tasks, entries=entries, published="atari100k", checkpoint="last")
    out = tmp_path / "three"
    write_cells(out, suite, tuple(f"dreamer-v3/atari-freeway seed={seed}" for seed in range(3)))
    return out
