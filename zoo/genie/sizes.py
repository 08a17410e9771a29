"""How large the parts of Genie are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.errors import UserError
from zoo.arguments import reject_unknown
from zoo.nets.st_transformer import Shape

# `coinrun` is appendix F, `platformers` tables 5 and 7 and the largest dynamics; `nano` is ours,
# for CPUs. The paper does not say how wide the MLPs are: its totals for Platformers leave room for
# half the width, elsewhere they have the usual four times the width. 36 heads do not divide 5120:
# theirs are of 128.
SIZES: dict[str, dict[str, Shape]] = {
    "nano": {
        "tokenizer_encoder": Shape(layers=1, width=64, heads=2, head=32, hidden=256),
        "tokenizer_decoder": Shape(layers=2, width=96, heads=3, head=32, hidden=384),
        "action_encoder": Shape(layers=2, width=96, heads=3, head=32, hidden=384),
        "action_decoder": Shape(layers=2, width=96, heads=3, head=32, hidden=384),
        "dynamics": Shape(layers=3, width=96, heads=3, head=32, hidden=384),
        "policy": Shape(layers=2, width=64, heads=2, head=32, hidden=256),
    },
    "coinrun": {
        "tokenizer_encoder": Shape(layers=8, width=512, heads=8, head=64, hidden=2048),
        "tokenizer_decoder": Shape(layers=8, width=512, heads=8, head=64, hidden=2048),
        "action_encoder": Shape(layers=8, width=512, heads=8, head=64, hidden=2048),
        "action_decoder": Shape(layers=8, width=512, heads=8, head=64, hidden=2048),
        "dynamics": Shape(layers=12, width=512, heads=8, head=64, hidden=2048),
        "policy": Shape(layers=12, width=512, heads=8, head=64, hidden=2048),
    },
    "platformers": {
        "tokenizer_encoder": Shape(layers=12, width=512, heads=8, head=64, hidden=256),
        "tokenizer_decoder": Shape(layers=20, width=1024, heads=16, head=64, hidden=512),
        "action_encoder": Shape(layers=20, width=1024, heads=16, head=64, hidden=512),
        "action_decoder": Shape(layers=20, width=1024, heads=16, head=64, hidden=512),
        "dynamics": Shape(layers=48, width=5120, heads=36, head=128, hidden=2560),
        "policy": Shape(layers=12, width=512, heads=8, head=64, hidden=256),
    },
}


def choose_shapes(size: str, options: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of a size's parts, in which the given numbers win.

    Args:
        size: one of `SIZES`.
        options: among others {part: {field of `Shape`: number}}, or None for a part as it is.

    Raises:
        UserError: unknown size or field, numbers without names, or one that is too small.
    """
    reject_unknown("Genie", SIZES, size=size)
    shapes = {}
    for part, shape in SIZES[size].items():
        given = options[part] or {}
        if not isinstance(given, Mapping):
            raise UserError(
                f"Genie needs the numbers of a part by name, such as {{layers: 2, width: 64}}, got "
                f"{part}={given}"
            )
        for field in given:
            reject_unknown(f"Genie's {part}", Shape._fields, number=field)
        shapes[part] = shape._replace(**given)
        least = 0 if part == "tokenizer_encoder" else 1
        if shapes[part].layers < least or min(shapes[part][1:]) < 1:
            raise UserError(f"Genie needs layers and widths above 0, got {part}={dict(given)}")
    return shapes
