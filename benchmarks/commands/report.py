"""`zoo report DIR`: tables, charts and documents from the results in a folder."""

import argparse
from pathlib import Path

HELP = "write the report of a results folder"


def main(argv: list[str]) -> int:
    """Write the report and print its tables; 1 if a cell of the suite has no result."""
    parser = argparse.ArgumentParser(prog="zoo report", description=HELP)
    parser.add_argument("dir", type=Path, help="what `zoo bench --out` wrote")
    arguments = parser.parse_args(argv)
    return show_report(arguments.dir)


def show_report(out: Path) -> int:
    """Write the report of `out`, print its tables, what is missing, and where it is.

    Returns:
        0, or 1 if a cell of the suite has no result.
    """
    from benchmarks.report import write_report
    from benchmarks.tables import (
        AGGREGATE_HEADER,
        aggregate_rows,
        counted,
        failures,
        published_rows,
        score_header,
        score_rows,
    )
    from zoo.commands.output import table

    summary = write_report(out)
    for task in summary.tasks:
        print(f"\n{summary.title}: {task}\n")
        table(score_header(summary), score_rows(summary, task))
    for what, rows in (
        ("over all tasks, normalised", aggregate_rows(summary)),
        ("published, normalised", published_rows(summary)),
    ):
        if rows:
            print(f"\n{summary.title}: {what}\n")
            table(AGGREGATE_HEADER, rows)
    failed = failures(summary)
    if failed:
        print(f"\nwithout a result: {counted(len(failed), 'cell')}")
    for name, words in failed:
        print(f"\n{name}\n" + "\n".join(f"  {line}" for line in words.splitlines()))
    print(f"\nreport: {out / 'report.html'}")
    return 1 if failed else 0
