"""Comparisons: suites of cells, the statistics over them and the report.

A *cell* is one model on one task with one seed. A *suite* lists cells, the *pool* runs them, the
*report* reads what they left behind. Every part works alone: a cell is a plain function, and a
report needs nothing but the folder that the cells wrote.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Cell": "benchmarks.cell",
    "Suite": "benchmarks.suite",
    "list_suites": "benchmarks.suite",
    "load_suite": "benchmarks.suite",
    "run_cell": "benchmarks.cell",
    "run_pool": "benchmarks.pool",
    "write_report": "benchmarks.report",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that the command line starts at once."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'benchmarks' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
