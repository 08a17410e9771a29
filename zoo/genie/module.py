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
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from datamodules.spec import Spec
from zoo.arguments import (
    reject_fractions,
    reject_outside,
    reject_plan,
    reject_unless_positive,
)
from zoo.base import Batch, Imagined, Obs, State, ZooModel
from zoo.genie.clips import only_image, over_clips, pixels, psnr, reject_batch, reject_lengths
from zoo.genie.cloning import (
    MOST_FRAMES,
    ActionMap,
    Clone,
    real_actions,
    require_translatable,
    spans,
)
from zoo.genie.dreams import Dreams
from zoo.genie.dynamics import MASK_RATES, Dynamics, disturb, hide
from zoo.genie.latent_actions import conv_action_model, st_action_model
from zoo.genie.options import reject_mistakes
from zoo.genie.patches import Patches
from zoo.genie.quantizers import make_quantizer
from zoo.genie.sizes import choose_shapes
from zoo.genie.stages import PARTS, Clock, Stages
from zoo.genie.tokenizer import Tokenizer
from zoo.nets.optim import decay_groups
from zoo.nets.ranks import zero_of

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor | float]
Sizes = Mapping[str, int]  # some fields of a `Shape`


class Genie(
    ZooModel,
    repo_url="https://sites.google.com/view/genie-2024",
    paper_url="https://arxiv.org/abs/2402.15391",
):
    """Genie.

    Attributes:
        num_codes: of the tokenizer.
        num_latent_actions: of the latent action model; 1 if they are continuous.

    States are those of `Dreams`.

    Args:
        spec: one image; actions, if there are some, only tell what latent actions stand for.
        size: one of `SIZES`; what is given below wins.
        tokenizer_encoder, tokenizer_decoder, action_encoder, action_decoder, dynamics, policy:
            numbers of each part that are not the size's, such as {layers: 2, width: 64} (see
            `Shape`). A `tokenizer_encoder` of 0 layers reads each patch alone (ours).
        frames: most frames of a clip, and of past and future together in dreams.
        patch: side of the tokenizer's patches in pixels.
        codes, code_width: size and width of the tokenizer's codebook.
        tokenizer_quantizer: "vq", or "fsq" with `code_levels`.
        code_levels: levels of each number of a code; their product is the number of codes.
        normalize_codes: standardise what the tokenizer quantises over the batch (ours).
        action_model: "st-transformer", or "convolutional" (ours).
        action_patch: side of the patches of the latent action model.
        action_channels: of the convolutional one.
        num_actions, action_width: size and width of the codebook of latent actions.
        action_quantizer: "vq", "fsq" with `action_levels`, or "none": continuous actions, to see
            what leaks through them.
        action_levels: levels of each number of a latent action.
        normalize_actions: standardise latent actions likewise.
        residual: the latent action model predicts changes of pixels (ours).
        read_changes: its transformers read beside each patch how it has changed (ours).
        known_motion: no latent action has to tell how things move by themselves (ours): the next
            frame is predicted from two frames or more, as one does not show it, and the action of
            a step is read off its two frames alone, so that the first of a clip is, too; with
            `relative_positions`, without positions in space. Needs `read_changes` or convolutions.
        commitment: weight of the commitment losses, beside squared errors in units of the variance
            of what is predicted.
        copy_gate: the dynamics may copy tokens of the frame before (ours).
        whole_past: the dynamics predict the last frame of clips of random length, from pasts
            without hidden tokens (ours).
        relative_positions: all transformers but the policy's learn how attention depends on the
            offset between two places, too (ours; see `Offsets`).
        code_vectors: the dynamics read the tokenizer's vectors, too (ours; see `Dynamics`).
        mask_rates: each clip's share of hidden tokens is uniform between these.
        token_noise: most of a clip's tokens that are replaced by random ones in training (ours).
        tokenizer_updates, world_updates, policy_updates: length of the stages.
        action_updates: updates at the beginning of the world stage in which only the latent action
            model learns (ours); its learning rate falls over these, and then stays.
        tokenizer_clips, world_clips: how many of a batch's clips, the first, the tokenizer learns
            from, and the world once its dynamics learn; by default all.
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
        normalize_codes: bool = False,
        action_model: Literal["st-transformer", "convolutional"] = "st-transformer",
        action_patch: int = 16,
        action_channels: int = 64,
        num_actions: int = 6,
        action_width: int = 32,
        action_quantizer: Literal["vq", "fsq", "none"] = "vq",
        action_levels: list[int] | None = None,
        normalize_actions: bool = False,
        residual: bool = False,
        read_changes: bool = False,
        known_motion: bool = False,
        commitment: float = 0.25,
        copy_gate: bool = False,
        whole_past: bool = False,
        relative_positions: bool = False,
        code_vectors: bool = False,
        mask_rates: tuple[float, float] = MASK_RATES,
        token_noise: float = 0.0,
        tokenizer_updates: int = 300_000,
        world_updates: int = 200_000,
        policy_updates: int = 0,
        action_updates: int = 0,
        tokenizer_clips: int | None = None,
        world_clips: int | None = None,
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
        reject_mistakes(self.hparams, inspect.signature(Genie.__init__).parameters)
        shapes = choose_shapes(size, self.hparams)
        self.stages = Stages.of(self.hparams)
        self.frames = frames
        self.betas, self.weight_decay, self.clip = betas, weight_decay, clip
        self.commitment, self.mask_rates = commitment, mask_rates
        self.whole_past, self.token_noise = whole_past, token_noise
        self.tokenizer_clips, self.world_clips = tokenizer_clips, world_clips
        self.known_motion = known_motion
        self.steps, self.temperature, self.labelled_steps = steps, temperature, labelled_steps

        self.image_key, image = only_image(self.spec)
        patches = Patches(image, patch)
        codebook = make_quantizer(
            tokenizer_quantizer, codes, code_width, code_levels, normalize_codes
        )
        encoder, decoder = shapes["tokenizer_encoder"], shapes["tokenizer_decoder"]
        relative = relative_positions
        self.tokenizer = Tokenizer(patches, encoder, decoder, frames, codebook, relative)
        actions = make_quantizer(
            action_quantizer, num_actions, action_width, action_levels, normalize_actions
        )
        self.num_codes, self.num_latent_actions = codebook.size, actions.size
        if action_model == "convolutional":
            self.latent_actions = conv_action_model(
                image, action_channels, actions, residual, known_motion
            )
        else:
            encoder, decoder = shapes["action_encoder"], shapes["action_decoder"]
            self.latent_actions = st_action_model(
                image,
                action_patch,
                encoder,
                decoder,
                frames,
                actions,
                residual,
                read_changes,
                relative,
                known_motion,
            )
        self.dynamics = Dynamics(
            codebook.size,
            actions.width,
            patches.grid,
            shapes["dynamics"],
            frames,
            copy_gate,
            relative,
            codebook.width,
            codebook.lookup if code_vectors else None,
        )
        self.clone = Clone(patches, shapes["policy"], actions.size, min(MOST_FRAMES, frames - 1))
        self.action_map = ActionMap(actions.size, real_actions(self.spec))

    # Stages

    @property
    def clock(self) -> Clock:
        """The stage of the next update."""
        return self.stages.clock(self.updates)

    @property
    def learning(self) -> tuple[str, ...]:
        """The parts that the next update is for."""
        return self.stages.learning(self.updates)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Refuses clips that do not suit training."""
        reject_batch(batch, self.image_key, self.frames)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update of the stage's parts on a batch of clips."""
        if self.training:
            self._wake()
        losses, metrics = self._losses(batch)
        if self.logs_now:
            self.log_metrics(metrics)
        weights = {k: self.commitment if k.endswith("commitment") else 1.0 for k in losses}
        # `on_before_optimizer_step` drops the gradients of zero.
        return self.total_loss(losses, weights) + zero_of(self._idle())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the same of clips that are not trained on, as val/<name>; not the use of codes."""
        losses, metrics = self._losses(batch)
        use = ("alive", "perplexity", "labelled_steps")  # of training
        found = {k: v for k, v in {**losses, **metrics}.items() if not k.endswith(use)}
        values = {f"val/{name}": value for name, value in found.items()}
        self.log_dict(
            values,
            sync_dist=self.trainer.world_size > 1,
            batch_size=len(batch["obs"][self.image_key]),
        )

    def _losses(self, batch: Batch) -> tuple[Losses, Metrics]:
        """The losses and metrics of the present stage."""
        video, stage = batch["obs"][self.image_key], self.clock.stage
        reject_lengths(video, self.frames, 2 + self.known_motion)
        if stage == "tokenizer":
            return self._tokenizer_losses(pixels(video[: self.tokenizer_clips]))
        if stage == "world" and "dynamics" not in self.learning:
            return self._action_losses(pixels(video))[:2]
        if stage == "world":
            return self._world_losses(pixels(video[: self.world_clips]))
        labelled = "action" in batch and batch["action"].dim() == 2  # not several for a frame
        if self.training and self.action_map.real and labelled:
            self.map_actions(video, batch["action"])
        return self._policy_losses(pixels(video))

    def _tokenizer_losses(self, frames: Tensor) -> tuple[Losses, Metrics]:
        """Squared error of the pixels, and commitment."""
        made, quantizer = self.tokenizer(frames), self.tokenizer.quantizer
        error = F.mse_loss(made.frames, frames)
        commitment = made.quantized.commitment * frames.var()
        return {"reconstruction": error, "commitment": commitment}, {
            "tokenizer_psnr": psnr(error),
            "codes_alive": quantizer.alive,
            "code_perplexity": quantizer.perplexity,
        }

    def _world_losses(self, frames: Tensor) -> tuple[Losses, Metrics]:
        """The next frame by its latent action; hidden tokens by past tokens and these actions."""
        losses, metrics, vectors = self._action_losses(frames)
        hidden_tokens, accuracy = self._dynamics_loss(frames, vectors)
        return {**losses, "hidden_tokens": hidden_tokens}, {**metrics, "hidden_accuracy": accuracy}

    def _action_losses(self, frames: Tensor) -> tuple[Losses, Metrics, Tensor]:
        """Squared error of the next frame, and commitment; also the actions' vectors."""
        following, quantizer = self.latent_actions(frames), self.latent_actions.quantizer
        begin = int(self.known_motion)  # one frame shows no motion
        truth = frames[:, begin + 1 :]
        error = F.mse_loss(following.frames[:, begin:], truth)
        copied = F.mse_loss(frames[:, begin:-1], truth)
        commitment = following.actions.commitment * copied
        losses: Losses = {"next_frame": error, "action_commitment": commitment}
        metrics: Metrics = {
            "next_frame_psnr": psnr(error),
            "copy_psnr": psnr(copied),
            "actions_alive": quantizer.alive,
            "action_perplexity": quantizer.perplexity,
        }
        return losses, metrics, following.actions.vectors

    def _dynamics_loss(self, frames: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of hidden tokens, and the share of them that is right."""
        led = F.pad(vectors, (0, 0, 1, 0))
        if self.whole_past:
            # The longest of three draws: dreams mostly see a full window.
            length = int(torch.randint(2, self.frames + 1, (3,)).max())
            frames, led = frames[:, :length], led[:, :length]
        with torch.no_grad():
            tokens = self.tokenizer.tokens(frames)
        seen = disturb(tokens, self.num_codes, self.token_noise)
        seen = hide(seen, self.dynamics.mask, self.mask_rates, last_only=self.whole_past)
        loss, scores = self.dynamics.loss_and_scores(tokens, led, seen)
        hidden = tokens[seen == self.dynamics.mask]
        return loss, (scores.argmax(-1) == hidden).sum() / max(1, len(hidden))

    def _policy_losses(self, frames: Tensor) -> tuple[Losses, Metrics]:
        """The latent action that comes next, at each frame of all that the policy may see at once.

        So each position in time in which it will act has learnt.
        """
        with torch.no_grad():
            labels = self.latent_actions.infer(frames).codes
        labels = spans(labels, self.clone.frames)
        logits = self.clone(spans(frames[:, :-1], self.clone.frames))
        right = (logits.detach().argmax(-1) == labels).float().mean()
        metrics = {"clone_accuracy": right, "labelled_steps": self.action_map.steps}
        return {"cloning": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}, metrics

    def _wake(self) -> None:
        """Puts only the parts that learn in training mode, or the codebooks of others would move.

        What latent actions stand for is forgotten where it is about to be learnt, or changes.
        """
        clock, learning = self.clock, self.learning
        for part in PARTS:
            getattr(self, part).train(part in learning)
        if clock.stage == "world" or (clock.stage == "policy" and clock.update == 0):
            self.action_map.forget()

    def _idle(self) -> list[nn.Module]:
        learning = self.learning
        return [getattr(self, part) for part in PARTS if part not in learning]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves gradients only to the parts that learn, clips those of each and sets the rates."""
        for idle in self._idle():
            for parameter in idle.parameters():
                parameter.grad = None  # AdamW skips it, momentum, decay and all
        if self.clip:
            for part in self.learning:
                nn.utils.clip_grad_norm_(getattr(self, part).parameters(), self.clip)
        rates = self.stages.learning_rates(self.updates)
        for group in optimizer.param_groups:
            group["lr"] = rates.get(group["name"], group["lr"])

    def configure_optimizers(self) -> Optimizer:
        """One AdamW with two groups for each part: what decays, and what does not."""
        groups = [
            {**group, "lr": self.stages.rates[part].lr, "name": part}
            for part in PARTS
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
        codes = self.latent_actions.codes_to
        return over_clips(codes, pixels(video), self.frames, is_first)[:, 1:]

    def map_actions(self, video: Tensor, action: Tensor) -> None:
        """Learns what latent actions stand for, until `labelled_steps` were seen in all.

        Args:
            video: uint8 (B, T, H, W, C), consecutive frames of one episode each.
            action: (B, T) what was chosen at each frame; the last of each clip is not read.

        Raises:
            UserError: the model was built for data without such actions.
        """
        require_translatable(self.spec)
        if float(self.action_map.steps) < self.labelled_steps:
            latent = self.infer_actions(video)
            real = action[:, : latent.shape[1]]
            self.action_map.add(latent.flatten(), real.flatten(), self.labelled_steps)

    @torch.no_grad()
    def encode(self, obs: Obs) -> Tensor:
        """Features (B, T, F) of obs {key: (B, T, ...)}: means over the tokenizer's patches."""
        frames = pixels(obs[self.image_key])
        return over_clips(lambda x: self.tokenizer.features(x).mean(2), frames, self.frames)

    # Dreaming

    @property
    def dreams(self) -> Dreams:
        """The world that the parts make up."""
        return Dreams(self.tokenizer, self.latent_actions, self.dynamics, self.frames)

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """States {key: (B, T, ...)} after each frame of a batch."""
        return self.dreams.observe(pixels(batch["obs"][self.image_key]), batch.get("is_first"))

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
            UserError: latent actions that there are not, or fewer than `horizon`; an argument out
                of range.
        """
        reject_plan(self.name, actions, horizon)
        steps = self.steps if steps is None else steps
        reject_fractions(self.name, steps=steps)
        reject_unless_positive(self.name, steps=steps)
        temperature = self.temperature if temperature is None else temperature
        reject_outside(self.name, 0, math.inf, temperature=temperature)
        choose = self._cloned if actions is None else actions
        states, taken = [], []
        for step in range(horizon):
            action = choose(state) if callable(choose) else choose[:, step]
            state = self.dreams.step(state, action, steps, temperature)
            states.append(state)
            taken.append(action)
        dreamed = {key: torch.stack([s[key] for s in states], 1) for key in state}
        flat = torch.zeros(len(state["frames"]), horizon, device=self.device)
        return Imagined(flat, flat + 1, dreamed, torch.stack(taken, 1))

    @torch.no_grad()
    def decode(self, state: State) -> dict[str, Tensor]:
        """The last frames, float in [0, 1], of states {key: (N, H, ...)}."""
        return {self.image_key: self.dreams.decode(state)}

    def _cloned(self, state: State) -> Tensor:
        """What the clone would do in dreams, as latent actions (N,)."""
        most = self.clone.frames
        frames = self.dreams.watch(state)[:, -most:]
        return self.clone.choose(frames, state["frames"].clamp(max=most), draw=False)

    # Acting

    def initial_state(self, batch_size: int) -> State:
        """Nothing seen yet."""
        return self.clone.initial_state(batch_size)

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
        require_translatable(self.spec)
        state = self.clone.see(obs[self.image_key], state)
        latent = self.clone.choose(pixels(state["video"]), state["seen"], explore)
        return self.action_map.translate(latent, explore), state

    def require_policy(self) -> None:
        """Refuses to be judged before there is a policy.

        Raises:
            UserError: none was cloned yet, or no labelled step says what its actions stand for.
        """
        require_translatable(self.spec)
        self.action_map.require_labels()
