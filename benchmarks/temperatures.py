"""`python -m benchmarks.temperatures RUN`: table 2 of World Models, with the V and M of a run.

For each temperature a controller evolves from zeros in dreams of that temperature, and is then
played in the environment of the run. A sharp dream can be cheated: what a controller earns there it
does not earn in reality. Everything else is as in the run, and the same for all temperatures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.errors import UserError
from zoo.evaluate import MakeEnv, evaluate
from zoo.runs import Run, load
from zoo.world_models.dreams import LinearMembers, dream
from zoo.world_models.evolution import Evolution
from zoo.world_models.module import WorldModels

TEMPERATURES = (0.1, 0.5, 1.0, 1.15, 1.3)
STARTS = 64  # episodes whose first frames dreams begin with
DREAMS = 256  # in which the evolved controller is scored


class Swept(NamedTuple):
    """What a controller earned that evolved at a temperature: means and standard deviations."""

    temperature: float
    dreamed: float
    dreamed_std: float
    real: float
    real_std: float


@torch.no_grad()
def sweep(
    model: WorldModels,
    make_env: MakeEnv,
    temperatures: tuple[float, ...],
    generations: int,
    episodes: int,
    seed: int = 0,
) -> Iterator[Swept]:
    """Evolves and plays one controller after the other; the model ends with the last.

    Args:
        model: its V and M are used, and its settings of the evolution.
        make_env: the environment.
        temperatures: of the dreams.
        generations: of each controller.
        episodes: to play with each.
        seed: of everything; all temperatures meet the same starts and noise.
    """
    starts = first_codes(model, make_env, seed)

    def scored(members: Tensor, temperature: float, dreams: int) -> Tensor:
        population = model.controller.population(members)
        linear = LinearMembers(population, model.actions, model.features)
        start = starts[torch.randint(len(starts), (dreams,))]
        return dream(model.dreamer(temperature), linear, len(members), start, model.horizon).reward

    for temperature in temperatures:
        torch.manual_seed(seed)
        zeros = torch.zeros(model.controller.size)
        evolution = Evolution(zeros, model.sigma, model.population, seed, model.diagonal)
        for _ in range(generations):
            members = evolution.ask()
            penalty = model.weight_decay * members.square().mean(1)
            evolution.tell(scored(members, temperature, model.rollouts).mean(1) - penalty)
        model.controller.load(evolution.mean)
        dreamed = scored(evolution.mean[None], temperature, DREAMS)
        played = evaluate(model, make_env, episodes, seed)
        yield Swept(
            temperature,
            float(dreamed.mean()),
            float(dreamed.std()),
            played.return_mean,
            played.return_std,
        )


def first_codes(model: WorldModels, make_env: MakeEnv, seed: int) -> Tensor:
    """Codes (STARTS, Z) of first observations."""
    with closing(make_env()) as env:
        seen = [env.reset(seed=seed * STARTS + i)[0] for i in range(STARTS)]
    obs = {key: torch.stack([torch.from_numpy(o[key]) for o in seen]) for key in model.spec.obs}
    code = model.vision.encode({key: value.unsqueeze(1) for key, value in obs.items()})
    return code.sample()[:, 0]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run of world-models")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run = Run(options.run)
    model: Any = load(run.checkpoint("last"))
    if not isinstance(model, WorldModels):
        raise UserError(f"'{options.run}' is a run of {model.name}: name one of world-models")
    torch.set_num_threads(1)
    print("| temperature | in the dream | in reality |\n| --- | --- | --- |")
    for row in sweep(
        model.eval(),
        run.datamodule().make_env,
        tuple(options.temperatures),
        options.generations,
        options.episodes,
        options.seed,
    ):
        dreamed, real = f"{row.dreamed:.0f} ± {row.dreamed_std:.0f}", f"{row.real:.0f}"
        print(f"| {row.temperature:g} | {dreamed} | {real} ± {row.real_std:.0f} |", flush=True)


if __name__ == "__main__":
    main()
