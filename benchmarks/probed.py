"""Cells of a suite of probes: an encoder is trained, and the truth is read out of its features.

The suite names what is probed for:

    score: probe_r2
    probe: {target: position, clips: 600, clip_length: 4}

Each cell is probed on clips of its own seed, played with random actions in its task. Beside the
zoo's encoders there are two that learn nothing: `pixels`, the images themselves, and `untrained`, a
model of the zoo as it is built (`options: {of: MODEL/PRESET}`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.cell import EVAL_SEED_OFFSET, Cell, ZooRunner, write_json
from callbacks.probes import probe
from callbacks.probing import record_truth
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo import configs
from zoo.evaluate import MakeEnv
from zoo.runs import load

PIXELS, UNTRAINED = "pixels", "untrained"
UNLEARNED = (PIXELS, UNTRAINED)


class ProbeRunner:
    """Trains, if there is anything to learn, and probes; see `benchmarks.cell.Runner`."""

    def train(self, cell: Cell, run: Path) -> None:
        """As any cell of the zoo; pixels and untrained models are there already."""
        if cell.model not in UNLEARNED:
            ZooRunner().train(cell, run)
            return
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "done.json", {"env_steps": 0, "updates": 0, "wall_s": None})

    def evaluate(self, cell: Cell, run: Path) -> Mapping[str, Any]:
        """R^2 of all probes on fresh clips, and the number of parameters that are trained."""
        model, make_env = self._model(cell, run)
        seed = EVAL_SEED_OFFSET + cell.seed
        options = {"target": "position", "clips": 400, "clip_length": 4, **cell.probe}
        truth = record_truth(
            make_env, options["target"], options["clips"], options["clip_length"], seed
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = probe(model, truth)
        named = {f"probe_{name}": value for name, value in found.items()}
        return {**named, "params": _parameters(model), "episodes": options["clips"]}

    def _model(self, cell: Cell, run: Path) -> tuple[Any, MakeEnv]:
        """What is probed, and what builds the task with images of its size."""
        make = partial(make_env, cell.task)
        if cell.model == PIXELS:
            return Pixels(_spec(make)), make
        if cell.model != UNTRAINED:
            model = load(run)
            side = model.spec.obs[model.spec.images[0]].shape[0]
            return model.eval(), partial(make, size=side)
        if "of" not in cell.options:
            raise UserError(f"{cell.name}: which model? options: {{of: MODEL/PRESET}}")
        target = str(cell.options["of"])
        make = partial(make, size=configs.compose(target)["data"]["init_args"].get("size"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            return zoo.create(target, _spec(make)).eval(), make


class Pixels:
    """Images as they are, as features."""

    device = torch.device("cpu")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def encode(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, T, F) of images (B, T, H, W, C)."""
        return torch.cat([obs[key].flatten(2).float() / 255 for key in self.spec.images], -1)


def _spec(make: MakeEnv) -> Spec:
    env = make()
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    env.close()
    return spec


def _parameters(model: Any) -> int:
    if isinstance(model, Pixels):
        return 0
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
