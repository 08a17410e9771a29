"""`zoo bench SUITE`: run a comparison and report it."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.cell import Cell
    from benchmarks.suite import Suite

HELP = "run a benchmark suite and report it"


def main(argv: list[str]) -> int:
    """Run the cells that have no result yet, write the report, print the table.

    Returns:
        0; 1 if cells failed; 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    from benchmarks.suite import load_suite

    suite = load_suite(arguments.suite)
    out = arguments.out or Path("bench") / suite.name
    if suite.kind == "speed":
        import importlib

        return int(importlib.import_module("benchmarks.speed").main(["--out", str(out)]))

    from benchmarks.pool import shard

    every = suite.cells(arguments.seeds)
    cells = shard(every, arguments.shard) if arguments.shard else every
    if arguments.dry_run:
        for cell in cells:
            state = "done" if cell.result(out).exists() else "to run"
            budget = f" for {cell.env_steps:,} env steps" if cell.env_steps else ""
            budget = f" for {cell.seconds:,} seconds" if cell.seconds else budget
            print(f"{state:6}  {cell.name} on {cell.task}{budget}")
        print(f"{len(cells)} of {len(every)} cells, into {out}")
        return 0
    return _run(suite, cells, out, arguments)


def _run(suite: "Suite", cells: "list[Cell]", out: Path, arguments: argparse.Namespace) -> int:
    from benchmarks.cell import write_json
    from benchmarks.commands.report import show_report
    from benchmarks.display import open_display
    from benchmarks.pool import run_pool
    from benchmarks.provenance import cores
    from benchmarks.summary import MANIFEST

    out.mkdir(parents=True, exist_ok=True)
    jobs = arguments.jobs if arguments.jobs is not None else cores()
    seeds = suite.seeds if arguments.seeds is None else arguments.seeds
    command = ["zoo", "bench", arguments.suite, "--seeds", str(seeds), "--jobs", str(jobs)]
    write_json(
        out / MANIFEST,
        {
            "suite": suite.to_dict(),
            "seeds": seeds,
            "command": shlex.join([*command, "--out", str(out)]),
        },
    )
    try:
        with open_display() as display:
            failed = run_pool(cells, out, jobs, display)
    except KeyboardInterrupt:
        print("stopped; the same command continues")
        return 130
    missing = show_report(out)
    # In a shard the cells of the other shards are missing, which is no failure of this one.
    return 1 if failed or (missing and not arguments.shard) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo bench", description=HELP)
    parser.add_argument("suite", help="name of a suite, or a yaml file")
    parser.add_argument("--out", type=Path, help="results folder (default: bench/SUITE)")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the suite's)")
    parser.add_argument("--jobs", type=int, help="cells at a time (default: number of cores)")
    parser.add_argument("--shard", metavar="i/n", help="run only the i-th of n parts")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and their state")
    return parser
