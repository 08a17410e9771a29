"""`zoo fit`: trains a model, continues a training, or fine-tunes one.

It is a LightningCLI whose configuration is put together by `zoo.configs`; every LightningCLI option
may follow those of `zoo fit`.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from zoo import configs
from zoo.commands.options import Parser
from zoo.runs import CONFIG, load_weights, read_checkpoint, read_config

if TYPE_CHECKING:
    import pytorch_lightning as pl

HELP = "train a model: MODEL/PRESET, MODEL --env ENV or --source DATA, or a config.yaml"
EPILOG = """\
what to train:
  MODEL/PRESET      a preset of the catalogue (`zoo list`)
  MODEL --env ENV   any environment with the model's own settings
  MODEL[/PRESET] --source DATA
                    recorded data: a Minari id, an HDF5 file, a store, another run
  FILE.yaml         the config.yaml of an earlier run, or a preset of your own
  RUN               a run directory, with --resume

every LightningCLI option may follow, for example
  --model.size nano  --data.num_envs 8  --trainer.max_time 00:01:00:00
  --print_config     shows the complete configuration and ends
"""

# What Lightning says about things that are meant to be so here.
POINTLESS_WARNINGS = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*your dataloader is not resumable.*",  # the datamodule is
    ".*overridden `on_before_batch_transfer` in `LightningModule`.*",  # models check their batches
    ".*passed in a `val_dataloader` but have no `validation_step`.*",  # callbacks look at it
)


@dataclass(frozen=True)
class Plan:
    """What is to be run: a complete configuration, where, and from which checkpoint."""

    config: configs.Config
    directory: Path
    resume: Path | None


def main(argv: list[str]) -> int:
    """Trains; 0 when done, 2 for a user's mistake, 128 + n when signal n ended it."""
    options, lightning_options = _parse(argv)
    plan = _plan(options)
    printing = any(a.startswith("--print_config") for a in lightning_options)
    if plan.resume is not None and not printing:
        reached = _finished(plan)
        if reached:
            _say(f"the run '{plan.directory}' is done ({reached}): a larger budget continues it")
            return 0
    if options.resume and plan.resume is None:
        _say(f"nothing to resume in '{plan.directory}': starting anew")
    return _train(plan, lightning_options)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="zoo fit",
        description=HELP,
        epilog=EPILOG,
        usage="zoo fit TARGET [options] [LightningCLI options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--env", help="environment: a gymnasium id, dm_control/..., ale/...")
    parser.add_argument("--source", help="recorded data: a Minari id, a file, a store or a run")
    parser.add_argument("--run", type=Path, help="run directory (runs/MODEL/PRESET/seed=N)")
    parser.add_argument("--seed", type=int, help="seed of everything (0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--env-steps", type=int, help="stop after so many environment frames")
    length.add_argument("--updates", type=int, help="stop after so many updates")
    length.add_argument("--seconds", type=float, help="stop after so many seconds of training")
    parser.add_argument("--from", dest="weights", help="fine-tune: a run, .ckpt, folder or hub id")
    parser.add_argument("--resume", action="store_true", help="continue the run if it exists")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (1)")
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if argv[0].startswith("-"):
        raise UserError(f"`zoo fit` needs to know what to train before '{argv[0]}': MODEL/PRESET")
    options, rest = parser.parse_known_args(argv[1:])
    options.target = argv[0]
    return options, rest


def _plan(options: argparse.Namespace) -> Plan:
    """Finds the configuration and the run directory, and whether there is a run to continue."""
    config = configs.compose(options.target, options.env, options.source)
    seed = config.get("seed_everything", 0) if options.seed is None else options.seed
    directory = options.run
    if directory is None:
        named = Path(options.target)
        directory = named if named.is_dir() else configs.run_directory(config, seed)
    last = directory / "checkpoints" / "last.ckpt"
    resume = last if last.is_file() else None
    if resume is None and (directory / "checkpoints" / "best.ckpt").is_file():
        raise UserError(
            f"'{directory}' holds a best.ckpt but no last.ckpt to go on from: move it away, or add "
            "--run DIRECTORY"
        )
    if resume is not None:
        if not options.resume:
            raise UserError(
                f"'{directory}' already holds a run: add --resume to continue it, or --run "
                "DIRECTORY to start another"
            )
        recorded = read_config(directory / CONFIG)
        _same_run(directory, recorded, config, options.seed)
        config, seed = recorded, recorded["seed_everything"]
    _apply(config, options, directory, seed)
    return Plan(config, directory, resume)


