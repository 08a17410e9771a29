"""Genie (Bruce et al., "Genie: Generative Interactive Environments", ICML 2024).

One training goes through the stages of the paper, counted in updates:

1. tokenizer: `tokenizer_updates` updates of the VQ-VAE;
2. world: `world_updates` updates of the latent action model and, on the tokens and on its actions,
   of the dynamics, together (after `action_updates` of the former alone);
3. policy: `policy_updates` updates of a policy that says the latent actions of expert video; while
   it learns, the first `labelled_steps` real actions of the data tell what latent ones stand for.

A stage of length 0 is left out, so that each can be trained apart, from the weights of the others.
This file is the method from top to bottom; its deviations from the paper are listed in README.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.arguments import reject_outside, reject_unknown, reject_unless_positive
from zoo.base import Batch, Imagined, Obs, State, ZooModel
from zoo.genie.cloning import MOST_ACTIONS, MOST_FRAMES, ActionMap, Clone, spans
from zoo.genie.dynamics import MASK_RATES, Dynamics, disturb, hide
from zoo.genie.latent_actions import LatentActionModel, conv_action_model, st_action_model
from zoo.genie.patches import Patches
from zoo.genie.quantizers import Continuous, FiniteScalarQuantizer, Quantizer, VectorQuantizer
from zoo.genie.tokenizer import Tokenizer
from zoo.nets.optim import decay_groups
from zoo.nets.ranks import zero_of
from zoo.nets.st_transformer import Shape

Sizes = tuple[int, int, int, int, int]

# Layers, width, heads, width of a head and of the MLP of each part: `coinrun` is appendix F,
# `platformers` tables 5 and 7 and the largest dynamics; `nano` is ours, for CPUs. The paper does
# not say how wide the MLPs are: its totals for Platformers leave room for half the width, elsewhere
# they have the usual four times the width. 36 heads do not divide 5120: theirs are of 128.
SIZES: dict[str, dict[str, Shape]] = {
    "nano": {
        "tokenizer_encoder": Shape(1, 64, 2, 32, 256),
        "tokenizer_decoder": Shape(2, 96, 3, 32, 384),
        "action_encoder": Shape(2, 96, 3, 32, 384),
        "action_decoder": Shape(2, 96, 3, 32, 384),
        "dynamics": Shape(3, 96, 3, 32, 384),
        "policy": Shape(2, 64, 2, 32, 256),
    },
    "coinrun": {
        "tokenizer_encoder": Shape(8, 512, 8, 64, 2048),
        "tokenizer_decoder": Shape(8, 512, 8, 64, 2048),
        "action_encoder": Shape(8, 512, 8, 64, 2048),
        "action_decoder": Shape(8, 512, 8, 64, 2048),
        "dynamics": Shape(12, 512, 8, 64, 2048),
        "policy": Shape(12, 512, 8, 64, 2048),
    },
    "platformers": {
        "tokenizer_encoder": Shape(12, 512, 8, 64, 256),
        "tokenizer_decoder": Shape(20, 1024, 16, 64, 512),
        "action_encoder": Shape(20, 1024, 16, 64, 512),
        "action_decoder": Shape(20, 1024, 16, 64, 512),
        "dynamics": Shape(48, 5120, 36, 128, 2560),
        "policy": Shape(12, 512, 8, 64, 256),
    },
}
STAGES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("tokenizer",),
    "world": ("latent_actions", "dynamics"),
    "policy": ("clone",),
}
DECODED = 4096  # frames that are decoded at once, at most
Losses = dict[str, Tensor]
Metrics = dict[str, Tensor | float]


class Clock(NamedTuple):
    """Where a training is: the stage, the update in it, and the stage's length."""

    stage: str
    update: int
    length: int


