"""How C learns: CMA-ES over its parameters (Hansen; the paper's section 4.4 and appendix A.4)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Evolution:
    """CMA-ES by the package `cma`, that asks for scores of members and maximises them.

    Its state is where it started and every score it was told: told them again, it is where it was.
    That is plain data, which a checkpoint holds without pickled objects.

    Args:
        start: (n,) mean of the first generation.
        sigma: standard deviation of the first generation.
        population: members of a generation.
        seed: of all generations.
        diagonal: adapt only variances (separable CMA-ES), which is faster from a thousand
            parameters on and needs fewer generations there.
    """

    def __init__(
        self, start: Tensor, sigma: float, population: int, seed: int, diagonal: bool = False
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it cannot plot
            import cma

        self.start = start.detach().cpu().double()
        self.told: list[Tensor] = []
        random = np.random.default_rng(seed)
        options = {
            "popsize": population,
            "CMA_diagonal": diagonal,
            "verbose": -9,
            # A generator of its own: by default `cma` seeds and uses numpy's global one.
            "seed": np.nan,
            "randn": lambda *shape: random.standard_normal(shape),
        }
        self._strategy = cma.CMAEvolutionStrategy(self.start.numpy(), sigma, options)
        self._asked: list[Any] | None = None

    @property
    def generation(self) -> int:
        """Generations that were told."""
        return len(self.told)

    @property
    def mean(self) -> Tensor:
        """The mean of the distribution (n,) float32: the result."""
        return torch.from_numpy(np.array(self._strategy.mean, np.float32))

    @property
    def sigma(self) -> float:
        """The step size."""
        return float(self._strategy.sigma)

    def ask(self) -> Tensor:
        """The members (P, n) float32 of the next generation; the same until they are told."""
        if self._asked is None:
            self._asked = self._strategy.ask()
        return torch.from_numpy(np.stack(self._asked).astype(np.float32))

    def tell(self, scores: Tensor) -> None:
        """What the members asked for scored, (P,); more is better."""
        self.ask()
        scores = scores.detach().cpu().double()
        self._strategy.tell(self._asked, (-scores).tolist())
        self.told.append(scores)
        self._asked = None

    def state_dict(self) -> dict[str, Tensor]:
        """The start (n,) and all scores (G, P)."""
        population = self._strategy.popsize
        scores = torch.stack(self.told) if self.told else torch.zeros(0, population).double()
        return {"start": self.start, "scores": scores}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Tells all scores again; for an evolution that was built with the same start."""
        for scores in state["scores"]:
            self.tell(scores)
