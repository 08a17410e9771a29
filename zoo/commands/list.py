"""`zoo list`: the models in the catalogue."""

from __future__ import annotations

import json

from zoo import registry
from zoo.commands.options import Parser
from zoo.commands.output import table

HELP = "list the models and their presets"


def main(argv: list[str]) -> int:
    """Prints the models that match a pattern; exit code 1 when none does."""
    parser = Parser(prog="zoo list", description=HELP)
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, as 'dreamer*'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)

    names = registry.list_models(options.pattern)
    if options.json:
        models = {
            name: {"summary": registry.card(name).summary, "presets": registry.presets(name)}
            for name in names
        }
        print(json.dumps({"models": models}))
        return 0
    if not names:
        print(f"no model matches '{options.pattern}'; `zoo list` shows them all")
        return 1
    rows = [[n, registry.card(n).summary, ", ".join(registry.presets(n)) or "-"] for n in names]
    table(["model", "what it is", "presets"], rows)
    return 0
