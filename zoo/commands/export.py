"""`zoo export`: a run's weights in the Hugging Face layout, with a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from zoo import registry
from zoo.commands.options import Parser
from zoo.runs import CONFIG, WEIGHTS, Run, load, write_identity

HELP = "write a run's weights as config.json, model.safetensors and a model card"

CARD = """\
---
library_name: world-model-zoo
license: {licence}
pipeline_tag: reinforcement-learning
tags:
- world-model
- reinforcement-learning
- {model}
---

# {title}, {preset}

{summary}
{picture}
```python
import zoo

model = zoo.load("{folder}")
```

| | |
|---|---|
{facts}

{citation}

## How it was trained

`zoo fit config.yaml` repeats the training from this file:

```yaml
{config}
```
"""


def main(argv: list[str]) -> int:
    """Exports one checkpoint of a run to a new folder."""
    parser = Parser(prog="zoo export", description=HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; must be empty")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="(best, if there is one)")
    options = parser.parse_args(argv)

    folder: Path = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is there already and not an empty folder: name another one")
    run = Run(options.run)
    checkpoint = run.checkpoint(options.checkpoint)
    model = load(checkpoint)
    settings = run.config().get("zoo", {})
    identity = {
        "model": model.name,
        "preset": settings.get("preset"),
        "env_steps": model.env_steps,
        "updates": model.updates,
        "checkpoint": checkpoint.stem,
    }
    model.save_pretrained(folder)
    write_identity(folder, identity)
    (folder / "README.md").write_text(model_card(model, identity, run, folder))
    print(f"'{folder}' holds {WEIGHTS}, config.json and a model card; `zoo push` publishes it")
    return 0


def model_card(model: Any, identity: dict[str, Any], run: Run, folder: Path) -> str:
    """The README of exported weights, with the newest dream of the run if it has one."""
    import torch

    card = registry.card(model.name)
    config = (run.path / CONFIG).read_text().rstrip()
    trained = run.config()
    facts = {
        "trained on": _trained_on((trained.get("data") or {}).get("init_args", {})),
        "made for": str(model.spec),
        "training": f"{identity['env_steps']} env steps, {identity['updates']} updates",
        "seed": str(trained.get("seed_everything")),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "checkpoint": identity["checkpoint"],
        "sha256 of the weights": _sha256(folder / WEIGHTS),
        "torch": torch.__version__,
    }
    done = run.path / "done.json"
    if done.is_file():
        finished = json.loads(done.read_text())
        if finished.get("best") is not None:
            facts["best evaluation in training"] = f"{finished['best']:.2f}"
        facts["wall time"] = f"{finished.get('wall_s', 0.0):.0f} s"
    dreams = sorted((run.path / "videos").glob("*.gif"), key=lambda gif: gif.stat().st_mtime)
    if dreams:
        shutil.copyfile(dreams[-1], folder / "dream.gif")
    return CARD.format(
        picture="\n![reality and dream](dream.gif)\n" if dreams else "",
        licence=card.licence.lower(),
        model=card.name,
        title=card.title,
        preset=identity["preset"],
        summary=card.summary,
        folder=folder.name,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        citation=f"Paper: [{card.paper}]({card.url}) ({card.authors}, {card.year}).",
        config=config,
    )


def _trained_on(data: dict[str, Any]) -> str:
    """The recorded data, or the environment."""
    source = data.get("source")
    if isinstance(source, list):
        return ", ".join(map(str, source))
    return str(source or data.get("env") or "recorded data")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
