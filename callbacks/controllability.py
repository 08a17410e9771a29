"""`Controllability`: are latent actions what was done, and does the dream obey them?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.controls import code_use, delta_t_psnr, mutual_information, psnr, purity, ssim
from callbacks.probing import record_truth
from callbacks.schedule import EveryEnvSteps
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from zoo.base import Imaginer, LatentActions

EFFECTIVE = "effective_action"  # in `info`: what the last action did
_TOGETHER = 32  # clips at once


class Steps(NamedTuple):
    """Clips and what was done in them.

    Attributes:
        video: uint8 (N, T, H, W, C).
        action: (N, T - 1) int64 between the frames, or None.
        effective: (N, T - 1) int64 what these did, or None.
    """

    video: Tensor
    action: Tensor | None
    effective: Tensor | None


class Controllability(EveryEnvSteps):
    """Measures a model that finds actions in video, on clips that it does not learn from.

    Clips are played once with random actions in an environment, or else held out by the data.

    - `eval/tokenizer_psnr` (dB), `eval/tokenizer_ssim`: of frames after encoding and decoding;
    - `eval/codes_used`, `eval/code_perplexity`: of models with `num_codes`, by their "tokens";
    - `eval/delta_t_psnr` (dB): see `delta_t_psnr`, with t = `horizon`;
    - `eval/latent_action_perplexity`: how many latent actions are in use;
    - `eval/latent_action_purity`, `eval/mutual_information` (bits): with the discrete actions that
      were taken, if these are known;
    - `eval/effective_action_purity`: with what they did, where `info` of the environment has
      `effective_action`: a move into a wall does nothing.

    Args:
        every_env_steps: how often, in frames.
        env: where clips are played, with images of the data's size; by default the data's own.
        clips: how many.
        context: frames that dreams begin from.
        horizon: frames that are dreamed, t.
        seed: of the clips and the random actions.
        at_start: measure the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
        env_kwargs: other arguments of `env`.
    """

    def __init__(
        self,
        every_env_steps: int = 5000,
        env: str | None = None,
        clips: int = 128,
        context: int = 3,
        horizon: int = 4,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        for name, value in (("clips", clips), ("context", context), ("horizon", horizon)):
            if value < 1:
                raise UserError(f"Controllability: {name} is {value}, must be at least 1")
        if env_kwargs and env is None:
            raise UserError(f"Controllability: env_kwargs={dict(env_kwargs)} needs an env")
        self.env, self.env_kwargs, self.clips = env, env_kwargs, clips
        self.context, self.horizon = context, horizon
        self._steps: Steps | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models that find no actions, or do not dream."""
        for protocol in (LatentActions, Imaginer):
            if not isinstance(pl_module, protocol):
                raise UserError(
                    f"Controllability needs a model of {protocol.__name__}, which "
                    f"{type(pl_module).__name__} is not: remove it from the callbacks"
                )

    def lacks(self, data: Any) -> str:
        """An environment, if none is named here and nothing is held out."""
        return lacks_clips(data, self.env)

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """The metrics of the class's description, and `time/controllability_s`."""
        started = time.perf_counter()
        if self._steps is None:  # always the same clips
            self._steps = self._gather(trainer.datamodule, model)
        metrics = measure(model, self._steps, self.horizon)
        named = {f"eval/{name}": value for name, value in metrics.items()}
        return {**named, "time/controllability_s": time.perf_counter() - started}

    def _gather(self, data: Any, model: Any) -> Steps:
        length = self.context + self.horizon
        return gather_steps(data, model, self.env, self.clips, length, self.seed, self.env_kwargs)


def lacks_clips(data: Any, env: str | None) -> str:
    """What the datamodule lacks to give `gather_steps` clips, or nothing."""
    if env is not None or hasattr(data, "make_env"):
        return ""
    held_out = len(getattr(data, "val_episodes", []))
    return "" if held_out else "held-out episodes (`validation`) or an environment (`env`)"


