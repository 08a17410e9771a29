"""A cell: one model on one task with one seed, trained, evaluated and written down.

`run_cell` is a plain function that any launcher may call (the pool of this package, a scheduler's
array job, a loop). It is idempotent: a finished cell returns what it found. It is resumable: killed
at any moment and called again, it continues from the last checkpoint.

    OUT/runs/MODEL/PRESET/seed=N/    the training run (metrics.csv, checkpoints, videos)
    OUT/cells/MODEL/PRESET/seed=N/   cell.json (the request), result.json (the rows), log.txt
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.provenance import git_sha, hardware, peak_rss_mb, versions
from benchmarks.results import Row, replacing
from datamodules.errors import UserError

# Final episodes are drawn far from every seed that training or checkpoint selection uses.
EVAL_SEED_OFFSET = 1_000_000

# What a results file may hold besides learning curves, with or without "@k".
METRICS = frozenset(
    {
        "return_mean",
        "return_std",
        "success_rate",
        "dream_return",
        "dream_reality_gap",
        "open_loop_psnr",
        "open_loop_mse",
        "copy_last_mse",
        "reward_mae",
        "updates_per_s",
        "env_steps_per_s",
        "act_latency_ms",
        "params",
        "peak_rss_mb",
        "target_spearman",
        "best_target_return",
        "beyond_return",
        "achieved",
        "data_top10_return",
        "probe_r2",
        "probe_knn_r2",
        "probe_attentive_r2",
        "relative_std",
        "rank_me",
        "covariance_rank",
        "latent_action_purity",
        "delta_t_psnr",
        "tokenizer_psnr",
        "ball_found",
        "ball_lost",
        "ball_error",
        "psnr",
        "ssim",
        "dream_fps",
    }
)
# Seconds of training at an evaluation, measuring excluded.
_WALL = "time/wall_s"
# Scores at one evaluation belong to the curve; the final evaluation has its own.
_FINAL_ONLY = frozenset({"return_mean", "return_std", "success_rate"})
RETURN = "return_mean"
# The option that puts a preset into another environment than its own.
ENV = "data.env"
CHECKPOINTS = ("best", "last")


@dataclass(frozen=True)
class Cell:
    """What is asked of one cell.

    Attributes:
        env_steps: training budget in frames that the agent causes; None means the preset's own.
        episodes: of the final evaluation, greedy, on fresh seeds.
        eval_every: env steps between evaluations in a baseline's training, or updates if it learns
            from recorded data; a zoo model's preset says its own.
        eval_episodes: episodes of each of those evaluations.
        base: the preset that `options` change, where `preset` is the name of a variant.
        options: options of `zoo fit` that win over the preset.
        score: the metric that is compared: the return, or what a probe reads out of features.
        probe: for a suite of probes, what is probed for; see `benchmarks.probed`.
        checkpoint: which one of a zoo model's run plays the final episodes, "best" or "last".
        seconds: training budget of a zoo model in seconds, in place of any other.
        video: for a suite of dreams, what is dreamed; see `benchmarks.video`.
    """

    model: str
    preset: str
    task: str
    seed: int
    suite: str = ""
    env_steps: int | None = None
    episodes: int = 100
    eval_every: int = 500
    eval_episodes: int = 10
    base: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    score: str = RETURN
    probe: Mapping[str, Any] = field(default_factory=dict, hash=False)
    checkpoint: str = "best"
    seconds: float | None = None
    video: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Short and unique within a suite, e.g. `dreamer-v3/cartpole seed=0`."""
        return f"{self.model}/{self.preset} seed={self.seed}"

    def folder(self, out: Path) -> Path:
        """Where the request, the log and the result are."""
        return out / "cells" / self.model / self.preset / f"seed={self.seed}"

    def run(self, out: Path) -> Path:
        """Where the training run is."""
        return out / "runs" / self.model / self.preset / f"seed={self.seed}"

    def result(self, out: Path) -> Path:
        """The file that says that the cell is finished."""
        return self.folder(out) / "result.json"


class Runner(Protocol):
    """Trains and evaluates one kind of model; both leave and read everything in the run folder."""

    def train(self, cell: Cell, run: Path) -> None:
        """Train to the budget, continuing whatever an earlier attempt left in `run`."""

    def evaluate(self, cell: Cell, run: Path) -> Mapping[str, Any]:
        """Play `cell.episodes` fresh episodes with `cell.checkpoint`, or probe its features.

        Returns:
            At least `cell.score` and `episodes` (how many it is a mean of); other keys that are in
            `METRICS` become rows as well.
        """