def _same_run(
    directory: Path, recorded: configs.Config, wanted: configs.Config, seed: int | None
) -> None:
    """Refuses to continue one run under the name of another."""
    for key in ("model", "preset"):
        theirs, ours = recorded["zoo"][key], wanted["zoo"][key]
        if theirs != ours:
            raise UserError(f"'{directory}' holds a run of {key} '{theirs}', not '{ours}'")
    if seed is not None and seed != recorded["seed_everything"]:
        raise UserError(
            f"the run '{directory}' has seed {recorded['seed_everything']}, not {seed}: leave out "
            "--seed, or name another --run"
        )


def _apply(config: configs.Config, options: argparse.Namespace, directory: Path, seed: int) -> None:
    """Puts the options of `zoo fit` into the configuration."""
    configs.set_option(config, "seed_everything", seed)
    configs.set_option(config, "data.init_args.seed", seed)
    configs.set_option(config, "trainer.default_root_dir", str(directory))
    if options.weights is not None:
        configs.set_option(config, "zoo.weights", options.weights)
    if options.threads is not None:
        configs.set_option(config, "zoo.threads", options.threads)
    lengths = {name: getattr(options, name) for name in ("env_steps", "updates", "seconds")}
    if any(value is not None for value in lengths.values()):
        configs.budget(config).update(lengths)
    budget, trainer = configs.budget(config), config["trainer"]
    limits = [*(budget.get(name) for name in lengths), trainer.get("max_time")]
    unlimited = trainer.get("max_epochs") in (-1, None) and trainer.get("max_steps", -1) == -1
    recorded = (config.get("data") or {}).get("class_path") in configs.RECORDED_DATA
    if (
        recorded
        and budget.get("env_steps")
        and not (budget.get("updates") or budget.get("seconds"))
    ):
        raise UserError("recorded data has no env steps: say how long to train by --updates N")
    if unlimited and not any(limits):
        raise UserError(
            "nothing says how long to train: add --env-steps N, --updates N or --seconds S"
        )


def _finished(plan: Plan) -> str:
    """How far the run came if it has used its budget up, else nothing."""
    if plan.resume is None or not (plan.directory / "done.json").is_file():
        return ""
    checkpoint = read_checkpoint(plan.resume)
    counters = checkpoint.get("zoo", {}) | checkpoint.get("callbacks", {}).get("Budget", {})
    for name, wanted in configs.budget(plan.config).items():
        if wanted is not None and name in counters and counters[name] >= wanted:
            return f"{counters[name]:.0f} {name.replace('_', ' ')}"
    return ""


def _train(plan: Plan, lightning_options: list[str]) -> int:
    import torch

    # Imported here: they take seconds, and a mistake in the options should show at once.
    from zoo.commands.lightning import build
    from zoo.evaluate import require_env

    _quiet()
    cli = build(plan.config, lightning_options)
    torch.set_num_threads(cli.config.zoo.threads)
    # Deterministic kernels, yes; but filling all new memory first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    weights = cli.config.zoo.weights
    if weights is not None and plan.resume is None:
        load_weights(cli.model, weights)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    if any(hasattr(callback, "measure") for callback in callbacks):
        require_env(cli.model, cli.datamodule)
    directory = Path(cli.trainer.default_root_dir)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        _prepare(directory, fresh=plan.resume is None)
        _write(directory / CONFIG, cli.complete_config())
    return _fit(cli.trainer, cli.model, cli.datamodule, plan.resume)


def _fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    resume: Path | None,
) -> int:
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    except SystemExit:  # how Lightning ends after a second Ctrl-C, or one between two updates
        if _interrupted(trainer) is None:
            raise KeyboardInterrupt from None
    number = _interrupted(trainer)
    if number is None:
        return 0
    _say(f"stopped; --resume continues the run '{trainer.default_root_dir}'")
    return 128 + number


def _interrupted(trainer: pl.Trainer) -> int | None:
    """The signal after which the run was saved and stopped."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    numbers = [getattr(callback, "interrupted_by_signal", None) for callback in callbacks]
    return next((number for number in numbers if number is not None), None)


def _prepare(directory: Path, fresh: bool) -> None:
    """Makes the directory; clears what a run left that ended before its first checkpoint."""
    if fresh and (directory / CONFIG).is_file():
        for name in ("replay", "videos", "checkpoints"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for file in [*directory.glob("events.out.tfevents.*"), directory / "metrics.csv"]:
            file.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)


def _write(path: Path, text: str) -> None:
    """Replaces a file at once, so that a crash leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _quiet() -> None:
    """Silences advertisements, tips and warnings about what is meant to be so."""
    import pytorch_lightning  # noqa: F401  (sets its loggers up when it is imported)

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in POINTLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _say(text: str) -> None:
    """One line for the person at the terminal, from the first process only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)
