"""`FrechetVideoDistance`: are dreams as a whole like real video, to a network that the user brings?

The network is a download whose terms are for the user to judge, so none comes with the zoo.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from callbacks.controllability import env_maker, gather_steps, lacks_clips
from callbacks.episodes import as_float, gather, record
from callbacks.schedule import EveryEnvSteps
from datamodules.errors import UserError
from zoo.base import Imaginer, LatentActions, Policy

_DREAMED = 32  # clips at once
_SEEN = 8  # by the extractor, whose frames are large


class FrechetVideoDistance(EveryEnvSteps):
    """Measures `eval/fvd`: the Frechet distance of dreams from video (Unterthiner et al., 2018).

    ||m - m'||^2 + tr(S + S' - 2 (S S')^(1/2)) of the means and covariances of the features of real
    clips and of dreams. A model of `LatentActions` dreams by the actions that it infers, on clips
    that are played with random actions, or else held out; other Imaginers by the recorded actions
    of episodes that they play, or that are held out. Only the frames that are dreamed are compared,
    with the real ones in their places. The distance falls with the number of clips: compare equal
    ones only, more of them than features.

    The extractor is a TorchScript file that maps float32 videos (N, 3, T, side, side) in [-1, 1] to
    features (N, F). That of many published figures is `i3d_torchscript.pt` of StyleGAN-V (I3D,
    Kinetics-400): it needs `arguments: {return_features: true}`, sides of 224 and at least 9
    frames, and has 400 features.

    Args:
        weights: the file.
        arguments: further ones of its `forward`, by name.
        side: of the square to which frames are resized, in pixels; images of one channel become
            grey ones of three.
        every_env_steps: how often, in frames.
        env: where clips are played, with images of the data's size; by default the data's own.
        clips: how many, at least 2.
        context: frames that dreams begin from.
        horizon: frames that are dreamed, T.
        seed: of the clips and the dreams.
        at_start: measure the untrained model, too.
        every_updates: how often, in updates; then env steps do not matter.
    """

    def __init__(
        self,
        weights: str,
        arguments: dict[str, Any] | None = None,
        side: int = 224,
        every_env_steps: int = 5000,
        env: str | None = None,
        clips: int = 256,
        context: int = 3,
        horizon: int = 16,
        seed: int = 0,
        at_start: bool = False,
        every_updates: int | None = None,
    ) -> None:
        super().__init__(every_env_steps, seed, at_start, every_updates)
        least = {"side": 1, "clips": 2, "context": 1, "horizon": 1}
        for name, value in zip(least, (side, clips, context, horizon), strict=True):
            if value < least[name]:
                raise UserError(
                    f"FrechetVideoDistance: {name} is {value}, must be at least {least[name]}"
                )
        self.weights, self.arguments, self.side = weights, arguments or {}, side
        self.env, self.clips = env, clips
        self.context, self.horizon = context, horizon
        self._extractor: nn.Module | None = None
        self._video: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses models without dreams of one image, and files that are no extractor of it."""
        model: Any = pl_module
        name = type(model).__name__
        needed = (Imaginer,) if isinstance(model, LatentActions) else (Imaginer, Policy)
        for protocol in needed:
            if not isinstance(model, protocol):
                raise UserError(
                    f"FrechetVideoDistance needs a model of {protocol.__name__}, which {name} is "
                    "not: remove it from the callbacks"
                )
        if len(model.spec.images) != 1 or getattr(model, "num_latent_actions", 2) < 2:
            raise UserError(
                f"FrechetVideoDistance needs dreams of one image, by actions that can be inferred, "
                f"which those of this {name} are not: remove it from the callbacks"
            )
        self._extractor = load_extractor(self.weights)
        (key,) = model.spec.images
        blank = torch.zeros(1, self.horizon, *model.spec.obs[key].shape)
        self._features(blank)

    def lacks(self, data: Any) -> str:
        """An environment, if none is named here and nothing is held out."""
        return lacks_clips(data, self.env)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses too few held-out clips now, for the first measurement may be hours away."""
        data: Any = getattr(trainer, "datamodule", None)
        held_out = len(getattr(data, "val_episodes", []))
        if held_out and env_maker(data, self.env) is None:
            self._require(held_out)
        super().on_train_start(trainer, pl_module)

    def measure(self, trainer: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, float]:
        """`eval/fvd` and `time/fvd_s`."""
        started = time.perf_counter()
        (key,), batch = model.spec.images, self._gather(trainer.datamodule, model, seed)
        found = len(batch["obs"][key])
        self._require(found)
        real, made = [], []
        for rows in torch.arange(found).split(_DREAMED):
            part = _rows(batch, rows, model.device)
            real.append(self._features(as_float(part["obs"][key][:, self.context :])))
            made.append(self._features(dream(model, part, self.context).float()))
        distance = frechet_distance(torch.cat(real), torch.cat(made))
        return {"eval/fvd": distance, "time/fvd_s": time.perf_counter() - started}

    def _require(self, found: int) -> None:
        if found < self.clips:
            raise UserError(
                f"FrechetVideoDistance: there are {found} clips of {self.context + self.horizon} "
                f"frames (context and horizon), and clips is {self.clips}: ask for fewer, or "
                "shorter ones, hold out more (`validation`), or name an environment (`env`)"
            )

    def _gather(self, data: Any, model: Any, seed: np.random.SeedSequence) -> dict[str, Any]:
        """Clips (N, context + horizon, ...) as a batch."""
        (key,), length = model.spec.images, self.context + self.horizon
        if isinstance(model, LatentActions):
            if self._video is None:  # always the same clips
                steps = gather_steps(data, model, self.env, self.clips, length, self.seed)
                self._video = steps.video
            return {"obs": {key: self._video}}
        make = env_maker(data, self.env)
        options: Any = {"episodes": self.clips, "max_steps": length - 1, "seed": seed}
        if make is None:
            recording = gather(data, model, **options, explore=True)
        else:
            recording = record(model, make, **options, explore=True)
        whole = torch.nonzero(recording.length == length).flatten()
        return _rows(recording.batch, whole, model.device)

    def _features(self, video: Tensor) -> Tensor:
        """Features (N, F) on the CPU of video (N, T, H, W, C) in [0, 1]."""
        assert self._extractor is not None
        extractor = self._extractor.to(video.device)
        parts = [
            extract(extractor, part, self.side, self.arguments, self.weights)
            for part in video.split(_SEEN)
        ]
        return torch.cat(parts)


def load_extractor(path: str) -> nn.Module:
    """A TorchScript module, in eval mode, on the CPU.

    Raises:
        UserError: no such file, or one that is cut off or something else.
    """
    if not Path(path).is_file():
        raise UserError(
            f"FrechetVideoDistance: there is no file '{path}': weights names a feature extractor "
            "in TorchScript, such as a copy of i3d_torchscript.pt"
        )
    try:
        module: nn.Module = torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError, EOFError) as error:
        raise UserError(
            f"FrechetVideoDistance: '{path}' is no TorchScript file, or is cut off: name one that "
            "torch.jit.save wrote, or download it again"
        ) from error
    return module


@torch.no_grad()
def extract(
    extractor: nn.Module, video: Tensor, side: int, arguments: Mapping[str, Any], name: str
) -> Tensor:
    """Features (N, F) float64 on the CPU of video (N, T, H, W, C) in [0, 1].

    Args:
        extractor: see `FrechetVideoDistance`.
        video: of any size.
        side: to which its frames are resized, bilinearly.
        arguments: further ones of the extractor.
        name: of its file.

    Raises:
        UserError: it does not take such videos, gives no features (N, F), or such that are not
            finite.
    """
    x = video.movedim(-1, 1)
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1, -1)
    # Along time, where the size stays, trilinear is no change.
    x = F.interpolate(x, (x.shape[2], side, side), mode="trilinear", align_corners=False)
    shape = tuple(x.shape)
    try:
        found = extractor(2 * x - 1, **arguments)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(
            f"FrechetVideoDistance: '{name}' does not take videos of shape {shape} with the "
            f"arguments {dict(arguments)} ({last}): change side, horizon or arguments"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(x):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"FrechetVideoDistance: '{name}' makes {got} of videos of shape {shape}, must be "
            f"features ({len(x)}, F): change side or arguments, or name another file"
        )
    if not found.isfinite().all():
        raise UserError(
            f"FrechetVideoDistance: '{name}' makes features of videos of shape {shape} that are "
            "NaN or infinite: name another file"
        )
    return found.double().cpu()


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """Between the normal distributions that fit features (N, F) and (M, F), each of two at least.

    Example:
        >>> real = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> round(frechet_distance(real, real + torch.tensor([3.0, 4.0])), 6)
        25.0
    """
    metric = FrechetInceptionDistance(feature=_Features(real.shape[1]))
    centre = real.double().mean(0)  # it sums squares: far from the origin they would drown the rest
    metric.update(real.double() - centre, real=True)
    metric.update(made.double() - centre, real=False)
    return max(0.0, float(metric.compute()))


def dream(model: Any, batch: Mapping[str, Any], context: int) -> Tensor:
    """The frames (N, T - context, H, W, C) in [0, 1] that a model dreams in place of the real ones.

    Args:
        model: an `Imaginer`; by its own inferred actions, if it is one of `LatentActions`.
        batch: (N, T, ...).
        context: frames that it sees.
    """
    (key,) = model.spec.images
    if isinstance(model, LatentActions):
        actions = model.infer_actions(batch["obs"][key])[:, context - 1 :]
    else:
        actions = batch["action"][:, context - 1 : -1]
    states = model.observe(batch)
    start = {name: value[:, context - 1] for name, value in states.items()}
    frames: Tensor = model.decode(model.imagine(start, actions, actions.shape[1]).state)[key]
    return frames


class _Features(nn.Module):
    """Stands where torchmetrics expects a network of images: the features are here already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        """As they are."""
        return features


def _rows(batch: Mapping[str, Any], rows: Tensor, device: torch.device) -> dict[str, Any]:
    """These sequences of a batch, on the device."""
    found: dict[str, Any] = {
        key: value[rows.to(value.device)].to(device) for key, value in batch.items() if key != "obs"
    }
    obs = batch["obs"].items()
    found["obs"] = {key: value[rows.to(value.device)].to(device) for key, value in obs}
    return found
