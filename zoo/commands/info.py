"""`zoo info`: what one model is and can do."""

from __future__ import annotations

import json
from dataclasses import asdict

from zoo import registry
from zoo.commands.options import Parser
from zoo.commands.output import facts, table

HELP = "what a model can do, its sizes, presets and paper"

ABILITIES = {
    "Policy": "acts in an environment",
    "GoalConditioned": "acts towards a goal that observations show",
    "Imaginer": "dreams ahead from real data",
    "Encoder": "turns observations into features",
    "LatentActions": "infers actions from video",
    "ReplayLatents": "keeps its latent states in the replay",
}


def main(argv: list[str]) -> int:
    """Prints what the catalogue knows of `MODEL` or `MODEL/PRESET`."""
    parser = Parser(prog="zoo info", description=HELP)
    parser.add_argument("model", metavar="MODEL[/PRESET]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)

    model, preset = registry.split(options.model)
    card = registry.card(model)
    chosen = [preset] if preset else registry.presets(model)
    about = {name: registry.preset_summary(f"{model}/{name}") for name in chosen}
    if options.json:
        facts_as_json = {**asdict(card), "presets": about}
        if preset:
            facts_as_json["settings"] = registry.preset_config(options.model)
        print(json.dumps(facts_as_json))
        return 0

    print(f"{card.title}: {card.summary}\n")
    facts(
        [
            ("name", card.name),
            ("paper", f"{card.paper} ({card.authors}, {card.year})"),
            ("link", card.url),
            ("can", "; ".join(f"{name}: {ABILITIES.get(name, name)}" for name in card.can)),
            ("learns from", ", ".join(card.data)),
            ("observations", ", ".join(card.observations)),
            ("actions", ", ".join(card.actions) or "none needed, none read"),
            ("class", card.class_path),
            ("licence", card.licence),
        ]
    )
    if card.sizes and not preset:
        print()
        table(["size", "what it is"], list(card.sizes.items()))
    if about:
        print()
        table(["preset", "what it is for"], [[f"{model}/{n}", text] for n, text in about.items()])
    if preset:
        print(f"\n{registry.preset_path(options.model).read_text().rstrip()}")
    else:
        example = f"{model}/{chosen[0]}" if chosen else f"{model} --env ENV"
        print(f"\ntrain it: zoo fit {example}")
    return 0