def env_maker(
    data: Any, env: str | None, env_kwargs: Mapping[str, Any] | None = None
) -> Callable[[], gym.Env] | None:
    """Builds the environment of this name, with images of the data's size, or the data's own."""
    if env is not None:
        return partial(make_env, env, size=getattr(data, "size", None), **(env_kwargs or {}))
    made: Callable[[], gym.Env] | None = getattr(data, "make_env", None)
    return made


def gather_steps(
    data: Any,
    model: Any,
    env: str | None,
    clips: int,
    length: int,
    seed: int,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Steps:
    """Clips of `length` frames: played with random actions in an environment, or else held out.

    Args:
        data: the datamodule, see `lacks_clips`.
        model: whose one image the clips show.
        env: by default the data's own.
        clips: how many; fewer, if not so many are held out.
        length: T.
        seed: of the environment and the actions.
        env_kwargs: other arguments of `env`.

    Raises:
        UserError: none of the held-out episodes is so long.
    """
    (key,), make = model.spec.images, env_maker(data, env, env_kwargs)
    if make is not None:
        with closing(make()) as made:
            _, info = made.reset(seed=0)
        known = EFFECTIVE if EFFECTIVE in info else None
        truth = record_truth(make, known, clips, length, seed, hold=1)
        effective = truth.value[:, 1:, 0].long() if known else None
        return Steps(truth.obs[key], _discrete(truth.action), effective)
    batch, steps, _ = data.validation_episodes(clips, length - 1)
    whole = steps == length
    if not whole.any():
        raise UserError(
            f"none of the held-out episodes has {length} frames, which are context and horizon: "
            "choose shorter ones"
        )
    action = batch["action"][whole, :-1] if "action" in batch else None
    return Steps(batch["obs"][key][whole], _discrete(action), None)


def measure(model: Any, steps: Steps, horizon: int) -> dict[str, float]:
    """The metrics of `Controllability`, by their names there; random actions are torch's.

    Continuous latent actions have no codes, and their random ones are those of another clip.
    """
    (key,) = model.spec.images
    actions, pictures, tokens, deltas = [], [], [], []
    discrete = model.num_latent_actions > 1
    for part in steps.video.split(_TOGETHER):
        video = part.to(model.device)
        found = model.infer_actions(video)
        states = model.observe({"obs": {key: video}})
        made, truth = model.decode(states)[key].float(), video.float() / 255
        pictures.append(torch.stack([psnr(made, truth).mean(), ssim(made, truth)]) * len(part))
        actions.append(found.cpu())
        if "tokens" in states:
            tokens.append(states["tokens"][:, :, -1].cpu())
        if discrete:
            taken = found[:, -horizon:]
            other = torch.randint_like(taken, model.num_latent_actions)
        else:  # there is no uniform choice of vectors: random ones are those of other clips
            taken = states["actions"][:, -horizon:, -1]
            other = taken.roll(1, 0)
        start = {name: value[:, -1 - horizon] for name, value in states.items()}
        deltas.append(delta_t_psnr(model, start, truth[:, -1], taken, other).cpu())
    latent = torch.cat(actions)
    shown = torch.stack(pictures).sum(0) / len(latent)
    metrics = {"tokenizer_psnr": float(shown[0]), "tokenizer_ssim": float(shown[1])}
    if tokens and hasattr(model, "num_codes"):
        used, perplexity = code_use(torch.cat(tokens), model.num_codes)
        metrics |= {"codes_used": used, "code_perplexity": perplexity}
    metrics["delta_t_psnr"] = float(torch.cat(deltas).mean())
    if not discrete:
        return metrics
    metrics["latent_action_perplexity"] = code_use(latent, model.num_latent_actions)[1]
    if steps.action is not None:
        metrics["latent_action_purity"] = purity(latent, steps.action)
        metrics["mutual_information"] = mutual_information(latent, steps.action)
    if steps.effective is not None:
        metrics["effective_action_purity"] = purity(latent, steps.effective)
    return metrics


def _discrete(action: Tensor | None) -> Tensor | None:
    """Actions (N, T) if they are numbers of choices."""
    if action is None or action.dim() != 2 or action.is_floating_point():
        return None
    return action.long()
