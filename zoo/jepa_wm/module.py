"""An action-conditioned JEPA (Terver et al., "EB-JEPA", 2026), and planning with it.

An encoder turns images into latents, a predictor learns which latents actions lead to, and nothing
is decoded; a regulariser keeps latents from collapsing. Acting is planning: actions are searched
whose predicted latents are close to that of a goal image. This file is the method from top to
bottom; its deviations from the official code are listed in README.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from datamodules.errors import UserError
from datamodules.replay import Portion
from datamodules.spec import Spec
from zoo.arguments import (
    choose_widths,
    reject_outside,
    reject_plan,
    reject_unknown,
    reject_unless_positive,
)
from zoo.base import Batch, Imagined, Obs, State, ZooModel
from zoo.jepa_wm.encoder import ENCODERS, Encoder
from zoo.jepa_wm.predictor import (
    PREDICTORS,
    RecurrentPredictor,
    ResidualPredictor,
    TransformerPredictor,
)
from zoo.jepa_wm.regularizers import (
    InverseDynamics,
    covariance_loss,
    masked_mean,
    sigreg_loss,
    similarity_loss,
    variance_loss,
)
from zoo.nets.actions import ActionCodec, random_like
from zoo.nets.averaging import follow
from zoo.nets.distributions import Categorical
from zoo.nets.ranks import gather_ranks
from zoo.planning import CEM, MPPI, Plan, last_reward, predicted_return

# `nano` is ours, for CPUs. `hidden` is of the MLP, `layers` and `heads` are of the transformer; the
# second line of each is the planner's.
SIZES: dict[str, dict[str, int]] = {
    "nano": {
        **{"latent": 64, "hidden": 256, "layers": 2, "heads": 4},
        **{"horizon": 30, "block": 3, "iterations": 3, "candidates": 200, "elites": 20},
    },
    "paper": {
        **{"latent": 512, "hidden": 512, "layers": 6, "heads": 8},
        **{"horizon": 90, "block": 1, "iterations": 20, "candidates": 200, "elites": 20},
    },
}
# Weights of the terms that each way to prevent a collapse has; "ema" has another target instead.
PREVENTION: dict[str, dict[str, float]] = {
    "vicreg": {"variance": 16.0, "covariance": 8.0, "similarity": 12.0, "inverse_dynamics": 1.0},
    "sigreg": {"sigreg": 10.0},
    "ema": {},
    "none": {},
}
FINAL_LR = 0.01  # share of the learning rate at the end of the cosine


class Rollouts(NamedTuple):
    """N predictions of each of B sequences.

    Attributes:
        predicted: (B, N, D) latents.
        start: (B, N) the step of the newest real latent that each knows of.
        end: (N,) the step that each is of.
        valid: (B, N) whether both are of one episode.
    """

    predicted: Tensor
    start: Tensor
    end: Tensor
    valid: Tensor


class JEPAWorldModel(
    ZooModel,
    repo_url="https://github.com/facebookresearch/eb_jepa",
    paper_url="https://arxiv.org/abs/2602.03604",
):
    """An action-conditioned JEPA that plans towards goal images.

    Args:
        spec: observations (one image, and an image "goal" like it or not) and actions (any kind).
        size: one of `SIZES`; single numbers below override it.
        latent, hidden, layers, heads: size D of a latent, width of the "mlp", depth and heads of
            the "transformer".
        horizon, block, iterations, candidates, elites: of the planner, see `zoo/planning.py`.
        encoder: "conv" (three convolutions), "impala", or "keypoints" (ours: where the channels of
            two convolutions look).
        predictor: "recurrent" (GRU), "mlp" (residual), or "transformer" (over frames).
        history: most frames that the transformer sees; the others see one.
        pixel_mean, pixel_std: by which pixels in [0, 1] are standardised, one for each channel; by
            default they are not.
        prevention: how collapse is prevented, one of `PREVENTION`: "vicreg", "sigreg", "ema" (the
            targets are latents of a slow copy of the encoder, without gradient), or "none", which
            collapses.
        variance, covariance, similarity, inverse_dynamics, sigreg: weights of the terms, in place
            of those of `prevention`; 0 leaves a term out.
        final_norm: whether a LayerNorm ends encoder and predictor; by default it does, except with
            "sigreg", which it would work against.
        ema_decay: of the slow copy, per update.
        rollout: steps that are predicted from predictions, after those from real latents.
        starts: rollouts begin at the "first" step of a sequence, or (ours; for predictors that see
            one frame) at "all" of them, which costs little beside the encoder.
        freeze_encoder: only the predictor learns, on the latents of an encoder that was trained
            before and is loaded by `--from` (as in V-JEPA 2-AC; there are no other losses then).
        lr, weight_decay: of AdamW.
        clip: largest norm of the gradient, of encoder and predictor each.
        warmup: updates until the learning rate is reached; linear.
        anneal: update at which a cosine has brought it to a hundredth; 0 keeps it.
        planner: "cem" or "mppi" (box actions only).
        replan: actions of a plan that are executed before the next one is made.
        init_std: of the planner's first actions, in half boxes.
        temperature: of MPPI, in units of the cost.
        cost: the squared distance to the goal of all predicted latents ("sum") or of the last one
            ("last").
    """

    name: ClassVar[str] = "jepa-wm"
    goal_key: ClassVar[str] = "goal"
    collapse_remedy: ClassVar[str] = (
        "set prevention to vicreg or sigreg, or raise the weights of its terms (variance, "
        "inverse_dynamics)"
    )

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "paper",
        latent: int | None = None,
        hidden: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        horizon: int | None = None,
        block: int | None = None,
        iterations: int | None = None,
        candidates: int | None = None,
        elites: int | None = None,
        encoder: Literal["conv", "impala", "keypoints"] = "impala",
        predictor: Literal["recurrent", "mlp", "transformer"] = "recurrent",
        history: int = 3,
        pixel_mean: Sequence[float] = (),
        pixel_std: Sequence[float] = (),
        prevention: Literal["vicreg", "sigreg", "ema", "none"] = "vicreg",
        variance: float | None = None,
        covariance: float | None = None,
        similarity: float | None = None,
        inverse_dynamics: float | None = None,
        sigreg: float | None = None,
        final_norm: bool | None = None,
        ema_decay: float = 0.99,
        rollout: int = 8,
        starts: Literal["first", "all"] = "first",
        freeze_encoder: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        clip: float = 2.0,
        warmup: int = 0,
        anneal: int = 0,
        planner: Literal["cem", "mppi"] = "cem",
        replan: int = 1,
        init_std: float = 0.6,
        temperature: float = 0.1,
        cost: Literal["sum", "last"] = "sum",
    ) -> None:
        super().__init__(spec)
        name = "JEPAWorldModel"
        self.keep_hyperparameters({k: v for k, v in locals().items() if k != "name"})
        given = {"latent": latent, "hidden": hidden, "layers": layers, "heads": heads}
        given |= {"horizon": horizon, "block": block, "iterations": iterations}
        given |= {"candidates": candidates, "elites": elites}
        w = choose_widths(name, SIZES, size, given)
        reject_unknown(name, ENCODERS, encoder=encoder)
        reject_unknown(name, PREDICTORS, predictor=predictor)
        reject_unknown(name, PREVENTION, prevention=prevention)
        reject_unknown(name, ("cem", "mppi"), planner=planner)
        reject_unknown(name, ("sum", "last"), cost=cost)
        reject_unknown(name, ("first", "all"), starts=starts)
        if starts == "all" and predictor == "transformer":
            raise UserError(
                f"{name}: starts=all needs a predictor that sees one frame: set predictor to "
                "recurrent or mlp, or starts to first"
            )
        if planner == "mppi" and self.spec.action.kind != "box":
            raise UserError(
                f"{name}: planner=mppi searches box actions only, and the data has "
                f"{self.spec.action.kind} ones: set planner=cem"
            )
        if 0 < anneal <= warmup:
            raise UserError(f"{name} needs anneal above warmup ({warmup}) or 0, got {anneal}")
        reject_unless_positive(name, lr=lr, clip=clip, rollout=rollout, history=history)
        reject_outside(name, 0, math.inf, weight_decay=weight_decay, warmup=warmup, anneal=anneal)
        reject_outside(name, 0, 1, ema_decay=ema_decay)
        reject_outside(name, 1, w["horizon"], replan=replan)
        if predictor == "transformer" and w["latent"] % w["heads"]:
            raise UserError(
                f"{name}: a latent of {w['latent']} is not divisible by {w['heads']} heads"
            )
        self.image, self.replan = self._image(), replan
        self.rollout, self.starts, self.ema_decay = rollout, starts, ema_decay
        self.lr, self.weight_decay, self.clip = lr, weight_decay, clip
        self.warmup, self.anneal = warmup, anneal
        terms: dict[str, float | None] = {"variance": variance, "covariance": covariance}
        terms |= {"similarity": similarity, "inverse_dynamics": inverse_dynamics, "sigreg": sigreg}
        usual = PREVENTION[prevention]
        weights = {k: usual.get(k, 0.0) if v is None else v for k, v in terms.items()}
        reject_outside(name, 0, math.inf, **weights)
        self.loss_scales = {"prediction": 1.0} | {k: v for k, v in weights.items() if v}

        self.actions = ActionCodec(self.spec.action)
        action_size = self.spec.action.encoded_size
        height, width, channels = self.spec.obs[self.image].shape
        self.latent = w["latent"]
        shape = (height, width, channels)
        self.encoder: nn.Module = Encoder(encoder, shape, self.latent, pixel_mean, pixel_std)
        normed = prevention != "sigreg" if final_norm is None else final_norm
        self.norm: nn.Module = nn.LayerNorm(self.latent) if normed else nn.Identity()
        self.predictor: nn.Module
        if predictor == "recurrent":
            self.predictor = RecurrentPredictor(self.latent, action_size)
        elif predictor == "mlp":
            self.predictor = ResidualPredictor(self.latent, action_size, w["hidden"])
        else:
            self.predictor = TransformerPredictor(
                self.latent, action_size, w["layers"], w["heads"], history
            )
        self.history = int(self.predictor.history)
        if "inverse_dynamics" in self.loss_scales:
            self.inverse = InverseDynamics(self.latent, action_size)
        self.register_module("target", None)
        if prevention == "ema":
            slow = nn.Sequential(self.encoder, self.norm)
            self.target = copy.deepcopy(slow).requires_grad_(False)
        if freeze_encoder:
            learnt: list[nn.Module] = [self.encoder, self.norm]
            learnt += [self.inverse] if "inverse_dynamics" in self.loss_scales else []
            nn.ModuleList(learnt).requires_grad_(False)
            self.loss_scales = {"prediction": 1.0}

        search = {k: w[k] for k in ("horizon", "block", "iterations", "candidates", "elites")}
        if planner == "mppi":
            self.planner: CEM = MPPI(**search, init_std=init_std, temperature=temperature)
        else:
            self.planner = CEM(**search, init_std=init_std)
        self.score = predicted_return if cost == "sum" else last_reward

    def _image(self) -> str:
        """The key of the image; everything else must be the goal."""
        name, obs = "JEPAWorldModel", self.spec.obs
        images = [key for key in self.spec.images if key != self.goal_key]
        others = [key for key in obs if key not in (*images, self.goal_key)]
        if len(images) != 1 or others:
            raise UserError(
                f"{name} reads one image, and the observations are {', '.join(obs)}: leave out the "
                "others (`observations` of OfflineDataModule, or a wrapper of the environment)"
            )
        if self.goal_key in obs and obs[self.goal_key] != obs[images[0]]:
            raise UserError(
                f"{name} needs a goal like the image, of shape {obs[images[0]].shape}, and "
                f"'{self.goal_key}' has {obs[self.goal_key].shape}"
            )
        return images[0]

    # Training

    def prepare_batch(self, data: Any) -> Portion:
        """Only the image is learnt from."""
        return Portion(observations=(self.image,))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predicts latents along sequences (B, T), and regularises them."""
        image = batch["obs"][self.image]
        if image.shape[1] < 2 or "action" not in batch:
            raise UserError(
                "jepa-wm learns what actions lead to, from sequences of at least 2 steps with "
                f"their actions; a batch has {image.shape[1]} steps and {sorted(batch)}: set "
                "--data.sequence_length, and read the data by OfflineDataModule"
            )
        latents = self.embed(image).float()
        action, is_first = self.actions.encode(batch["action"]), batch["is_first"]
        targets = latents if self.target is None else self.target(image).float()
        rollouts = self.rollouts(latents, action, is_first)
        error = (rollouts.predicted - targets[:, rollouts.end]).square().mean(-1)
        losses = {"prediction": masked_mean(error, rollouts.valid)}
        losses |= self.regularize(latents, action, ~is_first[:, 1:])
        if self.logs_now:
            self.log_metrics(self._metrics(latents, targets, rollouts, losses["prediction"]))
        return self.total_loss(losses, self.loss_scales)

    def embed(self, image: Tensor) -> Tensor:
        """Latents (..., D) of images (..., H, W, C)."""
        out: Tensor = self.norm(self.encoder(image))
        return out

    def predict(self, latents: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """The next latent (N, D) of a window; see `predictor.py`."""
        out: Tensor = self.norm(self.predictor(latents, actions, valid))
        return out

    def rollouts(self, latents: Tensor, action: Tensor, is_first: Tensor) -> Rollouts:
        """All that is predicted of sequences; arguments as for `unroll`."""
        last = latents.shape[1] - 1
        t = torch.arange(last + 1, device=latents.device)
        if self.starts == "first":
            predicted = self.unroll(latents, action, is_first).float()
            before = t[: predicted.shape[1]]
            begin = (is_first[:, before] * before).cummax(1).values  # of the episode
            start = torch.maximum(begin, before.clamp(max=self.history - 1))
            return Rollouts(predicted, start, before + 1, ~is_first[:, before + 1])
        episode = is_first.long().cumsum(1)
        current, rows = latents[:, :-1], len(latents)
        parts = []
        for steps in range(1, min(self.rollout, last) + 1):
            start, end = t[: last + 1 - steps], t[steps:]
            frames = current[:, start].flatten(0, 1).unsqueeze(1)
            chosen = action[:, end - 1].flatten(0, 1).unsqueeze(1)
            valid = torch.ones_like(chosen[..., 0], dtype=torch.bool)
            current = self.predict(frames, chosen, valid).unflatten(0, (rows, -1))
            same = episode[:, start] == episode[:, end]
            parts.append(Rollouts(current.float(), start.expand(rows, -1), end, same))
        return Rollouts(
            torch.cat([part.predicted for part in parts], 1),
            torch.cat([part.start for part in parts], 1),
            torch.cat([part.end for part in parts]),
            torch.cat([part.valid for part in parts], 1),
        )

    def unroll(self, latents: Tensor, action: Tensor, is_first: Tensor) -> Tensor:
        """Predicted latents (B, S, D) of steps 1 to S, S = min(T - 1, h - 1 + rollout).

        The first h (`history` of the predictor) steps are predicted from real latents, the others
        from predictions. Where an episode begins, its first latent is real again.

        Args:
            latents: (B, T, D) real ones.
            action: (B, T, A) encoded.
            is_first: (B, T).
        """
        steps = min(latents.shape[1] - 1, self.history - 1 + self.rollout)
        episode = is_first.long().cumsum(1)
        seen: list[Tensor] = []
        predicted: list[Tensor] = []
        for t in range(steps):
            if t < self.history:
                seen.append(latents[:, t])
            else:
                seen.append(torch.where(is_first[:, t, None], latents[:, t], predicted[-1]))
            window = slice(max(0, t + 1 - self.history), t + 1)
            valid = episode[:, window] == episode[:, t, None]
            frames = torch.stack(seen[window], 1)
            predicted.append(self.predict(frames, action[:, window], valid))
        return torch.stack(predicted, 1)

    def regularize(self, latents: Tensor, action: Tensor, goes_on: Tensor) -> dict[str, Tensor]:
        """The terms that have a weight, of latents (B, T, D), float32.

        Args:
            latents: (B, T, D).
            action: (B, T, A) encoded.
            goes_on: (B, T - 1), whether a step and the next are of one episode.
        """
        losses: dict[str, Tensor] = {}
        if {"variance", "covariance", "sigreg"} & self.loss_scales.keys():
            rows = gather_ranks(latents.flatten(0, 1))
        if "variance" in self.loss_scales:
            losses["variance"] = variance_loss(rows)
        if "covariance" in self.loss_scales:
            losses["covariance"] = covariance_loss(rows)
        if "sigreg" in self.loss_scales:
            losses["sigreg"] = sigreg_loss(rows, seed=self.updates)
        if "similarity" in self.loss_scales:
            losses["similarity"] = similarity_loss(latents, goes_on)
        if "inverse_dynamics" in self.loss_scales:
            raw = self.inverse(torch.cat([latents[:, :-1], latents[:, 1:]], -1)).float()
            if self.spec.action.kind == "box":
                error = F.mse_loss(raw, action[:, :-1], reduction="none").mean(-1)
            else:
                error = -Categorical(raw, self.spec.action.nvec).log_prob(action[:, :-1])
            losses["inverse_dynamics"] = masked_mean(error, goes_on)
        return losses

    @torch.no_grad()
    def _metrics(
        self, latents: Tensor, targets: Tensor, rollouts: Rollouts, prediction: Tensor
    ) -> dict[str, Tensor]:
        """Whether latents collapse, and whether predicting is better than copying.

        What is copied is the newest real latent that the prediction knows of.
        """
        copied = latents.take_along_dim(rollouts.start.unsqueeze(-1), 1)
        error = (copied - targets[:, rollouts.end]).square().mean(-1)
        copy_loss = masked_mean(error, rollouts.valid)
        std = latents.flatten(0, 1).std(0)
        return {
            "feature_std": std.mean(),
            "feature_std_min": std.min(),
            "copy_ratio": prediction / copy_loss.clamp(min=1e-12),
        }

    def after_update(self) -> None:
        """Moves the slow copy of the encoder, if there is one."""
        if self.target is not None:
            follow(self.target, nn.Sequential(self.encoder, self.norm), 1 - self.ema_decay)

    def configure_optimizers(self) -> Any:
        """AdamW, with a warm-up and, if asked for, a cosine."""
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW(learning, self.lr, weight_decay=self.weight_decay, foreach=True)
        rate = LambdaLR(optimizer, lambda step: schedule(step, self.warmup, self.anneal))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient's norm, unless the trainer has a setting of its own."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for part in (nn.ModuleList([self.encoder, self.norm]), self.predictor):
            nn.utils.clip_grad_norm_(part.parameters(), self.clip)

    # Acting

    @torch.no_grad()
    def initial_state(self, batch_size: int) -> State:
        """No frames, and no plan: `left` counts what is still to be executed of it."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=self.device)

        action = self.spec.action.encoded_size
        return {
            "latents": zeros(self.history, self.latent),
            "actions": zeros(self.history, action),
            "length": zeros(dtype=torch.int64),
            "plan": zeros(self.planner.horizon, action),
            "left": zeros(dtype=torch.int64),
        }

    @torch.no_grad()
    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Plans towards the image `goal`, or goes on with its plan; exploring is random.

        Raises:
            UserError: observations without a goal.
        """
        state = {**state, **self._append(state, self.embed(obs[self.image]).float())}
        if explore:
            encoded = random_like(state["actions"][:, -1], self.spec.action)
        else:
            state |= self._follow_plan(obs, state)
            encoded = state["plan"][:, 0]
        action = self.actions.decode(encoded)
        state["actions"] = self._chosen(state["actions"], self.actions.encode(action))
        return action, state

    def _follow_plan(self, obs: Obs, state: State) -> State:
        """The plan, its first action due: what is left of the last one, or (at its end) another."""
        if self.goal_key not in obs:
            raise UserError(
                f"{self.name} plans towards a goal image, and the observations have no "
                f"'{self.goal_key}': ask the environment for one (zoo/TwoRooms-v0: "
                "--data.env_kwargs.goal_in_obs true)"
            )
        previous, left = state["plan"], state["left"] - 1
        plan = torch.cat([previous[:, 1:], torch.zeros_like(previous[:, :1])], 1)
        rows = torch.nonzero(left < 0).flatten()
        if len(rows):
            part = {key: state[key][rows] for key in ("latents", "actions", "length")}
            part["goal"] = self._goal(obs[self.goal_key][rows])
            plan[rows] = self._plan(part, previous[rows]).mean
            left[rows] = self.replan - 1
        return {"plan": plan, "left": left}

    def _goal(self, image: Tensor) -> Tensor:
        """Latents (..., D) of goals, as the predictor would predict them."""
        goal: Tensor = self.embed(image) if self.target is None else self.target(image)
        return goal.float()

    def _plan(self, state: State, previous: Tensor | None = None) -> Plan:
        return self.planner.plan(self, state, self.actions, previous, self.score)

    def _append(self, state: State, latent: Tensor) -> State:
        """The window of frames with a new one, whose action is not chosen yet."""
        empty = torch.zeros_like(state["actions"][:, :1])
        return {
            "latents": torch.cat([state["latents"][:, 1:], latent.unsqueeze(1)], 1),
            "actions": torch.cat([state["actions"][:, 1:], empty], 1),
            "length": (state["length"] + 1).clamp(max=self.history),
        }

    @staticmethod
    def _chosen(actions: Tensor, encoded: Tensor) -> Tensor:
        """The window's actions (N, h, A) with the newest frame's."""
        return torch.cat([actions[:, :-1], encoded.unsqueeze(1)], 1)

    # Dreaming

    @torch.no_grad()
    def encode(self, obs: Obs) -> Tensor:
        """Latents (B, T, D)."""
        return self.embed(obs[self.image])

    @torch.no_grad()
    def encode_before(self, obs: Obs) -> Tensor:
        """What the final norm gets, (B, T, D)."""
        out: Tensor = self.encoder(obs[self.image])
        return out

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """Windows of the latents up to each step, and the goal's latent where there is a goal."""
        latents = self.encode(batch["obs"]).float()
        action = self.actions.encode(batch["action"])
        t = torch.arange(latents.shape[1], device=latents.device)
        window = (t[:, None] + torch.arange(1 - self.history, 1, device=t.device)).clamp(min=0)
        begin = (batch["is_first"] * t).cummax(1).values
        actions = action[:, window]
        actions[:, :, -1] = 0  # not chosen yet
        state = {
            "latents": latents[:, window],
            "actions": actions,
            "length": (t - begin + 1).clamp(max=self.history),
        }
        if self.goal_key in batch["obs"]:
            state["goal"] = self._goal(batch["obs"][self.goal_key])
        return state

    @torch.no_grad()
    def imagine(
        self, state: State, actions: Tensor | Callable[[State], Tensor] | None, horizon: int
    ) -> Imagined:
        """Predicts with given actions, another policy, or plans.

        The reward is minus the mean squared difference of predicted latent and goal's, or 0 without
        a goal. Nothing tells whether the task goes on: it always does.

        Raises:
            UserError: it is to plan without a goal.
        """
        reject_plan(self.name, actions, horizon)
        current = {key: state[key] for key in ("latents", "actions", "length")}
        goal = {"goal": state["goal"]} if "goal" in state else {}
        place = torch.arange(self.history, 0, -1, device=self.device)
        states, taken = [], []
        for t in range(horizon):
            if actions is None:
                if not goal:
                    raise UserError(f"{self.name} plans towards a goal, and the state has none")
                action = self._plan({**current, **goal}).action[:, 0]
            else:
                action = actions(current | goal) if callable(actions) else actions[:, t]
            taken.append(action)
            window = self._chosen(current["actions"], self.actions.encode(action))
            valid = place <= current["length"].unsqueeze(1)
            latent = self.predict(current["latents"], window, valid).float()
            current = self._append({**current, "actions": window}, latent)
            states.append(current)
        future = {key: torch.stack([s[key] for s in states], 1) for key in current}
        reward = torch.zeros_like(future["length"], dtype=torch.float32)
        if goal:
            future["goal"] = goal["goal"].unsqueeze(1).expand(-1, horizon, -1)
            reward = -(future["latents"][:, :, -1] - future["goal"]).square().mean(-1)
        return Imagined(reward, torch.ones_like(reward), future, torch.stack(taken, 1))


def schedule(step: int, warmup: int, anneal: int) -> float:
    """Factor of the learning rate of the update after `step`: linear, then constant or a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if not anneal:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, anneal - warmup))
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * progress))