def run_cell(
    model: str,
    preset: str,
    task: str,
    seed: int,
    out_dir: Path | str,
    *,
    runner: Runner | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train and evaluate one cell, or return the result that is already there.

    Args:
        model: a zoo model or a baseline (`random`, `dqn`, `ppo`, `sac`, `offline-dqn`,
            `copy-last-frame`).
        preset: the model's preset, or the baseline's task preset.
        task: the environment that the preset stands for; checked.
        seed: of everything in the cell.
        out_dir: the results folder, shared by all cells of a suite.
        runner: how to train and evaluate; found by the model's name unless given.
        options: the other fields of `Cell`.

    Returns:
        The content of `result.json`: `{"cell": {...}, "rows": [...]}`.

    Raises:
        UserError: the folder holds a cell with other settings, or another process is running it.
    """
    out = Path(out_dir)
    cell = Cell(model, preset, task, seed, **options)
    folder, result = cell.folder(out), cell.result(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        _claim(cell, folder / "cell.json")
        if not result.exists():
            runner = runner or find_runner(cell)
            run = cell.run(out)
            runner.train(cell, run)
            final = runner.evaluate(cell, run)
            rows = [asdict(row) for row in collect_rows(cell, run, final)]
            write_json(result, {"cell": asdict(cell), "rows": rows})
    return read_json(result)


def find_runner(cell: Cell) -> Runner:
    """The runner of probes, of dreams or of a baseline if the cell is one, otherwise the zoo's."""
    from benchmarks.baselines import BASELINES, BaselineRunner

    if cell.probe:
        from benchmarks.probed import ProbeRunner

        return ProbeRunner()
    if cell.video:
        from benchmarks.video import VideoRunner

        return VideoRunner()
    return BaselineRunner() if cell.model in BASELINES else ZooRunner()


class ZooRunner:
    """Trains and evaluates through the verbs of the `zoo` command, in this process."""

    def train(self, cell: Cell, run: Path) -> None:
        """`zoo fit --resume`, which starts, continues, or finds that the budget is used up."""
        from zoo import configs
        from zoo.commands import fit

        preset = f"{cell.model}/{cell.base or cell.preset}"
        env = cell.options.get(ENV, configs.compose(preset)["data"]["init_args"].get("env"))
        if env != cell.task and not (
            cell.probe or cell.video
        ):  # recordings need no environment to be learnt from
            raise UserError(f"preset {preset} is for {env}, not for {cell.task}")
        command = [*fit_command(cell, run), "--resume"]
        code = fit.main(command)
        if code > 128:  # a signal: the run is saved, and the cell can be called again
            raise SystemExit(code)
        if code:
            raise RuntimeError(f"zoo fit {' '.join(command)} ended with exit code {code}")

    def evaluate(self, cell: Cell, run: Path) -> Mapping[str, Any]:
        """`zoo eval --json`, and the number of parameters that were trained."""
        import contextlib
        import io

        from zoo.commands import eval as evaluate
        from zoo.runs import load

        seed = str(EVAL_SEED_OFFSET + cell.seed)
        command = [str(run), "--episodes", str(cell.episodes), "--seed", seed, "--json"]
        if cell.checkpoint == "last":  # the best is its default, and the last where there is none
            command += ["--checkpoint", "last"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = evaluate.main(command)
        text = printed.getvalue()
        if code or "{" not in text:
            raise RuntimeError(f"zoo eval {' '.join(command)} ended with {code}: {text}")
        trained = (parameter for parameter in load(run).parameters() if parameter.requires_grad)
        params = sum(parameter.numel() for parameter in trained)
        return {"params": params, **json.loads(text[text.index("{") :])}


def fit_command(cell: Cell, run: Path) -> list[str]:
    """Arguments of `zoo fit` that train this cell's model."""
    preset = f"{cell.model}/{cell.base or cell.preset}"
    command = [preset, "--run", str(run), "--seed", str(cell.seed)]
    for key, value in cell.options.items():
        # A string as it is: in the quotes of JSON it is not among the choices of an option.
        command.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    if cell.seconds is not None:
        return [*command, "--seconds", str(cell.seconds)]
    return command if cell.env_steps is None else [*command, "--env-steps", str(cell.env_steps)]


class Logged(NamedTuple):
    """One line of a run's metrics.csv."""

    updates: int
    env_steps: int
    metric: str
    value: float


def read_metrics(run: Path) -> list[Logged]:
    """All complete lines of a run's metrics.csv, in order; none if there is no such file."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        complete = [line for line in file if line.endswith("\n")]  # it may be being written
    return [
        Logged(int(line["updates"]), int(line["env_steps"]), line["metric"], float(line["value"]))
        for line in csv.DictReader(complete)
    ]


def collect_rows(cell: Cell, run: Path, final: Mapping[str, Any]) -> list[Row]:
    """The rows of a finished cell: learning curve, logged metrics, costs, final evaluation.

    Args:
        cell: what was asked.
        run: a folder with done.json (`env_steps`, `updates`, `wall_s`) and, unless the model does
            not learn, metrics.csv.
        final: what `Runner.evaluate` returned.
    """
    logged = read_metrics(run)
    done = read_json(run / "done.json")
    updates, env_steps = int(done["updates"]), int(done["env_steps"])
    wall_s = _training_seconds(done, logged)
    wall_at = {
        (line.env_steps, line.updates): line.value for line in logged if line.metric == _WALL
    }
    shared = (cell.suite, cell.model, cell.preset, cell.task, cell.seed)
    origin = (git_sha(), versions(), hardware())

    def at(line: Logged, metric: str, n: int) -> Row:
        where = (line.env_steps, line.updates)  # on recorded data only the updates tell
        return Row(*shared, *where, metric, line.value, n, wall_at.get(where), *origin)

    def at_end(metric: str, value: float, n: int = 1) -> Row:
        return Row(*shared, env_steps, updates, metric, float(value), n, wall_s, *origin)

    episodes = _callback_option(run, "Evaluation", "episodes") or cell.eval_episodes
    starts = _callback_option(run, "DreamRealityGap", "starts") or episodes
    curve = f"eval/{cell.score}"
    rows = [at(line, cell.score, episodes) for line in logged if line.metric == curve]
    for line in logged:
        metric = line.metric.removeprefix("eval/")
        if metric != line.metric and _base(metric) in METRICS - _FINAL_ONLY - {cell.score}:
            rows.append(at(line, metric, starts))
    if wall_s:
        rows.append(at_end("updates_per_s", updates / wall_s))
        rows.append(at_end("env_steps_per_s", env_steps / wall_s))
    rows.append(at_end("peak_rss_mb", peak_rss_mb()))
    n = int(final["episodes"])
    last = [key for key in ("return_std", cell.score) if key in final]
    for key in final:
        if _base(key) in METRICS - set(last):
            rows.append(at_end(key, final[key], 1 if key == "params" else n))
    return [*rows, *(at_end(key, final[key], n) for key in last)]


def _training_seconds(done: Mapping[str, Any], logged: Sequence[Logged]) -> float | None:
    """Seconds of the whole run without those that its callbacks spent on measuring."""
    if not done.get("wall_s"):
        return None
    measuring = (
        line.value
        for line in logged
        if line.updates  # before the first the clock stands still
        and line.metric.startswith("time/")
        and line.metric.endswith("_s")
        and line.metric != _WALL
        and not line.metric.endswith("per_s")
    )
    return float(done["wall_s"]) - sum(measuring)


def _callback_option(run: Path, callback: str, option: str) -> int | None:
    """An argument of one of the run's callbacks; None if the run does not name it."""
    if not (run / "config.yaml").exists():
        return None
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    for entry in config.get("trainer", {}).get("callbacks") or []:
        if entry["class_path"].split(".")[-1] == callback:
            value = entry.get("init_args", {}).get(option)
            return None if value is None else int(value)
    return None


def write_json(path: Path, content: Any) -> None:
    """Write atomically: the file is there completely or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is not JSON; the file is named.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it to run the cell again") from error


def _claim(cell: Cell, path: Path) -> None:
    """Write down the request, or check that it is the one that the folder was made for."""
    asked = asdict(cell)
    if not path.exists():
        write_json(path, asked)
    # A request that was made before a field existed has its default.
    there = {**asdict(Cell("", "", "", 0)), **read_json(path)}
    different = [
        f"{key} {there.get(key)!r} instead of {asked[key]!r}"
        for key in asked
        if there.get(key) != asked[key]
    ]
    if different:
        raise UserError(
            f"{path} was made with {', '.join(different)}; choose another --out or delete it "
            f"together with its run"
        )


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the cell's lock; the system frees it however the process ends."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is being run by another process; wait or end it") from error
        yield


def _base(metric: str) -> str:
    return metric.split("@")[0]


def main(argv: list[str] | None = None) -> int:
    """Run the cell that a JSON object describes: what the pool starts for each cell."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.cell", description=main.__doc__)
    parser.add_argument("cell", help="the fields of a Cell as a JSON object")
    parser.add_argument("--out", type=Path, required=True, help="the results folder")
    arguments = parser.parse_args(argv)
    _end_with_parent()
    try:
        run_cell(out_dir=arguments.out, **json.loads(arguments.cell))
    except UserError as error:
        print(f"error: {error}")
        return 2
    return 0


def _end_with_parent() -> None:
    """Stop as on SIGTERM when the pool dies, so that no orphan races a later attempt."""
    import signal
    import threading
    import time

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    raise SystemExit(main())
