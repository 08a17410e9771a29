from __future__ import annotations

import json
from typing import Any

import pytest

from datamodules.errors import UserError
from zoo.play.messages import LONGEST, Keys, Message, Pause, Record, Reset, parse

KEYS = ("a", "ArrowLeft")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"type": "keys", "held": []}, Keys(())),
        ({"type": "keys", "held": ["ArrowLeft", "a"]}, Keys(("ArrowLeft", "a"))),
        ({"type": "pause", "on": True}, Pause(True)),
        ({"type": "record", "on": False}, Record(False)),
        ({"type": "reset", "start": 2}, Reset(2)),
    ],
)
def test_what_may_be_said(said: Any, meant: Message) -> None:
    assert parse(json.dumps(said), KEYS, 3) == meant


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "text of at most"),
        (" " * (LONGEST + 1), "text of at most"),
        ("", "one JSON object"),
        ("{", "one JSON object"),
        ("[" * 2000, "one JSON object"),
        ("[]", "one JSON object"),
        ("{}", "a message must be keys with"),
        ('{"type": "step", "action": 1}', "a message must be keys with"),
        ('{"type": ["keys"], "held": []}', "a message must be keys with"),
        ('{"type": "keys"}', "a message must be keys with"),
        ('{"type": "pause", "on": true, "more": 1}', "a message must be keys with"),
        ('{"type": "keys", "held": "a"}', "a list of names"),
        ('{"type": "keys", "held": [["a"]]}', "a list of names"),
        ('{"type": "keys", "held": ["b"]}', "different ones of"),
        ('{"type": "keys", "held": ["a", "a"]}', "different ones of"),
        ('{"type": "pause", "on": 1}', "must be true or false"),
        ('{"type": "reset", "start": 3}', "one of 0 to 2"),
        ('{"type": "reset", "start": -1}', "one of 0 to 2"),
        ('{"type": "reset", "start": true}', "one of 0 to 2"),
        ('{"type": "reset", "start": 1e999}', "one of 0 to 2"),
        ('{"type": "reset", "start": NaN}', "one of 0 to 2"),
    ],
)
def test_anything_else_is_refused_with_a_sentence(text: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        parse(text, KEYS, 3)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200
