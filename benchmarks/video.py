"""Cells of a suite of dreams: a world model is trained, and its dreams are laid beside the truth.

The suite names what is dreamed:

    score: ball_found
    seconds: 1800
    video: {env: {fall: 1}, clips: 200, clip_length: 31, context: 4, horizon: 15}

Each cell is measured on episodes of its own seed, played in its task with random actions. A model
sees an episode from its first frame up to a start (at least `context` frames), and dreams on with
the actions that were taken; a model of latent actions with those that it infers from the true
frames, which it therefore is told of. All dreams have one sample. Images that a model wants larger
are enlarged by repeating pixels, and its dreams are averaged back, which loses nothing.

k steps ahead (0: what the model shows of the last frame that it saw):

- `psnr@k`, mean over clips of dB, of which a perfect frame has 100; `ssim@k`;
- `ball_error@k`: distance in pixels between the ball's true middle and the dreamed one, see
  `find_ball`; a frame without a ball has the side of the image;
- `ball_found`, the score: share of all dreamed frames whose ball is within a pixel of the truth;
  `ball_lost`: share without a ball;
- `dream_fps`: frames dreamed in a second, one clip alone, on this machine;
- `params`: of what dreams (`WORLD`), without policies and critics.

A model that decodes nothing gets a `PixelDecoder`, fitted on frames of the same recording with the
model frozen. Its time and its parameters do not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.baselines import COPY_LAST
from benchmarks.cell import EVAL_SEED_OFFSET, Cell, ZooRunner, read_json, write_json
from callbacks.controls import psnr, ssim
from callbacks.episodes import following
from callbacks.files import atomic_file
from callbacks.probing import record_truth
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from zoo.base import Imagined, LatentActions, State
from zoo.runs import CONFIG, load, read_config

DEFAULTS: dict[str, Any] = {"clips": 200, "clip_length": 31, "context": 4, "horizon": 15, "env": {}}
# Attributes of models that hold all that a dreamed frame comes from; of others all counts.
WORLD = {
    "diamond": ("denoiser",),
    "dreamer-v3": ("encoder", "rssm", "decoder"),
    "genie": ("tokenizer", "latent_actions", "dynamics"),
    "jepa-wm": ("encoder", "norm", "predictor"),
    "world-models": ("vision", "memory"),
}
NEAR = 1.0  # pixels, within which a ball is found
_TOGETHER = 50  # clips that are dreamed on at once
_TIMED = 3
_DRAWN = 4  # clips of the picture, each pixel `_ZOOM` wide
_ZOOM = 2
_DECODER_UPDATES, _DECODER_BATCH, _DECODER_EPISODES = 2000, 64, 500


class Clips(NamedTuple):
    """N episodes of T steps, where their ball is, and where dreams start.

    Attributes:
        batch: by the batch contract, (N, T, ...).
        place: (N, T, 2) float32 middle (x, y) of the ball in pixels.
        start: (N,) int64, the last step that the model sees.
    """

    batch: dict[str, Any]
    place: Tensor
    start: Tensor


class VideoRunner:
    """Trains for the cell's seconds and measures dreams; see `benchmarks.cell.Runner`."""

    def train(self, cell: Cell, run: Path) -> None:
        """As any cell of the zoo; to copy nothing is learnt."""
        if cell.model != COPY_LAST:
            ZooRunner().train(cell, run)
            return
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "done.json", {"env_steps": 0, "updates": 0, "wall_s": None})

    def evaluate(self, cell: Cell, run: Path) -> Mapping[str, Any]:
        """What the module's description lists, and a picture among the run's videos."""
        options = {**DEFAULTS, **cell.video}
        seed = EVAL_SEED_OFFSET + cell.seed
        clips = record_clips(cell.task, options, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = CopyLastFrame() if cell.model == COPY_LAST else load(run)
            params = parameters(model, WORLD.get(cell.model))
            if not hasattr(model, "decode"):
                model = Decoded(model, fit_decoder(model, recorded_frames(run)))
            frames = dream(model, clips, options["horizon"])
            found = measure(frames, clips)
            found["dream_fps"] = speed(model, clips, options["horizon"])
        updates = read_json(run / "done.json")["updates"]
        draw_strips(frames, clips, run / "videos" / f"truth-above-dream-{updates}.gif")
        return {**found, "params": params, "episodes": options["clips"]}


def record_clips(task: str, options: Mapping[str, Any], seed: int) -> Clips:
    """Episodes of random actions in an environment whose `info` has the `ball`'s upper left corner.

    Starts are spread evenly over the steps that have enough frames before and after them.

    Args:
        task: the environment.
        options: `clips`, `clip_length` (that of whole episodes, so that clips begin with them),
            `context`, `horizon`, and `env`, arguments of the environment.
        seed: of environments and actions.

    Raises:
        UserError: clips too short for context and horizon.
    """
    length, context, horizon = (options[key] for key in ("clip_length", "context", "horizon"))
    places = length - context - horizon + 1
    if context < 1 or places < 1:
        raise UserError(
            f"clips of {length} frames are too short for a context of {context} and a horizon of "
            f"{horizon}: clip_length must be at least {max(context, 1) + horizon}"
        )
    make = partial(make_env, task, **options["env"])
    truth = record_truth(make, "ball", options["clips"], length, seed, hold=1)
    assert truth.action is not None
    env = make()
    side = float(getattr(env.unwrapped, "side", 1))
    env.close()
    first = torch.zeros(truth.value.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    none = torch.zeros_like(first)
    batch = {
        "obs": truth.obs,
        "action": torch.cat([truth.action, torch.zeros_like(truth.action[:, :1])], 1),
        "reward": none.float(),
        "is_first": first,
        "is_last": none,
        "is_terminal": none,
    }
    start = context - 1 + torch.arange(options["clips"]) % places
    return Clips(batch, truth.value + (side - 1) / 2, start)


@torch.no_grad()
def dream(model: Any, clips: Clips, horizon: int) -> Tensor:
    """Frames (N, 1 + horizon, H, W, C) in [0, 1]: of the start, then dreamed, in the clips' size.

    Args:
        model: an `Imaginer` of one image.
        clips: what it dreams on from.
        horizon: steps.
    """
    rows = torch.arange(len(clips.start)).split(_TOGETHER)
    return torch.cat([_dream(model, _select(clips, part), horizon) for part in rows])


def measure(frames: Tensor, clips: Clips) -> dict[str, float]:
    """The metrics of dreams (N, 1 + horizon, H, W, C) that need nothing else."""
    row, ahead = torch.arange(len(frames)), frames.shape[1]
    (images,) = clips.batch["obs"].values()
    truth = following(images, row, clips.start - 1, ahead).float() / 255
    place = following(clips.place, row, clips.start - 1, ahead)
    middle, seen = find_ball(frames)
    error = torch.where(seen, (middle - place).norm(dim=-1), float(frames.shape[2]))
    decibel = psnr(frames, truth)
    found = {
        "ball_found": float((error[:, 1:] <= NEAR).float().mean()),
        "ball_lost": float((~seen[:, 1:]).float().mean()),
    }
    for k in range(ahead):
        found[f"ball_error@{k}"] = float(error[:, k].mean())
    for k in range(ahead):
        found[f"psnr@{k}"] = float(decibel[:, k].mean())
    for k in range(ahead):
        found[f"ssim@{k}"] = float(ssim(frames[:, k], truth[:, k]))
    return found


def find_ball(frames: Tensor) -> tuple[Tensor, Tensor]:
    """The middles (..., 2), x and y in pixels, of a white ball in frames (..., H, W, 3) in [0, 1].

    The mean position of the pixels of which all colours are brighter than one half, as those of the
    paddle never are. The second tensor (...) says whether there are any; without them the middle is
    0. Two balls have one middle between them.
    """
    white = (frames.amin(-1) > 0.5).float()
    count = white.sum((-2, -1))
    x = (white.sum(-2) * torch.arange(white.shape[-1])).sum(-1)
    y = (white.sum(-1) * torch.arange(white.shape[-2])).sum(-1)
    return torch.stack([x, y], -1) / count.clamp(min=1)[..., None], count > 0


def speed(model: Any, clips: Clips, horizon: int) -> float:
    """Frames dreamed and decoded in a second of one clip; the median of three times."""
    start = _start(model, _select(clips, torch.arange(1)), horizon)
    seconds = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        _imagine(model, *start, horizon)
        seconds.append(time.perf_counter() - began)
    return horizon / float(np.median(seconds))


def parameters(model: Any, parts: tuple[str, ...] | None) -> int:
    """Parameters that are trained, of some parts of a model or of all."""
    if isinstance(model, CopyLastFrame):
        return 0
    modules = [model] if parts is None else [getattr(model, part) for part in parts]
    return sum(p.numel() for part in modules for p in part.parameters() if p.requires_grad)


def draw_strips(frames: Tensor, clips: Clips, path: Path) -> None:
    """Writes a still GIF: for some clips the truth, below it the dream, time to the right."""
    count = min(_DRAWN, len(frames))
    (images,) = clips.batch["obs"].values()
    truth = following(images, torch.arange(len(frames)), clips.start - 1, frames.shape[1])
    both = torch.stack([truth[:count], (frames[:count] * 255).round().byte()], 1)  # N 2 T H W C
    both = F.pad(both.movedim(-1, -3), (0, 1, 0, 1), value=96).movedim(-3, -1)
    n, two, t, h, w, c = both.shape
    picture = both.permute(0, 1, 3, 2, 4, 5).reshape(n * two * h, t * w, c).numpy()
    with atomic_file(path) as file:
        Image.fromarray(picture.repeat(_ZOOM, 0).repeat(_ZOOM, 1)).save(file, "GIF")


class CopyLastFrame:
    """An `Imaginer` that dreams that nothing changes."""

    def observe(self, batch: Mapping[str, Any]) -> State:
        """The frames themselves."""
        return dict(batch["obs"])

    def imagine(self, state: State, actions: Tensor, horizon: int) -> Imagined:
        """The last frame, again and again."""
        still = {k: v[:, None].expand(-1, horizon, *v.shape[1:]) for k, v in state.items()}
        reward = torch.zeros(actions.shape[:2])
        return Imagined(reward, reward + 1, still, actions)

    def decode(self, state: State) -> dict[str, Tensor]:
        """Frames in [0, 1]."""
        return {key: value.float() / 255 for key, value in state.items()}


class PixelDecoder(nn.Sequential):
    """Logits of images (B, C, S, S) from latents (B, D): a linear map and transposed convolutions.

    Args:
        latent: D.
        side: S, 4 times a power of 2.
        colours: C.
        width: channels of the first map, halved with each doubling of the side.
    """

    def __init__(self, latent: int, side: int, colours: int = 3, width: int = 64) -> None:
        doublings = (side // 4).bit_length() - 1
        if side != 4 << doublings or not doublings:
            raise UserError(
                f"images of side {side} cannot be decoded: 4 times a power of 2 from 8 on can"
            )
        layers: list[nn.Module] = [nn.Linear(latent, width * 16), nn.Unflatten(1, (width, 4, 4))]
        for doubling in range(doublings):
            out = colours if doubling == doublings - 1 else width // 2
            layers += [nn.SiLU(), nn.ConvTranspose2d(width, out, 4, 2, 1)]
            width = out
        super().__init__(*layers)


class Decoded:
    """An `Imaginer` out of a model of latents and a decoder of the newest one."""

    def __init__(self, model: Any, decoder: PixelDecoder) -> None:
        self.spec, self.observe, self.imagine = model.spec, model.observe, model.imagine
        self.decoder = decoder

    @torch.no_grad()
    def decode(self, state: State) -> dict[str, Tensor]:
        """Images of the latents (N, H, history, D) of states."""
        latents = state["latents"][:, :, -1]
        images = self.decoder(latents.flatten(0, 1)).sigmoid().movedim(1, -1)
        return {self.spec.images[0]: images.unflatten(0, latents.shape[:2])}


def recorded_frames(run: Path) -> Tensor:
    """Frames uint8 (N, H, W, C) of the recording that a run was trained on, at the model's size."""
    from datamodules.offline_datamodule import OfflineDataModule

    given = read_config(run / CONFIG)["data"]["init_args"]
    data = OfflineDataModule(given["source"], size=given.get("size"))
    episodes = data.some_episodes(_DECODER_EPISODES, DEFAULTS["clip_length"])
    (images,) = (episodes.batch["obs"][key] for key in data.spec.images)
    there = torch.arange(images.shape[1]) < episodes.length[:, None]
    return images[there]


def fit_decoder(model: Any, frames: Tensor, updates: int = _DECODER_UPDATES) -> PixelDecoder:
    """A decoder of the model's frozen features, by the cross-entropy of pixels in [0, 1].

    Args:
        model: an `Encoder` of one image.
        frames: uint8 (N, H, W, C).
        updates: of Adam, the rate rises to 2e-3 and falls again.
    """
    (key,) = model.spec.images
    parts = frames.split(256)
    with torch.no_grad():
        features = torch.cat([model.encode({key: part[:, None]})[:, 0].float() for part in parts])
    decoder = PixelDecoder(features.shape[1], frames.shape[1], frames.shape[3])
    optimizer = torch.optim.Adam(decoder.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, updates)
    for _ in range(updates):
        rows = torch.randint(len(frames), (_DECODER_BATCH,))
        target = frames[rows].movedim(-1, 1).float() / 255
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(decoder(features[rows]), target).backward()
        optimizer.step()
        rate.step()
    return decoder.eval()


def _select(clips: Clips, rows: Tensor) -> Clips:
    batch = {key: value[rows] for key, value in clips.batch.items() if key != "obs"}
    batch["obs"] = {key: value[rows] for key, value in clips.batch["obs"].items()}
    return Clips(batch, clips.place[rows], clips.start[rows])


def _dream(model: Any, clips: Clips, horizon: int) -> Tensor:
    state, actions = _start(model, clips, horizon)
    seen = {key: value[:, None] for key, value in state.items()}
    frames = torch.cat([_decode(model, seen), _imagine(model, state, actions, horizon)], 1)
    (images,) = clips.batch["obs"].values()
    pixels = frames.flatten(0, 1).movedim(-1, 1)
    small = F.adaptive_avg_pool2d(pixels, images.shape[2:4]).movedim(1, -1)
    return small.unflatten(0, frames.shape[:2]).clamp(0, 1)


@torch.no_grad()
def _start(model: Any, clips: Clips, horizon: int) -> tuple[State, Tensor]:
    """States {key: (N, ...)} where dreams start, and the actions (N, horizon, ...) from there."""
    batch = _as_seen(model, clips.batch)
    row = torch.arange(len(clips.start))
    actions = batch["action"]
    if isinstance(model, LatentActions):
        (video,) = batch["obs"].values()
        actions = model.infer_actions(video)
    states = {key: value[row, clips.start] for key, value in model.observe(batch).items()}
    return states, following(actions, row, clips.start - 1, horizon)


def _as_seen(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with images as large as the model wants them."""
    spec = getattr(model, "spec", None)
    if spec is None:
        return batch
    ((key, images),) = batch["obs"].items()
    side, wanted = images.shape[2], spec.obs[key].shape[0]
    if wanted % side:
        raise UserError(
            f"the model sees images of side {wanted}, no multiple of the clips' {side}: train it "
            f"with --data.size {side} or a multiple"
        )
    large = images.repeat_interleave(wanted // side, 2).repeat_interleave(wanted // side, 3)
    return {**batch, "obs": {key: large}}


@torch.no_grad()
def _imagine(model: Any, state: State, actions: Tensor, horizon: int) -> Tensor:
    return _decode(model, model.imagine(state, actions, horizon).state)


@torch.no_grad()
def _decode(model: Any, state: State) -> Tensor:
    (images,) = model.decode(state).values()
    return images.float()
