"""`zoo eval`: how well a trained model does in fresh environments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from zoo.commands.options import Parser
from zoo.commands.output import facts
from zoo.runs import Run, load

HELP = "play greedy episodes with a trained model and report the returns"


def main(argv: list[str]) -> int:
    """Evaluates the run's model in environments like those that it was trained in, or others."""
    parser = Parser(prog="zoo eval", description=HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--episodes", type=int, default=10, help="number of episodes (10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the environments (0)")
    parser.add_argument("--env", metavar="ID", help="environment (that of the run)")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="(best, if there is one)")
    parser.add_argument(
        "--target-return", type=float, metavar="R", help="return to ask for, of models that do"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.episodes < 1:
        raise UserError(f"--episodes {options.episodes}: at least 1")

    run = Run(options.run)
    checkpoint = run.checkpoint(options.checkpoint)
    data = run.datamodule(**({} if options.env is None else {"env": options.env}))
    if getattr(data, "make_env", None) is None:
        raise UserError(
            f"the run '{run.path}' was trained on recorded data ({type(data).__name__}) and knows "
            "no environment: add --env ID"
        )

    import torch

    from zoo.base import capabilities
    from zoo.evaluate import evaluate

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load(checkpoint, map_location=device)
    if hasattr(model, "require_policy"):
        model.require_policy()
    if options.target_return is not None:
        if "ReturnConditioned" not in capabilities(model):
            raise UserError(
                f"--target-return {options.target_return}: a {model.name} cannot be asked for a "
                "return, it takes what it can get; leave the option out"
            )
        model.target_return = options.target_return
    target = getattr(model, "target_return", None)
    result = evaluate(model, data.make_env, options.episodes, options.seed)
    report = {
        "return_mean": result.return_mean,
        "return_std": result.return_std,
        "episodes": len(result.returns),
        "env_steps": model.env_steps,
        "updates": model.updates,
        "returns": list(result.returns),
        "lengths": list(result.lengths),
        "seed": options.seed,
        "checkpoint": checkpoint.stem,
    }
    if target is not None:
        report["target_return"] = target
    if options.json:
        print(json.dumps(report))
        return 0
    facts(
        [
            ("return", f"{result.return_mean:.2f} +- {result.return_std:.2f}"),
            *([] if target is None else [("asked for", f"{target:.2f}")]),
            ("episodes", f"{len(result.returns)}, greedy, seed {options.seed}"),
            ("trained for", f"{model.env_steps} env steps, {model.updates} updates"),
            ("checkpoint", str(checkpoint)),
        ]
    )
    return 0
