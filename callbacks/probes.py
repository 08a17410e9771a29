"""`Probes`: does an encoder know where things are?"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl

from callbacks.probing import Truth, attentive_r2, features, linear_r2, nearest_r2, record_truth
from callbacks.schedule import EveryEnvSteps
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from zoo.base import Encoder


class Probes(EveryEnvSteps):
    """Reads something that the environment tells out of frozen features, by simple probes.

    Clips are played once with random actions in an environment; what its `info` says under `target`
    is the truth. Metrics, R^2 on clips of their own:

    - `eval/probe_r2`: ridge regression on `encode`;
    - `eval/probe_knn_r2`: five nearest neighbours there;
    - `eval/probe_attentive_r2`: one attention over the patches, of models with a `feature_map`.

    Args:
        every_env_steps: how often, in frames.
        target: key of `info`: numbers, of any shape.
        env: where clips are played, with images of the data's size; by default the data's own.
        clips: how many are played; half of them fit the probes (of the attentive one, three
            quarters).
        clip_length: steps of a clip; by default that of the data, or 4 where that has none.
        seed: of the clips.
        at_start: probe the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        target: str = "position",
        env: str | None = None,
        clips: int = 400,
        clip_length: int | None = None,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        if clips < 8:
            raise UserError(f"Probes: clips is {clips}, must be at least 8: half fit, half test")
        if clip_length is not None and clip_length < 1:
            raise UserError(f"Probes: clip_length is {clip_length}, must be at least 1")
        self.target, self.env = target, env
        self.clips, self.clip_length = clips, clip_length
        self._truth: Truth | None = None

    def lacks(self, data: Any) -> str:
        """Only an environment, if none is named here."""
        return "" if self.env is not None else super().lacks(data)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models without features."""
        if not isinstance(pl_module, Encoder):
            raise UserError(
                f"Probes needs a model that is an Encoder, which {type(pl_module).__name__} is "
                "not: remove Probes from the callbacks"
            )

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """The metrics of the class's description, and `time/probes_s`."""
        started = time.perf_counter()
        data = trainer.datamodule
        if self._truth is None:  # always the same clips
            length = self.clip_length or int(getattr(data, "clip_length", 4))
            if self.env is None:
                make = data.make_env
            else:
                make = partial(make_env, self.env, size=getattr(data, "size", None))
            self._truth = record_truth(make, self.target, self.clips, length, self.seed)
        metrics = probe(model, self._truth)
        named = {f"eval/probe_{name}": value for name, value in metrics.items()}
        return {**named, "time/probes_s": time.perf_counter() - started}


def probe(model: Any, truth: Truth) -> dict[str, float]:
    """R^2 of each probe on a model's features: `r2`, `knn_r2` and maybe `attentive_r2`."""
    truth = Truth({key: truth.obs[key] for key in model.spec.obs}, truth.value)
    x = features(model.encode, truth, model.device)
    found = {"r2": linear_r2(x, truth.value), "knn_r2": nearest_r2(x, truth.value)}
    if hasattr(model, "feature_map"):
        tokens = features(model.feature_map, truth, model.device)
        repeats = -(-truth.value.shape[1] // tokens.shape[1])  # a patch may span some steps
        tokens = tokens.repeat_interleave(repeats, 1)[:, : truth.value.shape[1]]
        found["attentive_r2"] = attentive_r2(tokens, truth.value)
    return found
