"""Checks of the arguments that models are built with: errors name the value and the mend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from torch import Tensor

from datamodules.errors import UserError


def choose_widths(
    model: str, sizes: Mapping[str, Mapping[str, int]], size: str, given: Mapping[str, int | None]
) -> dict[str, int]:
    """Widths of a size, in which the given ones that are not None win.

    Raises:
        UserError: unknown size, or a width that is not above zero.
    """
    reject_unknown(model, sizes, size=size)
    widths = {key: sizes[size][key] if value is None else value for key, value in given.items()}
    reject_unless_positive(model, **widths)
    return widths


def reject_unless_positive(model: str, **values: float) -> None:
    """Raises a UserError that names the first value that is not above zero."""
    for key, value in values.items():
        if not value > 0:  # NaN, too
            raise UserError(f"{model} needs {key} > 0, got {value}")


def reject_fractions(model: str, **values: float) -> None:
    """Raises a UserError that names the first value that is no integer."""
    for key, value in values.items():
        if not isinstance(value, Integral):
            raise UserError(f"{model} needs a whole {key}, got {value}")


def reject_outside(model: str, low: float, high: float, **values: float) -> None:
    """Raises a UserError that names the first value that is not in [low, high]."""
    for key, value in values.items():
        if not low <= value <= high:
            bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{model} needs {key} {bound}, got {value}")


def reject_ranges(model: str, **values: Sequence[float]) -> None:
    """Raises a UserError that names the first pair that is not 0 < smallest <= largest."""
    for key, pair in values.items():
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise UserError(
                f"{model} needs {key} as a smallest and a largest number above 0, got {list(pair)}"
            )


def reject_unknown(model: str, known: Iterable[str], **values: str) -> None:
    """Raises a UserError that names the first value that is not one of those known."""
    known = list(known)
    for key, value in values.items():
        if value not in known:
            raise UserError(f"{model} has no {key} '{value}': choose one of {', '.join(known)}")


def reject_plan(model: str, actions: object, horizon: int) -> None:
    """Checks what a model is asked to dream.

    Args:
        model: its name.
        actions: given ones (N, H, ...); anything else chooses them, and is not looked at.
        horizon: steps.

    Raises:
        UserError: no whole number of steps above 0, or fewer actions than steps.
    """
    reject_fractions(model, horizon=horizon)
    reject_unless_positive(model, horizon=horizon)
    if isinstance(actions, Tensor) and (actions.dim() < 2 or actions.shape[1] < horizon):
        raise UserError(
            f"{model} was to dream {horizon} steps by actions of shape {tuple(actions.shape)}: "
            "give one for each step, (N, H) or (N, H, ...)"
        )
