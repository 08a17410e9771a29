"""What every model of the zoo is, and the small Protocols it may fulfil."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor
from torch.optim import Optimizer

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.runs import write_identity

State = dict[str, Tensor]
Obs = Mapping[str, Tensor]
Batch = Mapping[str, Any]


class Imagined(NamedTuple):
    """An imagined rollout of N starts over H actions.

    Attributes:
        reward: (N, H) predicted reward earned by each action.
        cont: (N, H) probability that the task goes on after each action, without discount.
        state: {key: (N, H, ...)} the state that each action leads to.
        action: (N, H) or (N, H, A) actions in the units of the environment.
    """

    reward: Tensor
    cont: Tensor
    state: State
    action: Tensor


@runtime_checkable
class Policy(Protocol):
    """Acts in an environment."""

    def initial_state(self, batch_size: int) -> State:
        """The state before an episode, {key: (B, ...)}."""

    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Chooses actions (B,) or (B, A), in environment units, for obs {key: (B, ...)}."""


@runtime_checkable
class ReturnConditioned(Protocol):
    """A policy that is asked for a return, and hears what it has earned.

    Attributes:
        target_return: undiscounted return of an episode to ask for; can be set. None if this
            one does not follow any.
    """

    target_return: float | None

    def rewarded(self, state: State, reward: Tensor) -> State:
        """The state {key: (B, ...)} once the last action has earned `reward` (B,).

        Whoever lets it act calls it before each `act`, with zeros at the start of an episode.
        """


@runtime_checkable
class GoalConditioned(Protocol):
    """A policy that acts towards a goal.

    Attributes:
        goal_key: under which observations have what the goal looks like, when it acts. Data to
            learn from need not have it.
    """

    goal_key: str


@runtime_checkable
class Imaginer(Protocol):
    """Filters real sequences and dreams on from them."""

    def observe(self, batch: Batch) -> State:
        """States {key: (B, T, ...)} after filtering the real sequences of a batch."""

    def imagine(
        self, state: State, actions: Tensor | Callable[[State], Tensor] | None, horizon: int
    ) -> Imagined:
        """Dreams `horizon` steps from states {key: (N, ...)}.

        `actions` are given (N, H, ...), or chosen by a function of the state, or (None) by the
        model's own policy; all in the units of the environment. A model whose dreams have a
        temperature takes it as a further keyword, `temperature`.

        Raises:
            UserError: no horizon above 0, or fewer actions than that.
        """

    def decode(self, state: State) -> dict[str, Tensor]:
        """Observations of states {key: (N, H, ...)}; images are float in [0, 1]."""


@runtime_checkable
class Encoder(Protocol):
    """Turns observations into features."""

    def encode(self, obs: Obs) -> Tensor:
        """Features (B, T, F) of obs {key: (B, T, ...)}."""


@runtime_checkable
class LatentActions(Protocol):
    """Finds actions in video."""

    num_latent_actions: int

    def infer_actions(self, video: Tensor) -> Tensor:
        """Latent actions (B, T - 1) between the frames of uint8 video (B, T, H, W, C)."""


