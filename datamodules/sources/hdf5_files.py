"""Opens HDF5 files, and turns what h5py says about damaged ones into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.errors import UserError

# h5py raises all of these for damaged files.
DAMAGE = (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def open_hdf5(path: Path, mode: str = "r") -> Any:
    """An open `h5py.File`.

    Raises:
        UserError: h5py is not installed, or the file is not there, cut off or damaged.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("HDF5 files need h5py: pip install h5py") from error
    if mode == "r" and not path.is_file():
        raise UserError(f"there is no file '{path}'")
    try:
        return h5py.File(path, mode)
    except DAMAGE as error:
        size = path.stat().st_size if path.exists() else 0
        raise UserError(
            f"'{path}' ({size} bytes) is not a whole HDF5 file: it is cut off, damaged or still "
            f"being written ({_reason(error)}); copy or download it again"
        ) from error


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns errors of reading a part of a file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(
            f"{where} cannot be read: the file is damaged or cut off ({_reason(error)}); copy or "
            "download it again"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
