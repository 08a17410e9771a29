"""Results in long form: one number per row, with everything needed to trust it.

The rows of a run keep their order: first the learning curve (`return_mean` of the evaluations
during training), then what was logged beside it, last the final evaluation of the best
checkpoint on fresh episodes. So a run's final score is its last `return_mean`.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from datamodules.errors import UserError


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        env_steps: frames that the agent had caused when it was measured (action repeat counted).
        updates: gradient updates until then.
        n: how many episodes (or samples) the value is a mean of.
        wall_s: seconds of training until then; None where unknown.
        git_sha: commit of the code, with "-dirty" if files differed from it.
    """

    suite: str
    model: str
    preset: str
    task: str
    seed: int
    env_steps: int
    updates: int
    metric: str
    value: float
    n: int
    wall_s: float | None
    git_sha: str
    versions: str
    hardware: str


COLUMNS = tuple(field.name for field in fields(Row))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, atomically; floats keep every digit."""
    write_table(path, COLUMNS, (asdict(row) for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Raises:
        UserError: the file has other columns or a broken line, which is named.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(
                f"{path} has the columns {', '.join(reader.fieldnames or ['none'])}; "
                f"a results file has {', '.join(COLUMNS)}"
            )
        return [_parse(path, reader.line_num, record) for record in reader]


def write_table(path: Path, columns: Iterable[str], records: Iterable[dict[str, Any]]) -> None:
    """Write dictionaries as CSV, atomically; None becomes an empty field."""
    with replacing(path) as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when the block ends well, whole or not at all.

    Shards of a suite may write the same file at the same time: each has a partial one of its own.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", newline="") as file:
        yield file
    os.replace(partial, path)


def _parse(path: Path, line: int, record: dict[str, str]) -> Row:
    try:
        numbers: dict[str, Any] = {
            key: int(record[key]) for key in ("seed", "env_steps", "updates", "n")
        }
        numbers["value"] = float(record["value"])
        numbers["wall_s"] = float(record["wall_s"]) if record["wall_s"] else None
        return Row(**{**record, **numbers})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} line {line} is not a result row: {error}") from error
