"""World Models (Ha & Schmidhuber, "Recurrent World Models Facilitate Policy Evolution", 2018).

One training goes through the stages of the paper, counted in updates:

1. collect: random episodes, by the datamodule;
2. V: `vision_updates` updates of the VAE; then every replayed frame is encoded once;
3. M: `memory_updates` updates of the recurrent mixture density network on the codes;
4. C: `generations` generations of CMA-ES, one for each update, in the dream or in reality;

and with `rounds` above 1 over again, on new episodes of the controller (the paper's iterative
procedure, section 5). This file is the method from top to bottom; its deviations from the official
code are listed in README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

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
from zoo.nets.actions import add_noise, random_like
from zoo.nets.ranks import zero_of
from zoo.world_models.controller import Actions, Controller
from zoo.world_models.dreams import Dreamer
from zoo.world_models.generations import Generations
from zoo.world_models.memory import Memory
from zoo.world_models.statistics import Moments, Range
from zoo.world_models.vision import Code, Vision

# `nano` is ours, for CPUs.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"latent": 16, "depth": 8, "hidden": 64},
    "car-racing": {"latent": 32, "depth": 32, "hidden": 256},
    "take-cover": {"latent": 64, "depth": 32, "hidden": 512},
}
FEATURES = {"zh": ("z", "h"), "zch": ("z", "c", "h")}
STAGES = ("vision", "memory", "controller")


class Clock(NamedTuple):
    """Where a training is: the round, the stage in it, and the update in that stage."""

    round: int
    stage: str
    update: int


class WorldModels(
    ZooModel,
    repo_url="https://github.com/hardmaru/WorldModelsExperiments",
    paper_url="https://arxiv.org/abs/1803.10122",
):
    """World Models.

    Args:
        spec: observations (64x64 images and vectors in any mix) and actions (any kind).
        size: one of `SIZES`; single widths below override it.
        latent, depth, hidden: length of the image's code, channels of the VAE's first convolution,
            units of the LSTM.
        vector_latent: length of the code of a small VAE for vectors; 0 takes the standardised
            vectors as their own code.
        kl_tolerance: nats of each variable of z that V may use at no cost.
        mixtures: normals for each variable of z; 0 makes M predict points, without a spread.
        delta: M predicts the step of z in units of its standard deviation (ours).
        restart_input: M reads whether the episode begins here (as for Doom).
        min_log_sigma, max_log_sigma: bounds of the log-deviations of M; none in the paper.
        step_reward: what each dreamed step earns (as for Doom); None has M learn it (ours).
        predict_done: M learns where the task ends (as for Doom); otherwise dreams do not end.
        head_units: hidden layer of the heads for reward and end, which then see the next z, too
            (ours); 0 makes them linear in h.
        done_weight: weight of the steps at which the task ends in the loss of that head.
        done_scale: weight of that loss beside M's others.
        halt_outside: dreams also end where z leaves the range of the data by more than this share
            of it (ours): what M says there is made up, and controllers that go there fail in
            reality. None lets dreams go on, as published.
        done_threshold: dreams end where M finds the end more likely than not (as published),
            rather than with the probability it says.
        features: what C sees: "zh", or "zch" (as for Doom).
        action_map: how C's raw outputs become actions, one of `controller.ACTION_MAPS`.
        action_order: for `action_map="line"`, the discrete actions from left to right.
        controller_bias: whether C has biases.
        vision_updates, memory_updates, generations: length of the stages; a V without anything to
            learn has none.
        rounds: how often the stages are gone through; each has as many random episodes again, but
            from the second on the controller acts. After the last, C evolves on.
        vision_batch: frames in a batch for V; a batch for M is the datamodule's.
        vision_lr, memory_lr: learning rates of Adam.
        vision_decay, memory_decay: share of them that is left at the end of a stage; linear.
        clip: M's gradients are clipped to [-clip, clip], one by one.
        evolve_in: score controllers in the "dream" or in the "environment".
        population, rollouts: members of a generation, and episodes of each.
        horizon: most steps of an episode in which a controller is scored.
        sigma: initial step size of CMA-ES.
        weight_decay: the score loses so many times the mean square of C's parameters.
        diagonal: CMA-ES adapts variances only (ours).
        temperature: of the dreams in which C evolves; 1.15 was the paper's best for Doom.
        starts: most episodes whose first frames dreams start from.
        exploration: noise of the controller when it collects (see `nets.actions.add_noise`).
        gate_episodes: real episodes of each fixed policy by which dreams are checked before C
            evolves in them; 0 does not check.
    """

    name: ClassVar[str] = "world-models"
    replay_context: ClassVar[int] = 1
    has_evolved: Tensor

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "car-racing",
        latent: int | None = None,
        depth: int | None = None,
        hidden: int | None = None,
        vector_latent: int = 0,
        kl_tolerance: float = 0.5,
        mixtures: int = 5,
        delta: bool = False,
        restart_input: bool = False,
        min_log_sigma: float | None = None,
        max_log_sigma: float | None = None,
        step_reward: float | None = None,
        predict_done: bool = True,
        head_units: int = 0,
        done_weight: float = 10.0,
        done_scale: float = 1.0,
        done_threshold: bool = True,
        halt_outside: float | None = None,
        features: Literal["zh", "zch"] = "zh",
        action_map: Literal["general", "car-racing", "line"] = "general",
        action_order: list[int] | None = None,
        controller_bias: bool = True,
        vision_updates: int = 10_000,
        memory_updates: int = 4_000,
        generations: int = 200,
        rounds: int = 1,
        vision_batch: int = 100,
        vision_lr: float = 1e-4,
        vision_decay: float = 1.0,
        memory_lr: float = 1e-3,
        memory_decay: float = 1.0,
        clip: float = 1.0,
        evolve_in: Literal["dream", "environment"] = "dream",
        population: int = 64,
        rollouts: int = 16,
        horizon: int = 1000,
        sigma: float = 0.1,
        weight_decay: float = 0.01,
        diagonal: bool = False,
        temperature: float = 1.0,
        starts: int = 1000,
        exploration: float = 0.0,
        gate_episodes: int = 8,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        given = {"latent": latent, "depth": depth, "hidden": hidden}
        w = choose_widths("WorldModels", SIZES, size, given)
        reject_unknown("WorldModels", FEATURES, features=features)
        reject_unknown("WorldModels", ("dream", "environment"), evolve_in=evolve_in)
        reject_unless_positive(
            "WorldModels",
            memory_updates=memory_updates,
            generations=generations,
            rounds=rounds,
            vision_batch=vision_batch,
            vision_lr=vision_lr,
            memory_lr=memory_lr,
            clip=clip,
            rollouts=rollouts,
            horizon=horizon,
            sigma=sigma,
            temperature=temperature,
            starts=starts,
            done_weight=done_weight,
        )
        reject_outside("WorldModels", 0, math.inf, vision_updates=vision_updates, mixtures=mixtures)
        reject_outside("WorldModels", 0, math.inf, kl_tolerance=kl_tolerance)
        reject_outside("WorldModels", 0, math.inf, weight_decay=weight_decay)
        reject_outside("WorldModels", 0, math.inf, gate_episodes=gate_episodes)
        reject_outside("WorldModels", 0, 1, vision_decay=vision_decay, memory_decay=memory_decay)
        if population < 2:
            raise UserError(f"WorldModels needs population of at least 2, got {population}")
        self.kl_tolerance, self.done_scale = kl_tolerance, done_scale
        self.done_threshold, self.temperature = done_threshold, temperature
        self.rounds, self.vision_batch, self.clip = rounds, vision_batch, clip
        self.rates = {
            "vision": (vision_lr, vision_decay),
            "memory": (memory_lr, memory_decay),
        }
        self.evolve_in, self.population, self.rollouts = evolve_in, population, rollouts
        self.horizon, self.sigma, self.weight_decay = horizon, sigma, weight_decay
        self.diagonal, self.starts, self.exploration = diagonal, starts, exploration
        self.gate_episodes = gate_episodes
        self.feature_keys = FEATURES[features]

        self.vision = Vision(self.spec, w["latent"], w["depth"], vector_latent)
        order = None if action_order is None else tuple(action_order)
        self.actions = Actions(self.spec.action, action_map, order)
        self.memory = Memory(
            self.vision.size,
            self.actions.encoded_size,
            w["hidden"],
            mixtures=mixtures,
            delta=delta,
            restart=restart_input,
            min_log_sigma=-math.inf if min_log_sigma is None else min_log_sigma,
            max_log_sigma=math.inf if max_log_sigma is None else max_log_sigma,
            step_reward=step_reward,
            predict_done=predict_done,
            head_units=head_units,
            done_weight=done_weight,
            halt_outside=halt_outside,
        )
        widths = {"z": self.vision.size, "h": w["hidden"], "c": w["hidden"]}
        inputs = sum(widths[key] for key in self.feature_keys)
        self.controller = Controller(inputs, self.actions.raw_size, controller_bias)
        # Part of the weights, so that a loaded controller explores by itself.
        self.register_buffer("has_evolved", torch.tensor(False))
        self.stage_lengths = {
            "vision": vision_updates if self.vision.learns else 0,
            "memory": memory_updates,
            "controller": generations,
        }
        self.generations = Generations(self)
        self._encoded: int | None = None  # the round whose frames are encoded

    # Stages

    @property
    def clock(self) -> Clock:
        """The round and stage of the next update; after the last round C evolves on."""
        length = sum(self.stage_lengths.values())
        round_, update = divmod(self.updates, length)
        if round_ >= self.rounds:
            extra = self.updates - self.rounds * length
            return Clock(self.rounds - 1, "controller", self.stage_lengths["controller"] + extra)
        for stage in STAGES[:2]:
            if update < self.stage_lengths[stage]:
                return Clock(round_, stage, update)
            update -= self.stage_lengths[stage]
        return Clock(round_, "controller", update)

    @property
    def replay_round(self) -> int:
        """How often as many episodes as at first were asked for again."""
        return self.clock.round

    def prepare_batch(self, data: Any) -> Portion:
        """What the next update needs of the datamodule `data`, which is about to draw a batch.

        Where a stage begins, what it builds on is made here: codes of all frames for M, and starts
        of dreams for C. A run that is resumed there makes it again, and makes the same.
        """
        clock = self.clock
        if clock.stage != "controller":
            self.generations.starts = None
        if clock.stage == "vision":
            if clock == Clock(0, "vision", 0):
                self._fit_statistics(data)
            return Portion(rows=self.vision_batch, steps=1)
        vectors = tuple(self.vision.vectors)
        if clock.stage == "memory":
            if clock.update == 0 and self._encoded != clock.round:
                if self.stage_lengths["vision"] == 0 and clock.round == 0:
                    self._fit_statistics(data)
                self._encode_all(data)
                self._encoded = clock.round
            return Portion(observations=() if self.vision.images else vectors)
        self.generations.prepare(data)
        return Portion(rows=1, observations=() if self.vision.images else vectors)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update of V, of M, or one generation of C."""
        stage = self.clock.stage
        if stage == "vision":
            losses = self.vision.losses(batch["obs"], self.kl_tolerance)
            total = self.total_loss(losses, {"reconstruction": 1.0, "kl": 1.0})
        elif stage == "memory":
            z = self.code(batch).sample()
            losses = self.memory.losses(z, self.actions.encode(batch["action"]), batch)
            weights = {"mixture": 1.0, "reward": 1.0, "done": self.done_scale}
            total = self.total_loss(losses, {key: weights[key] for key in losses})
        else:
            data = getattr(self._trainer, "datamodule", None)
            metrics = self.generations.step(self.clock, batch, data)
            self.has_evolved.fill_(True)
            if self._trainer is not None and self._trainer.training:
                self._log_now(metrics)
            total = self.total_loss({}, {})
        idle = [getattr(self, name) for name in STAGES if name != stage or name == "controller"]
        return total + zero_of(idle)  # `on_before_optimizer_step` drops these gradients

    def _log_now(self, metrics: Mapping[str, float]) -> None:
        """Logs train/<name> now: there is one generation where there are hundreds of updates."""
        values = {f"train/{name}": value for name, value in metrics.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.updates)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves gradients only to the part that learns now, clips M's and sets the rates."""
        clock = self.clock
        for stage in STAGES:
            if stage != clock.stage or stage == "controller":
                for parameter in getattr(self, stage).parameters():
                    parameter.grad = None  # Adam skips it, momentum and all
        if clock.stage == "memory":
            nn.utils.clip_grad_value_(self.memory.parameters(), self.clip)
        for group in optimizer.param_groups:
            lr, decay = self.rates[group["name"]]
            if group["name"] == clock.stage:
                progress = clock.update / self.stage_lengths[clock.stage]
                group["lr"] = lr * (1 - (1 - decay) * progress)

    def configure_optimizers(self) -> Optimizer:
        """One Adam with a group for V and one for M; C does not learn by gradients."""
        parts = [("vision", self.vision), ("memory", self.memory)]
        return Adam(
            [
                {"params": list(part.parameters()), "lr": self.rates[name][0], "name": name}
                for name, part in parts
                if any(True for _ in part.parameters())
            ]
        )

    def _fit_statistics(self, data: Any) -> None:
        """Mean and deviation of the vectors, over the replays of all ranks."""
        keys = tuple(self.vision.vectors)
        if not keys:
            return
        moments = Moments(self.vision.standardize.mean.numel())
        for batch in data.sweep(4096, keys):
            moments.add(self.vision.flatten(batch["obs"])[0])
        mean, std = moments.mean_and_std(self.ranks, self.device)
        self.vision.standardize.mean.copy_(mean)
        self.vision.standardize.std.copy_(std)

    @torch.no_grad()
    def _encode_all(self, data: Any) -> None:
        """Encodes every replayed frame once; measures the range of z, its steps and the rewards."""
        moments = Moments(self.vision.size)
        codes, rewards = Range(self.vision.size), Range(1)
        for batch in data.sweep(256):
            here = self.transfer_batch_to_device(batch, self.device, 0)
            code = self.vision.encode(here["obs"])
            if self.vision.images:
                self.write_back(batch["step_id"], code._asdict())
            goes_on = ~here["is_first"][0]
            codes.add(code.mean[0])
            rewards.add(here["reward"][0, goes_on, None])
            moments.add(torch.diff(code.mean[0], dim=0)[goes_on[1:]])
        self.memory.bound(
            codes.low_and_high(self.ranks, self.device),
            rewards.low_and_high(self.ranks, self.device),
        )
        if self.clock.round == 0:  # later rounds go on with what M knows
            _, std = moments.mean_and_std(self.ranks, self.device)
            self.memory.scale.copy_(std)

    @property
    def ranks(self) -> int:
        """How many processes train together."""
        return self._trainer.world_size if self._trainer is not None else 1

    def code(self, batch: Batch) -> Code:
        """Codes (B, T, Z) of a batch: those that the replay keeps, or made now."""
        if batch.get("latents"):
            return Code(batch["latents"]["mean"], batch["latents"]["logvar"])
        with torch.no_grad():
            return self.vision.encode(batch["obs"])

    def features(self, state: State) -> Tensor:
        """What C sees (..., F) in states {key: (..., size)}."""
        return torch.cat([state[key] for key in self.feature_keys], -1)

    def dreamer(self, temperature: float | None = None) -> Dreamer:
        """Advances dreams of M, by default at the model's own temperature."""
        temperature = self.temperature if temperature is None else temperature
        return Dreamer(self.memory, temperature, self.done_threshold)

    # Policy

    def initial_state(self, batch_size: int) -> State:
        """M's empty memory before an episode."""
        zeros = self.memory.scale.new_zeros(batch_size, self.memory.hidden)
        code = self.memory.scale.new_zeros(batch_size, self.vision.size)
        first = torch.ones(batch_size, dtype=torch.bool, device=zeros.device)
        return {"h": zeros, "c": zeros, "first": first, "mean": code, "logvar": code}

    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Sees, chooses and remembers; explores at random before C has evolved."""
        return self.act_with(obs, state, self.controller, explore)

    @torch.no_grad()
    def act_with(
        self,
        obs: Obs,
        state: State,
        controller: Callable[[Tensor], Tensor],
        explore: bool = False,
    ) -> tuple[Tensor, State]:
        """The same with another map from features (B, F) to raw outputs (B, raw_size)."""
        code = self.vision.encode({key: value.unsqueeze(1) for key, value in obs.items()})
        code = Code(code.mean[:, 0], code.logvar[:, 0])
        known = {**state, "z": code.sample()}
        action = self.actions.choose(controller(self.features(known)))
        if explore:
            action = self._explore(action)
        h, c = self.memory.step(known, action)
        after = {"h": h, "c": c, "first": torch.zeros_like(state["first"])}
        return self.actions.decode(action), {**after, **code._asdict()}

    def _explore(self, encoded: Tensor) -> Tensor:
        """Noise on encoded actions (B, A), or random ones as long as C has not evolved."""
        codec, spec = self.actions.codec, self.spec.action
        plain = codec.encode(self.actions.decode(encoded))
        if self.has_evolved:
            plain = add_noise(plain, self.exploration, spec)
        else:
            plain = random_like(plain, spec)
        return self.actions.encode(codec.decode(plain))

    def latent_fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The code of each frame; none where there are only vectors, which are their own code."""
        shape = ((self.vision.size,), "float32")
        return {"mean": shape, "logvar": shape} if self.vision.images else {}

    def latents(self, state: State) -> dict[str, Tensor]:
        """The code that `act` saw."""
        return {key: state[key].float() for key in self.latent_fields()}

    # Dreaming

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """z of each step, and the memory h, c of the steps before it."""
        z = self.code(batch).sample()
        action = self.actions.encode(batch["action"])
        h = c = z.new_zeros(len(z), self.memory.hidden)
        steps = []
        for t in range(z.shape[1]):
            first = batch["is_first"][:, t]
            h, c = h * ~first[:, None], c * ~first[:, None]
            here = {"z": z[:, t], "h": h, "c": c, "first": first if t else torch.ones_like(first)}
            steps.append(here)
            h, c = self.memory.step(here, action[:, t])
        return {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}

    @torch.no_grad()
    def imagine(
        self,
        state: State,
        actions: Tensor | Callable[[State], Tensor] | None,
        horizon: int,
        temperature: float | None = None,
    ) -> Imagined:
        """Dreams with given actions, another policy, or C; by default at the own temperature."""
        reject_plan(self.name, actions, horizon)
        dreamer = self.dreamer(temperature)
        now = {key: state[key] for key in ("z", "h", "c", "first")}
        states, encoded, reward, cont = [], [], [], []
        for t in range(horizon):
            if actions is None:
                action = self.actions.choose(self.controller(self.features(now)))
            else:
                chosen = actions(now) if callable(actions) else actions[:, t]
                action = self.actions.encode(chosen)
            ahead = dreamer.step(now, action)
            now = {"z": ahead.z, "h": ahead.h, "c": ahead.c}
            now["first"] = torch.zeros_like(state["first"])
            states.append(now)
            encoded.append(action)
            reward.append(ahead.reward)
            cont.append(1 - ahead.done)
        return Imagined(
            torch.stack(reward, 1),
            torch.stack(cont, 1),
            {key: torch.stack([step[key] for step in states], 1) for key in now},
            self.actions.decode(torch.stack(encoded, 1)),
        )

    @torch.no_grad()
    def decode(self, state: State) -> dict[str, Tensor]:
        """V's pictures of states (N, H, ...)."""
        return self.vision.decode(state["z"])

    @torch.no_grad()
    def encode(self, obs: Obs) -> Tensor:
        """The means (B, T, Z) of the codes."""
        return self.vision.encode(obs).mean

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the evolution: its start and all scores."""
        super().on_save_checkpoint(checkpoint)
        told = self.generations.state_dict()
        if told is not None:
            checkpoint["evolution"] = told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the evolution until the next generation."""
        super().on_load_checkpoint(checkpoint)
        self.generations.load_state_dict(checkpoint.get("evolution"))