class Rate(NamedTuple):
    """A learning rate: rises linearly over `warmup` updates, then half a cosine to `final`."""

    lr: float
    final: float
    warmup: int

    def at(self, update: int, length: int) -> float:
        """Of an update, counted from 0, of a stage of `length`; afterwards `final`."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        progress = min(1.0, (update - self.warmup) / max(1, length - self.warmup))
        return self.final + (self.lr - self.final) * (1 + math.cos(math.pi * progress)) / 2


class Genie(
    ZooModel,
    repo_url="https://sites.google.com/view/genie-2024",
    paper_url="https://arxiv.org/abs/2402.15391",
):
    """Genie.

    Attributes:
        num_codes: of the tokenizer.
        num_latent_actions: of the latent action model; 1 if they are continuous.

    States are the past that dreams see: "tokens" (N, W, P) int64 of the last W = frames - 1 frames,
    "actions" (N, W, A) that led to each, and "frames" (N,) int64, how many of the W there have
    been; the others stand in front.

    Args:
        spec: one image; actions, if there are some, only tell what latent actions stand for.
        size: one of `SIZES`; single shapes below override it.
        tokenizer_encoder, tokenizer_decoder, action_encoder, action_decoder, dynamics, policy:
            layers, width, heads, width of a head and width of the MLP of each part. A
            `tokenizer_encoder` of 0 layers reads each patch alone (ours).
        frames: most frames of a clip, and of past and future together in dreams.
        patch: side of the tokenizer's patches in pixels.
        codes, code_width: size and width of the tokenizer's codebook.
        tokenizer_quantizer: "vq", or "fsq" with `code_levels`, whose product is the
            number of codes.
        code_levels: levels of each number of a code.
        action_model: "st-transformer", or "convolutional" (ours).
        action_patch: side of the patches of the latent action model.
        num_actions, action_width: size and width of the codebook of latent actions.
        action_quantizer: "vq", "fsq" with `action_levels`, or "none": continuous actions, to see
            what leaks through them.
        action_levels: levels of each number of a latent action.
        normalize_actions: standardise latent actions over the batch before they become codes
            (ours).
        residual: the latent action model predicts changes of pixels (ours).
        commitment: weight of the commitment losses, beside squared errors in units of the variance
            of what is predicted.
        copy_gate: the dynamics may copy tokens of the frame before (ours).
        whole_past: the dynamics predict one frame at a time, from pasts without hidden tokens
            (ours; see `hide`).
        mask_rates: each clip's share of hidden tokens is uniform between these.
        token_noise: most of the tokens of a clip that are replaced by random ones in training
            (ours).
        tokenizer_updates, world_updates, policy_updates: length of the stages.
        action_updates: updates at the beginning of the world stage in which only the latent action
            model learns (ours).
        tokenizer_lr, world_lr, policy_lr: largest learning rates.
        tokenizer_final_lr, world_final_lr: those at the end of a stage; the policy's stays.
        tokenizer_warmup, world_warmup: updates in which they rise.
        action_lr, action_final_lr: of the latent action model; by default those of the world.
        betas: of AdamW.
        weight_decay: of AdamW, on the weights of linear maps and convolutions.
        clip: largest norm of the gradients of each part; 0 does not clip.
        steps, temperature: passes through the dynamics for a dreamed frame, and of its tokens.
        labelled_steps: how many real actions are looked at.
    """

    name: ClassVar[str] = "genie"
    needs_actions: ClassVar[bool] = False
    num_latent_actions: int = 0

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "coinrun",
        tokenizer_encoder: Sizes | None = None,
        tokenizer_decoder: Sizes | None = None,
        action_encoder: Sizes | None = None,
        action_decoder: Sizes | None = None,
        dynamics: Sizes | None = None,
        policy: Sizes | None = None,
        frames: int = 16,
        patch: int = 4,
        codes: int = 1024,
        code_width: int = 32,
        tokenizer_quantizer: Literal["vq", "fsq"] = "vq",
        code_levels: list[int] | None = None,
        action_model: Literal["st-transformer", "convolutional"] = "st-transformer",
        action_patch: int = 16,
        num_actions: int = 6,
        action_width: int = 32,
        action_quantizer: Literal["vq", "fsq", "none"] = "vq",
        action_levels: list[int] | None = None,
        normalize_actions: bool = False,
        residual: bool = False,
        commitment: float = 0.25,
        copy_gate: bool = False,
        whole_past: bool = False,
        mask_rates: tuple[float, float] = MASK_RATES,
        token_noise: float = 0.0,
        tokenizer_updates: int = 300_000,
        world_updates: int = 200_000,
        policy_updates: int = 0,
        action_updates: int = 0,
        tokenizer_lr: float = 3e-4,
        tokenizer_final_lr: float = 3e-4,
        tokenizer_warmup: int = 10_000,
        world_lr: float = 3e-5,
        world_final_lr: float = 3e-6,
        world_warmup: int = 5_000,
        action_lr: float | None = None,
        action_final_lr: float | None = None,
        policy_lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.9),
        weight_decay: float = 1e-4,
        clip: float = 0.0,
        steps: int = 25,
        temperature: float = 1.0,
        labelled_steps: int = 200,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        action_lr = world_lr if action_lr is None else action_lr
        action_final_lr = world_final_lr if action_final_lr is None else action_final_lr
        given = {
            "tokenizer_encoder": tokenizer_encoder,
            "tokenizer_decoder": tokenizer_decoder,
            "action_encoder": action_encoder,
            "action_decoder": action_decoder,
            "dynamics": dynamics,
            "policy": policy,
        }
        shapes = _shapes(size, given)
        reject_unknown("Genie", ("vq", "fsq"), tokenizer_quantizer=tokenizer_quantizer)
        reject_unknown("Genie", ("vq", "fsq", "none"), action_quantizer=action_quantizer)
        reject_unknown("Genie", ("st-transformer", "convolutional"), action_model=action_model)
        reject_unless_positive(
            "Genie",
            patch=patch,
            code_width=code_width,
            action_patch=action_patch,
            action_width=action_width,
            tokenizer_lr=tokenizer_lr,
            world_lr=world_lr,
            action_lr=action_lr,
            policy_lr=policy_lr,
            steps=steps,
        )
        reject_outside("Genie", 2, math.inf, frames=frames)
        reject_outside(
            "Genie",
            0,
            math.inf,
            tokenizer_updates=tokenizer_updates,
            world_updates=world_updates,
            policy_updates=policy_updates,
            tokenizer_final_lr=tokenizer_final_lr,
            world_final_lr=world_final_lr,
            action_final_lr=action_final_lr,
            tokenizer_warmup=tokenizer_warmup,
            world_warmup=world_warmup,
            commitment=commitment,
            clip=clip,
            temperature=temperature,
            labelled_steps=labelled_steps,
        )
        reject_outside("Genie", 0, max(0, world_updates - 1), action_updates=action_updates)
        reject_outside("Genie", 0, 1, token_noise=token_noise)
        reject_outside("Genie", 0, mask_rates[1], mask_rates=mask_rates[0])
        reject_outside("Genie", 0, 1, mask_rates=mask_rates[1])
        _reject_idle(
            {
                "codes": tokenizer_quantizer == "vq",
                "code_width": tokenizer_quantizer == "vq",
                "code_levels": tokenizer_quantizer == "fsq",
                "num_actions": action_quantizer == "vq",
                "action_width": action_quantizer != "fsq",
                "action_levels": action_quantizer == "fsq",
                "action_patch": action_model == "st-transformer",
                "commitment": "vq" in (tokenizer_quantizer, action_quantizer),
            },
            self.hparams,
        )
        self.image_key, image = _image(self.spec)
        self.stage_lengths = {
            "tokenizer": tokenizer_updates,
            "world": world_updates,
            "policy": policy_updates,
        }
        if not any(self.stage_lengths.values()):
            raise UserError(
                "Genie learns nothing: tokenizer_updates, world_updates and policy_updates are 0"
            )
        self.action_updates = action_updates
        self.rates = {
            "tokenizer": Rate(tokenizer_lr, tokenizer_final_lr, tokenizer_warmup),
            "latent_actions": Rate(action_lr, action_final_lr, world_warmup),
            "dynamics": Rate(world_lr, world_final_lr, world_warmup),
            "clone": Rate(policy_lr, policy_lr, 0),
        }
        self.frames, self.window = frames, frames - 1
        self.betas, self.weight_decay, self.clip = betas, weight_decay, clip
        self.commitment, self.mask_rates = commitment, mask_rates
        self.whole_past, self.token_noise = whole_past, token_noise
        self.steps, self.temperature = steps, temperature
        self.labelled_steps = labelled_steps

        patches = Patches(image, patch)
        self.tokenizer = Tokenizer(
            patches,
            shapes["tokenizer_encoder"],
            shapes["tokenizer_decoder"],
            frames,
            _quantizer("tokenizer", tokenizer_quantizer, codes, code_width, code_levels),
        )
        actions = _quantizer(
            "action", action_quantizer, num_actions, action_width, action_levels, normalize_actions
        )
        self.num_codes, self.num_latent_actions = self.tokenizer.quantizer.size, actions.size
        ends = shapes["action_encoder"], shapes["action_decoder"]
        self.latent_actions: LatentActionModel
        if action_model == "convolutional":
            self.latent_actions = conv_action_model(image, *ends, actions, residual)
        else:
            self.latent_actions = st_action_model(
                image, action_patch, *ends, frames, actions, residual
            )
        self.dynamics = Dynamics(
            self.tokenizer.quantizer.size,
            actions.width,
            patches.count,
            shapes["dynamics"],
            frames,
            copy_gate,
        )
        context = min(MOST_FRAMES, self.window)
        self.clone = Clone(patches, shapes["policy"], actions.size, context)
        act = self.spec.action
        self.maps = act is not None and act.kind == "discrete" and act.n <= MOST_ACTIONS
        self.action_map = ActionMap(actions.size, act.n if self.maps else 1)

    # Stages

    @property
    def clock(self) -> Clock:
        """The stage of the next update; the last one goes on."""
        update, last = self.updates, ""
        for stage, length in self.stage_lengths.items():
            if update < length:
                return Clock(stage, update, length)
            if length:
                update, last = update - length, stage
        length = self.stage_lengths[last]
        return Clock(last, length + update, length)

    @property
    def learning(self) -> tuple[str, ...]:
        """The parts that the next update is for."""
        clock = self.clock
        begins = clock.stage == "world" and clock.update < self.action_updates
        return ("latent_actions",) if begins else STAGES[clock.stage]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refuses clips that would leave positions untrained, or go on into another episode."""
        count = batch["obs"][self.image_key].shape[1]
        if count != self.frames:
            raise UserError(
                f"Genie with frames={self.frames} learns from clips of so many frames, and a batch "
                f"has clips of {count}: set --data.clip_length {self.frames}, or --model.frames "
                f"{count}"
            )
        if "is_first" in batch and batch["is_first"][:, 1:].any():
            raise UserError(
                "Genie learns from clips of one episode each, and a batch has some that go on into "
                "the next one: read the data by VideoDataModule"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update of the stage's parts on a batch of clips."""
        if self.training:
            self._wake()
        losses, metrics = self._losses(batch, self.logs_now)
        if self.logs_now:
            self.log_metrics(metrics)
        weights = {name: self._weight(name) for name in losses}
        # `on_before_optimizer_step` drops the gradients of zero.
        return self.total_loss(losses, weights) + zero_of(self._idle())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the same of clips that are not trained on, as val/<name>."""
        losses, metrics = self._losses(batch, True)
        values = {f"val/{name}": value for name, value in {**losses, **metrics}.items()}
        self.log_dict(
            values,
            sync_dist=self.trainer.world_size > 1,
            batch_size=len(batch["obs"][self.image_key]),
        )

    def _losses(self, batch: Batch, measure: bool) -> tuple[Losses, Metrics]:
        """The losses of the present stage, and metrics if they are asked for."""
        frames, stage = self._clips(batch["obs"]), self.clock.stage
        if stage == "tokenizer":
            return self._tokenizer_losses(frames, measure)
        if stage == "world":
            return self._world_losses(frames, measure)
        if self.training and self.maps and "action" in batch:
            self.map_actions(batch["obs"][self.image_key], batch["action"])
        return self._policy_losses(frames, measure)

    def _tokenizer_losses(self, frames: Tensor, measure: bool) -> tuple[Losses, Metrics]:
        """Squared error of the pixels, and commitment."""
        made, quantizer = self.tokenizer(frames), self.tokenizer.quantizer
        error = F.mse_loss(made.frames, frames)
        losses = {
            "reconstruction": error,
            "commitment": made.quantized.commitment * frames.var(),
        }
        if not measure:
            return losses, {}
        return losses, {
            "tokenizer_psnr": _psnr(error),
            "codes_alive": quantizer.alive,
            "code_perplexity": quantizer.perplexity,
        }

    def _world_losses(self, frames: Tensor, measure: bool) -> tuple[Losses, Metrics]:
        """The next frame by its latent action; hidden tokens by past tokens and these actions."""
        following, quantizer = self.latent_actions(frames), self.latent_actions.quantizer
        error = F.mse_loss(following.frames, frames[:, 1:])
        copied = F.mse_loss(frames[:, :-1], frames[:, 1:])
        losses = {
            "next_frame": error,
            "action_commitment": following.actions.commitment * copied,
        }
        metrics: Metrics = {}
        if measure:
            metrics = {
                "next_frame_psnr": _psnr(error),
                "copy_psnr": _psnr(copied),
                "actions_alive": quantizer.alive,
                "action_perplexity": quantizer.perplexity,
            }
        if "dynamics" not in self.learning:
            return losses, metrics
        with torch.no_grad():
            tokens = self.tokenizer.tokens(frames)
        led = F.pad(following.actions.vectors, (0, 0, 1, 0))
        seen = disturb(tokens, self.tokenizer.quantizer.size, self.token_noise)
        seen = hide(seen, self.dynamics.mask, self.mask_rates, self.whole_past)
        losses["hidden_tokens"], scores = self.dynamics.loss_and_scores(tokens, led, seen)
        if measure:
            hidden = tokens[seen == self.dynamics.mask]
            metrics["hidden_accuracy"] = (scores.argmax(-1) == hidden).float().mean()
        return losses, metrics

    def _policy_losses(self, frames: Tensor, measure: bool) -> tuple[Losses, Metrics]:
        """The latent action that comes next, at each frame of all that the policy may see at once.

        So each position in time in which it will act has learnt.
        """
        with torch.no_grad():
            labels = self.latent_actions.infer(frames).codes
        labels = spans(labels, self.clone.frames)
        logits = self.clone(spans(frames[:, :-1], self.clone.frames))
        losses = {"cloning": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}
        if not measure:
            return losses, {}
        right = (logits.detach().argmax(-1) == labels).float().mean()
        return losses, {"clone_accuracy": right, "labelled_steps": self.action_map.steps}

    def _weight(self, loss: str) -> float:
        return self.commitment if loss.endswith("commitment") else 1.0

    def _wake(self) -> None:
        """Puts only the parts that learn in training mode, or the codebooks of others would move.

        What latent actions stand for is forgotten where it is about to be learnt, or changes.
        """
        clock, learning = self.clock, self.learning
        for part in self._parts():
            getattr(self, part).train(part in learning)
        if clock.stage == "world" or (clock.stage == "policy" and clock.update == 0):
            self.action_map.forget()

    @staticmethod
    def _parts() -> Iterator[str]:
        return (part for parts in STAGES.values() for part in parts)

    def _idle(self) -> list[nn.Module]:
        learning = self.learning
        return [getattr(self, part) for part in self._parts() if part not in learning]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves gradients only to the parts that learn, clips those of each and sets the rates."""
        clock, learning = self.clock, self.learning
        for idle in self._idle():
            for parameter in idle.parameters():
                parameter.grad = None  # AdamW skips it, momentum, decay and all
        if self.clip:
            for part in learning:
                nn.utils.clip_grad_norm_(getattr(self, part).parameters(), self.clip)
        for group in optimizer.param_groups:
            part = group["name"]
            if part in learning:
                late = self.action_updates if part == "dynamics" else 0
                group["lr"] = self.rates[part].at(clock.update - late, clock.length - late)

    def configure_optimizers(self) -> Optimizer:
        """One AdamW with two groups for each part: what decays, and what does not."""
        groups = [
            {**group, "lr": self.rates[part].lr, "name": part}
            for part in self._parts()
            for group in decay_groups(getattr(self, part))
        ]
        return AdamW(groups, betas=self.betas, weight_decay=self.weight_decay)

    # Latent actions

    @torch.no_grad()
    def infer_actions(self, video: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Latent actions (B, T - 1) between the frames of uint8 video (B, T, H, W, C).

        With `is_first` (B, T) bool nothing is seen of the episode before; what leads into another
        one is 0.
        """

        def codes(clips: Tensor) -> Tensor:
            if clips.shape[1] == 1:
                return torch.zeros(clips.shape[:2], dtype=torch.int64, device=clips.device)
            return F.pad(self.latent_actions.infer(clips).codes, (1, 0))

        return self._over(codes, _pixels(video), is_first)[:, 1:]

    def map_actions(self, video: Tensor, action: Tensor) -> None:
        """Learns what latent actions stand for, until `labelled_steps` were seen in all.

        Args:
            video: uint8 (B, T, H, W, C), consecutive frames of one episode each.
            action: (B, T) what was chosen at each frame; the last of each clip is not read.

        Raises:
            UserError: the model was built for data without such actions.
        """
        self._require_discrete()
        if float(self.action_map.steps) < self.labelled_steps:
            latent = self.infer_actions(video)
            real = action[:, : latent.shape[1]]
            self.action_map.add(latent.flatten(), real.flatten(), self.labelled_steps)

    def _led(self, clips: Tensor) -> Tensor:
        """The vectors (B, T, A) that led to each frame; zeros for the first."""
        if clips.shape[1] == 1:
            return clips.new_zeros(len(clips), 1, self.latent_actions.quantizer.width)
        return F.pad(self.latent_actions.infer(clips).vectors, (0, 0, 1, 0))

    def _over(
        self, function: Callable[[Tensor], Tensor], frames: Tensor, first: Tensor | None = None
    ) -> Tensor:
        """A causal function of clips of at most `frames`, (B, T, ...), over longer ones.

        Beyond the first clip each frame sees as many before it as there is room for, and what the
        function says of it alone is kept. It sees no frame before one that is `first` (B, T).
        """
        if first is not None and first[:, 1:].any():
            rows = []
            for row, begins in zip(frames, first, strict=True):
                ends = [*(begins[1:].nonzero()[:, 0] + 1).tolist(), len(row)]
                lengths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
                parts = [self._over(function, part[None]) for part in row.split(lengths)]
                rows.append(torch.cat(parts, 1))
            return torch.cat(rows)
        pieces = [function(frames[:, : self.frames])]
        for end in range(self.frames + 1, frames.shape[1] + 1):
            pieces.append(function(frames[:, end - self.frames : end])[:, -1:])
        return torch.cat(pieces, 1)

    # Dreaming

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """States {key: (B, T, ...)} after each frame of a batch."""
        frames, first = _pixels(batch["obs"][self.image_key]), batch.get("is_first")
        tokens = self._over(self.tokenizer.tokens, frames, first)
        actions = self._over(self._led, frames, first)
        step = torch.arange(tokens.shape[1], device=tokens.device)
        begun = step.new_zeros(tokens.shape[:2])
        if first is not None:  # nothing is remembered of the episode before
            begun = torch.where(first, step, 0).cummax(1).values
        places = (step[:, None] + torch.arange(1 - self.window, 1, device=step.device)).clamp(min=0)
        return {
            "tokens": tokens[:, places],
            "actions": actions[:, places],
            "frames": (step - begun + 1).clamp(max=self.window),
        }

    @torch.no_grad()
    def imagine(
        self,
        state: State,
        actions: Tensor | Callable[[State], Tensor] | None,
        horizon: int,
        temperature: float | None = None,
        steps: int | None = None,
    ) -> Imagined:
        """Dreams `horizon` frames from states {key: (N, ...)}; they have no reward and do not end.

        Args:
            state: of `observe` or of a dream.
            actions: latent actions (N, H) int64, or a function of the state that gives (N,), or
                None for the cloned policy's. Vectors (N, H, A) or (N, A) are taken as they are.
            horizon: H.
            temperature: of the tokens; by default that of the model.
            steps: passes through the dynamics for each frame; by default those of the model.

        Raises:
            UserError: latent actions that there are not.
        """
        temperature = self.temperature if temperature is None else temperature
        states, taken = [], []
        for step in range(horizon):
            if isinstance(actions, Tensor):
                action = actions[:, step]
            else:
                action = self._dreamed_action(state) if actions is None else actions(state)
            taken.append(action)
            state = self._step(state, action, steps or self.steps, temperature)
            states.append(state)
        dreamed = {key: torch.stack([s[key] for s in states], 1) for key in state}
        flat = torch.zeros(len(state["frames"]), horizon, device=self.device)
        return Imagined(flat, flat + 1, dreamed, torch.stack(taken, 1))

    def _step(self, state: State, action: Tensor, steps: int, temperature: float) -> State:
        vector = self._vector(action, len(state["frames"]))
        past = state["tokens"], state["actions"]
        token = self.dynamics.next_frame(*past, self._valid(state), vector, steps, temperature)
        return {
            "tokens": torch.cat([past[0][:, 1:], token[:, None]], 1),
            "actions": torch.cat([past[1][:, 1:], vector[:, None].to(past[1].dtype)], 1),
            "frames": (state["frames"] + 1).clamp(max=self.window),
        }

    def _vector(self, action: Tensor, count: int) -> Tensor:
        """Vectors (N, A) of latent actions: codes (N,), or already vectors."""
        quantizer = self.latent_actions.quantizer
        if action.is_floating_point():
            if action.shape != (count, quantizer.width):
                raise UserError(
                    f"the vectors of latent actions for {count} dreams are of shape "
                    f"{(count, quantizer.width)}, got {tuple(action.shape)}: give one for each, or "
                    f"codes from 0 to {quantizer.size - 1} as int64"
                )
            return action
        if action.dtype == torch.bool or action.shape != (count,):
            raise UserError(
                f"latent actions for {count} dreams are codes of shape {(count,)} as int64, got "
                f"{action.dtype} of shape {tuple(action.shape)}"
            )
        vectors = quantizer.lookup(action.clamp(0, quantizer.size - 1))
        wrong = action[(action < 0) | (action >= quantizer.size)]
        if len(wrong):
            raise UserError(
                f"there is no latent action {int(wrong[0])}: this Genie has {quantizer.size}, from "
                f"0 to {quantizer.size - 1}"
            )
        return vectors

    def _valid(self, state: State) -> Tensor:
        """(N, W) which frames of the window there have been."""
        places = torch.arange(self.window, device=state["frames"].device)
        return places >= self.window - state["frames"][:, None]

    @torch.no_grad()
    def decode(self, state: State) -> dict[str, Tensor]:
        """The last frames, float in [0, 1], of states {key: (N, H, ...)}.

        Where the states of a row follow one another their frames are decoded as one clip; in those
        longer than `frames` each then sees at least half a window before it.
        """
        tokens, seen = state["tokens"], state["frames"]
        lead, grown = seen.shape, (seen[:, :-1] + 1).clamp(max=self.window)
        follow = torch.equal(tokens[:, 1:, :-1], tokens[:, :-1, 1:])
        if not (follow and torch.equal(seen[:, 1:], grown)):
            flat = {key: value.flatten(0, 1)[:, None] for key, value in state.items()}
            return {key: part[:, 0].unflatten(0, lead) for key, part in self.decode(flat).items()}
        clips = torch.cat([tokens[:, 0], tokens[:, 1:, -1]], 1)
        places = torch.arange(clips.shape[1], device=clips.device)
        valid = places >= self.window - seen[:, :1]
        rows = max(1, DECODED // self.frames)
        parts = zip(clips.split(rows), valid.split(rows), strict=True)
        return {self.image_key: torch.cat([self._decoded(*part) for part in parts])}

    def _decoded(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Frames (N, H, H, W, C) from the last of the first window of (N, W + H - 1, P) on."""
        empty = int((~valid).sum(1).min())
        tokens, valid = tokens[:, empty:], valid[:, empty:]
        frames: list[Tensor] = []
        done = self.window - 1 - empty
        while done < tokens.shape[1]:
            begin = max(0, done - self.frames // 2) if frames else 0
            end = begin + self.frames
            part = self.tokenizer.decode(tokens[:, begin:end], valid[:, begin:end])
            frames.append(part[:, done - begin :])
            done = end
        return torch.cat(frames, 1)

    @torch.no_grad()
    def encode(self, obs: Obs) -> Tensor:
        """Features (B, T, F) of obs {key: (B, T, ...)}: means over the tokenizer's patches."""

        def pooled(clips: Tensor) -> Tensor:
            return self.tokenizer.features(clips).mean(2)

        return self._over(pooled, _pixels(obs[self.image_key]))

    # Acting

    def initial_state(self, batch_size: int) -> State:
        """Nothing seen yet."""
        video = (batch_size, self.clone.frames, *self.spec.obs[self.image_key].shape)
        return {
            "video": torch.zeros(video, dtype=torch.uint8, device=self.device),
            "seen": torch.zeros(batch_size, dtype=torch.int64, device=self.device),
        }

    @torch.no_grad()
    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """What the clone does in a real environment: its latent action, translated.

        Args:
            obs: {key: (B, ...)}.
            state: {key: (B, ...)}.
            explore: draw both by their probabilities; otherwise take the likeliest.

        Raises:
            UserError: the model was built for data without such actions.
        """
        self._require_discrete()
        video = torch.cat([state["video"][:, 1:], obs[self.image_key][:, None]], 1)
        seen = (state["seen"] + 1).clamp(max=self.clone.frames)
        latent = self._latent(_pixels(video), seen, explore)
        return self.action_map.translate(latent, explore), {"video": video, "seen": seen}

    def _latent(self, frames: Tensor, seen: Tensor, explore: bool) -> Tensor:
        """The clone's latent actions (N,) after the last `seen` (N,) of frames (N, F, ...)."""
        places = torch.arange(frames.shape[1], device=seen.device)
        logits = self.clone(frames, places >= frames.shape[1] - seen[:, None])[:, -1].float()
        if explore:
            return torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return logits.argmax(-1)

    def _dreamed_action(self, state: State) -> Tensor:
        """What the clone would do in a dream, as a latent action."""
        context = self.clone.frames
        frames = self.tokenizer.decode(state["tokens"], self._valid(state))[:, -context:]
        return self._latent(frames, state["frames"].clamp(max=context), explore=False)

    def require_policy(self) -> None:
        """Refuses to be judged before there is a policy.

        Raises:
            UserError: none was cloned yet, or no labelled step says what its actions stand for.
        """
        self._require_discrete()
        if not self.action_map.steps:
            raise UserError(
                "this Genie has not cloned a policy from steps with actions: train it with "
                "policy_updates and labelled_steps above 0 on recordings that have actions, from "
                "these weights (--from)"
            )

    def _require_discrete(self) -> None:
        if not self.maps:
            raise UserError(
                f"Genie translates its latent actions into up to {MOST_ACTIONS} discrete ones, and "
                f"was made for {self.spec}: to act, train it on recordings with such actions"
            )

    def _clips(self, obs: Obs) -> Tensor:
        """Frames (B, T, H, W, C) in [0, 1] to learn from."""
        video = obs[self.image_key]
        if video.shape[1] > self.frames:
            raise UserError(
                f"Genie has positions for {self.frames} frames, and a batch has clips of "
                f"{video.shape[1]}: set --data.clip_length or frames"
            )
        return _pixels(video)


def _reject_idle(counts: Mapping[str, bool], given: Mapping[str, Any]) -> None:
    """Raises a UserError for the first option that is given and does not count."""
    known = inspect.signature(Genie.__init__).parameters
    for name, does in counts.items():
        if not does and given[name] != known[name].default:
            others = {
                key: given[key]
                for key in ("tokenizer_quantizer", "action_quantizer", "action_model")
            }
            chosen = ", ".join(f"{key}={value}" for key, value in others.items())
            raise UserError(
                f"Genie({name}={given[name]}) has no effect with {chosen}: leave it out"
            )


def _shapes(size: str, given: Mapping[str, Sizes | None]) -> dict[str, Shape]:
    reject_unknown("Genie", SIZES, size=size)
    shapes = {key: Shape(*value) if value else SIZES[size][key] for key, value in given.items()}
    for part, shape in shapes.items():
        least = 0 if part == "tokenizer_encoder" else 1
        if shape.layers < least or min(shape[1:]) < 1:
            raise UserError(f"Genie needs layers and widths above 0, got {part}={list(shape)}")
    return shapes


def _image(spec: Spec) -> tuple[str, tuple[int, int, int]]:
    if len(spec.images) != 1:
        raise UserError(
            f"Genie learns from one image, and the data has {spec}: name the one to read by "
            "`observations` of the datamodule"
        )
    key = spec.images[0]
    height, width, channels = spec.obs[key].shape
    return key, (height, width, channels)


def _quantizer(
    part: str, kind: str, size: int, width: int, levels: list[int] | None, normalize: bool = False
) -> Quantizer:
    if kind == "fsq":
        if not levels:
            name = "code_levels" if part == "tokenizer" else "action_levels"
            raise UserError(f"Genie({part}_quantizer='fsq') needs {name}, such as [2, 2, 2]")
        return FiniteScalarQuantizer(levels, normalize)
    if kind == "vq" and size < 2:
        name = "codes" if part == "tokenizer" else "num_actions"
        raise UserError(f"Genie needs {name} of at least 2, got {size}")
    return VectorQuantizer(size, width, normalize) if kind == "vq" else Continuous(width, normalize)


def _pixels(video: Tensor) -> Tensor:
    """uint8 to float in [0, 1]."""
    return video.float() / 255


def _psnr(error: Tensor) -> Tensor:
    """Decibels of a mean squared error of pixels in [0, 1]."""
    return -10 * error.detach().clamp(min=1e-10).log10()