@runtime_checkable
class ReplayLatents(Protocol):
    """Keeps latent states beside the observations in the replay, as contexts for training."""

    def latent_fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of one step of each latent."""

    def latents(self, state: State) -> dict[str, Tensor]:
        """What to store of a state {key: (B, ...)}."""


PROTOCOLS: tuple[type, ...] = (
    Policy,
    ReturnConditioned,
    GoalConditioned,
    Imaginer,
    Encoder,
    LatentActions,
    ReplayLatents,
)


def capabilities(model: type | object) -> list[str]:
    """Names of the Protocols that a model, or its class, fulfils."""
    target: Any = model
    names = []
    for protocol in PROTOCOLS:
        members = [m for m in vars(protocol) if not m.startswith("_")]
        members += list(getattr(protocol, "__annotations__", {}))
        if all(hasattr(target, m) for m in members):
            names.append(protocol.__name__)
    return names


class ZooModel(
    pl.LightningModule,
    PyTorchModelHubMixin,
    library_name="world-model-zoo",
    tags=["world-model", "reinforcement-learning"],
    pipeline_tag="reinforcement-learning",
    license="apache-2.0",
    coders={Spec: (lambda spec: spec.to_dict(), Spec.from_dict)},
):
    """A world model: a LightningModule built from a spec and keyword arguments.

    Attributes:
        name: its name in the registry.
        replay_context: how many extra steps it wants at the front of each training sequence.
        needs_actions: whether it cannot learn from video without actions.
        replay_sampling: how sequences are drawn: "windows" of a stream, "pieces" of episodes,
            "recent" (of an agent's episodes rather the newest), or (from recorded data) "contexts"
            with returns-to-go.
        spec: what it was built for.
        updates: optimizer steps taken.
        env_steps: frames its agent caused up to now (action repeat counts), over all ranks.
        last_losses: the named losses of the last training step, unweighted, detached.
    """

    name: ClassVar[str]
    needs_actions: ClassVar[bool] = True
    replay_context: ClassVar[int] = 0
    replay_sampling: ClassVar[str] = "windows"

    def __init__(self, spec: Spec | Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec if isinstance(spec, Spec) else Spec.from_dict(spec)
        if self.spec.action is None and self.needs_actions:
            raise UserError(
                f"{self.name} learns from actions, and the data has none: give it recordings with "
                "actions, or choose a model of video such as v-jepa"
            )
        self.updates = 0
        self._env_steps = 0
        self.last_losses: dict[str, Tensor] = {}

    def keep_hyperparameters(self, arguments: Mapping[str, Any]) -> None:
        """Records the constructor's arguments as plain data: checkpoints load weights-only."""
        plain = {k: v for k, v in arguments.items() if k not in ("self", "spec", "__class__")}
        self.save_hyperparameters({"spec": self.spec.to_dict(), **plain})

    @property
    def env_steps(self) -> int:
        """Frames caused up to now; the datamodule's count while one is attached."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if data is not None and getattr(data, "env_steps", None) is not None:
            self._env_steps = int(data.env_steps)
        return self._env_steps

    @property
    def logs_now(self) -> bool:
        """Whether this training step logs; metrics need not be computed otherwise."""
        if self._trainer is None or not self._trainer.training:
            return False
        # Lightning's own clock, which also counts updates of models with several optimizers once.
        trainer: Any = self._trainer
        batches = trainer.fit_loop.epoch_loop._batches_that_stepped
        return (batches + 1) % trainer.log_every_n_steps == 0

    def total_loss(self, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """Weighted sum of named losses, each logged as train/<name>.

        Raises:
            ValueError: a loss without a weight or a weight without a loss.
        """
        if losses.keys() != weights.keys():
            raise ValueError(
                f"losses {sorted(losses)} and loss weights {sorted(weights)} do not agree"
            )
        self.last_losses = {name: loss.detach() for name, loss in losses.items()}
        total = sum((losses[name] * weights[name] for name in losses), torch.zeros(()))
        if self.logs_now:
            self.log_metrics({**self.last_losses, "loss": total.detach()})
        return total

    def log_metrics(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Logs train/<name>; call it where `logs_now`."""
        values = {f"train/{name}": value for name, value in metrics.items()}
        self.log_dict(values, sync_dist=self.trainer.world_size > 1)

    def write_back(self, step_id: Tensor, latents: Mapping[str, Tensor]) -> None:
        """Hands fresh latents (B, T, ...) of replayed steps (B, T) to the datamodule's replay."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if data is not None and hasattr(data, "write_back"):
            data.write_back(step_id, latents)

    def after_update(self) -> None:
        """Called after each optimizer step; slow copies of networks move here."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Steps, counts the update, then calls `after_update`."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.updates += 1
        self.after_update()

    @property
    def identity(self) -> dict[str, str | int]:
        """What this is and how far it was trained: {"model", "updates", "env_steps"}."""
        return {"model": self.name, "updates": self.updates, "env_steps": self.env_steps}

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes the hub's files and `zoo.json`, by which `zoo.load` finds the class."""
        super()._save_pretrained(save_directory)
        write_identity(save_directory, self.identity)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the identity as "zoo"."""
        checkpoint["zoo"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counters."""
        counters = checkpoint.get("zoo", {})
        self.updates = int(counters.get("updates", 0))
        self._env_steps = int(counters.get("env_steps", 0))
