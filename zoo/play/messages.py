"""What the page may say to the server; anything else is refused.

One JSON object each:
- `{"type": "keys", "held": [...]}`: the keys that are down, in the order in which they went down;
- `{"type": "pause", "on": true}`, `{"type": "record", "on": true}`;
- `{"type": "reset", "start": 0}`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from datamodules.errors import UserError

LONGEST = 2048  # characters


@dataclass(frozen=True)
class Keys:
    """The keys that are held."""

    held: tuple[str, ...]


@dataclass(frozen=True)
class Pause:
    """Stop the clock, or let it run."""

    on: bool


@dataclass(frozen=True)
class Record:
    """Begin a recording, or end it and send it."""

    on: bool


@dataclass(frozen=True)
class Reset:
    """Begin anew at a start."""

    start: int


Message = Keys | Pause | Record | Reset


def parse(text: str | None, keys: Collection[str], starts: int) -> Message:
    """Reads a message.

    Args:
        text: what came; None if it was not text.
        keys: those that mean something.
        starts: number of starts there are.

    Raises:
        UserError: what is wrong with it.
    """
    said = _object(text)
    kind = said.pop("type", None)
    if kind == "keys" and said.keys() == {"held"}:
        return Keys(_held(said["held"], keys))
    if kind in ("pause", "record") and said.keys() == {"on"}:
        if not isinstance(said["on"], bool):
            raise UserError(f"'on' of a message '{kind}' must be true or false")
        return Pause(said["on"]) if kind == "pause" else Record(said["on"])
    if kind == "reset" and said.keys() == {"start"}:
        start = said["start"]
        if type(start) is not int or not 0 <= start < starts:
            raise UserError(f"'start' of a message 'reset' must be one of 0 to {starts - 1}")
        return Reset(start)
    raise UserError(
        "a message must be keys with 'held', pause or record with 'on', or reset with 'start'"
    )


def _object(text: str | None) -> dict[str, Any]:
    if text is None or len(text) > LONGEST:
        raise UserError(f"a message must be text of at most {LONGEST} characters")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UserError("a message must be one JSON object")
    return said


def _held(held: Any, keys: Collection[str]) -> tuple[str, ...]:
    if not isinstance(held, list) or not all(isinstance(key, str) for key in held):
        raise UserError("'held' of a message 'keys' must be a list of names of keys")
    if len(set(held)) != len(held) or not set(held) <= set(keys):
        raise UserError(f"the keys held must be different ones of {sorted(keys)}")
    return tuple(held)
