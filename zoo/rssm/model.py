"""What PlaNet and the three Dreamers share: filtering, predicting, acting, dreaming.

A subclass builds the parts (`encoder`, `rssm`, `decoder`, `reward_head`; a `continue_head` and an
`actor` where the paper has them) and writes its own `training_step` and `configure_optimizers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.spec import Spec
from zoo.arguments import reject_plan
from zoo.base import Batch, Imagined, Obs, State, ZooModel
from zoo.nets.actions import ActionCodec, random_like
from zoo.nets.averaging import follow
from zoo.nets.distributions import Latent, Policy
from zoo.rssm.dynamics import RSSM, features


class Filtered(NamedTuple):
    """A batch of sequences as the world model sees it, without the context step.

    Attributes:
        obs: {key: (B, T, ...)}.
        reward, is_first, is_last, is_terminal: (B, T).
        states: {"deter": (B, T, D), "stoch": (B, T, S, C)} filtered, with gradients.
        features: (B, T, F) of the states.
        posterior, prior: distributions of z with and without the observation of the step.
    """

    obs: dict[str, Tensor]
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    states: State
    features: Tensor
    posterior: Latent
    prior: Latent

    def starts(self, last: int = 0) -> State:
        """States of the last so many steps of each sequence (0: all) as (N, ...), detached."""
        return {k: v.detach()[:, -last:].flatten(0, 1) for k, v in self.states.items()}


class LatentModel(ZooModel):
    """A model that filters observations into latent states and predicts the future from them.

    Attributes:
        random_start: explore with random actions until the first update.
        discount: factor per step that the continue head's target contains.
        reward_unit: reward that counts as 1 inside of the model.
        averaged: averaged copies of encoder, RSSM and actor for greedy actions, or None.
        average_rate: of `averaged`, per update.
    """

    replay_context: ClassVar[int] = 1
    random_start: ClassVar[bool] = True
    encoder: nn.Module
    rssm: RSSM
    decoder: nn.Module
    reward_head: nn.Module
    continue_head: nn.Module | None
    actor: nn.Module | None
    averaged: nn.ModuleDict | None
    has_learnt: Tensor
    discount: float = 1.0
    reward_unit: float = 1.0

    def __init__(self, spec: Spec | Mapping[str, Any]) -> None:
        super().__init__(spec)
        self.actions = ActionCodec(self.spec.action)
        for optional in ("continue_head", "actor", "averaged"):
            self.register_module(optional, None)
        if self.random_start:  # part of the weights, so that a loaded policy acts at once
            self.register_buffer("has_learnt", torch.tensor(False))
        self.average_rate = 0.0

    def average_agent(self, rate: float) -> None:
        """From now on greedy actions come from averaged weights (our addition; 0: they do not).

        With few updates at a high learning rate the greedy policy wobbles from one update to the
        next; an exponential moving average of its weights does so less.
        """
        if rate:
            agent = {name: getattr(self, name) for name in ("encoder", "rssm", "actor")}
            self.averaged = copy.deepcopy(nn.ModuleDict(agent)).requires_grad_(False)
        self.average_rate = rate

    def after_update(self) -> None:
        """Moves the averaged agent, if there is one, towards the weights."""
        if self.random_start:
            self.has_learnt.fill_(True)
        if self.averaged is not None:
            for name, part in self.averaged.items():
                follow(part, getattr(self, name), self.average_rate)

    # Learning

    def filter(self, batch: Batch) -> Filtered:
        """Filters a training batch of T + 1 steps, of which the first is the context.

        The context gives the first previous action, and where the replay keeps latents the state
        from which the filter starts; new latents then go back to the replay. Otherwise it starts
        from zeros.
        """
        obs = self.preprocess({key: value[:, 1:] for key, value in batch["obs"].items()})
        previous_action = self.actions.encode(batch["action"][:, :-1])
        names = ("reward", "is_first", "is_last", "is_terminal")
        flags = {key: batch[key][:, 1:] for key in names}
        start = self.rssm.initial(len(previous_action))
        if "latents" in batch:
            stored = {key: value[:, 0] for key, value in batch["latents"].items()}
            stoch = self.rssm.latent.unpack(stored["stoch"])
            start = {"deter": stored["deter"], "stoch": stoch}
        tokens = self.encoder(obs)
        states, posterior = self.rssm.observe(start, tokens, previous_action, flags["is_first"])
        prior = self.rssm.prior(states["deter"])
        if isinstance(self, StoredLatents) and "step_id" in batch:
            self.write_back(batch["step_id"][:, 1:], self.latents(states))
        return Filtered(
            obs=obs,
            **flags,
            states=states,
            features=features(states),
            posterior=posterior,
            prior=prior,
        )

    def prediction_losses(self, seen: Filtered) -> dict[str, Tensor]:
        """Losses (B, T) of decoder, reward head and (if there is one) continue head."""
        reconstructions = self.decoder.losses(self.decoder(seen.features), seen.obs)  # type: ignore
        losses = {"reconstruction": torch.stack(list(reconstructions.values())).sum(0)}
        losses["reward"] = self.reward_head(seen.features).loss(self.transform(seen.reward))
        if self.continue_head is not None:
            target = (~seen.is_terminal).float() * self.discount
            losses["continue"] = self.continue_head(seen.features).loss(target)
        return losses

    def preprocess(self, obs: Obs) -> dict[str, Tensor]:
        """Observations as encoder and decoder see them."""
        return dict(obs)

    def transform(self, reward: Tensor) -> Tensor:
        """Rewards as the reward head learns them."""
        return reward / self.reward_unit

    def untransform(self, reward: Tensor) -> Tensor:
        """The inverse of `transform`."""
        return reward * self.reward_unit

    def parameter_groups(
        self, model_lr: float, actor_lr: float, critic_lr: float
    ) -> list[dict[str, Any]]:
        """Parameters of world model, actor and critic, each with its learning rate."""
        parts: dict[str, list[nn.Parameter]] = {"model": [], "actor": [], "critic": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                parts[part if part in parts else "model"].append(parameter)
        rates = (model_lr, actor_lr, critic_lr)
        return [{"params": p, "lr": lr} for p, lr in zip(parts.values(), rates, strict=True)]

    def latent_metrics(self, seen: Filtered) -> dict[str, Tensor]:
        """Entropies of prior and posterior in nats."""
        return {
            "prior_entropy": seen.prior.entropy().mean(),
            "posterior_entropy": seen.posterior.entropy().mean(),
        }

    # Policy

    def initial_state(self, batch_size: int) -> State:
        """Latents and previous action before an episode: zeros."""
        state = self.rssm.initial(batch_size)
        size = (batch_size, self.spec.action.encoded_size)
        return {**state, "action": state["deter"].new_zeros(size)}

    @torch.no_grad()
    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Filters one step and acts."""
        agent: Any = self if explore or self.averaged is None else self.averaged
        tokens = agent.encoder(self.preprocess({k: v.unsqueeze(1) for k, v in obs.items()}))
        is_first = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        states, _ = agent.rssm.observe(state, tokens, state["action"].unsqueeze(1), is_first)
        latent = {k: v[:, 0] for k, v in states.items()}
        # Counted updates are asked first: reading a buffer would wait for a GPU at every step.
        if explore and self.random_start and not (self.updates or self.has_learnt):
            action = random_like(state["action"], self.spec.action)
        else:
            action = self.choose(latent, agent.actor, explore)
        return self.actions.decode(action), {**latent, "action": action}

    def choose(self, latent: State, actor: nn.Module | None, explore: bool) -> Tensor:
        """Encoded action (B, A) in a state: a sample of the policy, or (greedy) its mode."""
        assert actor is not None
        policy = actor(features(latent))
        action: Tensor = policy.sample() if explore else policy.pred()
        return action

    def dream(self, starts: State, horizon: int) -> tuple[State, Tensor, list[Policy]]:
        """Imagines with the policy, for training.

        Args:
            starts: states (N, ...).
            horizon: number H of actions.

        Returns:
            The states (N, H + 1, ...) beginning with the start, the actions (N, H, A), and the H
            policies that they were drawn from, with gradients to the actor even where the dream
            has none; states are seen without gradient.
        """
        policies: list[Policy] = []

        def act(state: State, t: int) -> Tensor:
            assert self.actor is not None
            with torch.enable_grad():
                policies.append(self.actor(features(state).detach()))
            return policies[-1].sample()

        return *self.rssm.imagine(starts, act, horizon), policies

    # Dreaming

    @torch.no_grad()
    def observe(self, batch: Batch) -> State:
        """Filters whole sequences from an empty state."""
        action = self.actions.encode(batch["action"])
        previous = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
        start = self.rssm.initial(len(action))
        states, _ = self.rssm.observe(start, self.encode(batch["obs"]), previous, batch["is_first"])
        return states

    @torch.no_grad()
    def imagine(
        self,
        state: State,
        actions: Tensor | Callable[[State], Tensor] | None,
        horizon: int,
        sample: bool = True,
    ) -> Imagined:
        """Dreams with given actions, another policy, or its own; `sample` as in `RSSM.imagine`."""
        reject_plan(self.name, actions, horizon)

        def choose(current: State, t: int) -> Tensor:
            if actions is None:
                return self.choose(current, self.actor, explore=True)
            chosen = actions(current) if callable(actions) else actions[:, t]
            return self.actions.encode(chosen)

        start = {key: state[key] for key in ("deter", "stoch")}
        states, encoded = self.rssm.imagine(start, choose, horizon, sample)
        states = {key: value[:, 1:] for key, value in states.items()}
        inputs = features(states)
        reward = self.untransform(self.reward_head(inputs).pred())
        cont = torch.ones_like(reward)
        if self.continue_head is not None:
            cont = (self.continue_head(inputs).pred() / self.discount).clamp(max=1.0)
        return Imagined(reward, cont, states, self.actions.decode(encoded))

    @torch.no_grad()
    def decode(self, state: State) -> dict[str, Tensor]:
        """Predicted observations of states (N, H, ...)."""
        return {key: output.pred() for key, output in self.decoder(features(state)).items()}

    @torch.no_grad()
    def encode(self, obs: Obs) -> Tensor:
        """Tokens (B, T, E)."""
        tokens: Tensor = self.encoder(self.preprocess(obs))
        return tokens


class StoredLatents:
    """For `LatentModel`s whose replay keeps latents: sequences start from them, not from zeros."""

    rssm: RSSM

    def latent_fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """h as float32, and z as its kind stores it."""
        return {"deter": ((self.rssm.deter,), "float32"), "stoch": self.rssm.latent.field}

    def latents(self, state: State) -> dict[str, Tensor]:
        """What the replay keeps of states (..., D), (..., S, C)."""
        stoch = self.rssm.latent.pack(state["stoch"].detach())
        return {"deter": state["deter"].detach().float(), "stoch": stoch}
