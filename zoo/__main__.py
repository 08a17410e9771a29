"""The `zoo` command: finds the verb, runs it, and turns a user's mistake into one sentence.

A verb is a module with `HELP: str` and `main(argv: list[str]) -> int`. Packages bring theirs by the
entry-point group `zoo.commands` (name = module), so that the models, the benchmarks and third
parties stand side by side.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import entry_points

from datamodules.errors import UserError

# What answers when the package's metadata is missing, as in a bare checkout on the path.
_OURS = ("list", "info", "fit", "eval", "play", "export", "push", "data")
BUILT_IN = {
    **{verb: f"zoo.commands.{verb}" for verb in _OURS},
    **{verb: f"benchmarks.commands.{verb}" for verb in ("bench", "report")},
}


def commands() -> dict[str, str]:
    """Every verb and the module that answers it."""
    return {**BUILT_IN, **{point.name: point.value for point in entry_points(group="zoo.commands")}}


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    _wait_passively()
    try:
        return _run(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `zoo list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        import zoo

        print(f"zoo {zoo.__version__}")
        return 0
    known = commands()
    if verb not in known:
        from zoo.registry import unknown

        raise unknown("command", verb, known, "; `zoo --help` explains them")
    return importlib.import_module(known[verb]).main(rest)


def _usage() -> str:
    lines = ["usage: zoo COMMAND ...", "", "World models to pick, train and compare.", ""]
    for verb, module in commands().items():
        try:
            lines.append(f"  {verb:<8} {importlib.import_module(module).HELP}")
        except ImportError as error:
            lines.append(f"  {verb:<8} (not available: {error})")
    lines += ["", "`zoo COMMAND --help` explains a command; --debug shows tracebacks."]
    return "\n".join(lines)


def _wait_passively() -> None:
    """Lets idle OpenMP threads sleep; spinning ones cost up to 8x on a shared machine.

    OpenMP reads this once, when torch is imported; a user's own setting stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


if __name__ == "__main__":
    sys.exit(main())
