"""`zoo list`: the models in the catalogue."""

from __future__ import annotations

import json

from zoo import registry
from zoo.commands.options import Parser
from zoo.commands.output import table

HELP = "list the models and their presets"


def markdown(names: list[str]) -> str:
    """The table of the README: what each model is and can do."""
    head = ["model", "paper", "learns from", "observations", "actions", "can", "presets"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        card = registry.card(name)
        paper = f"[{card.title} ({card.year})]({card.url})"
        parts = (card.data, card.observations, card.actions, card.can, registry.presets(name))
        page = f"[`{name}`]({card.class_path.split(':')[0].rpartition('.')[0].replace('.', '/')})"
        lines.append([page, paper, *(", ".join(part) or "-" for part in parts)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> int:
    """Prints the models that match a pattern; exit code 1 when none does."""
    parser = Parser(prog="zoo list", description=HELP)
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, as 'dreamer*'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    options = parser.parse_args(argv)

    names = registry.list_models(options.pattern)
    if options.json:
        models = {
            name: {"summary": registry.card(name).summary, "presets": registry.presets(name)}
            for name in names
        }
        print(json.dumps({"models": models}))
        return 0
    if options.markdown:
        print(markdown(names))
        return 0
    if not names:
        print(f"no model matches '{options.pattern}'; `zoo list` shows them all")
        return 1
    rows = [[n, registry.card(n).summary, ", ".join(registry.presets(n)) or "-"] for n in names]
    table(["model", "what it is", "presets"], rows)
    return 0
