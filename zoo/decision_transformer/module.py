"""Decision Transformer (Chen et al., "Reinforcement Learning via Sequence Modeling", 2021).

A trajectory is a sequence of returns-to-go, states and actions. A causal transformer learns by
supervision which action followed; asked for a return, it acts as trajectories did that got it.
This file is the method from top to bottom; its deviations from the official code are listed in
README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from datamodules.errors import UserError
from datamodules.spec import Spec
from zoo.arguments import choose_widths, reject_outside, reject_unknown, reject_unless_positive
from zoo.base import Batch, Obs, State, ZooModel
from zoo.decision_transformer.tokens import ContextTime, EpisodeTime, Interleaver, stack_frames
from zoo.nets.actions import ActionCodec
from zoo.nets.distributions import MSE, Categorical
from zoo.nets.transformer import INIT_STD, CausalTransformer, causal_mask

# `nano` is ours, for CPUs; the others are the paper's, appendix A.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 64, "layers": 2, "heads": 1},
    "gym": {"width": 128, "layers": 3, "heads": 1},
    "atari": {"width": 128, "layers": 6, "heads": 8},
}
VARIANTS = ("gym", "atari")


class DecisionTransformer(
    ZooModel,
    repo_url="https://github.com/kzl/decision-transformer",
    paper_url="https://arxiv.org/abs/2106.01345",
):
    """Decision Transformer, and behaviour cloning by the same transformer.

    Args:
        spec: observations (vectors, and images of at least 36x36 pixels, in any mix) and actions
            (any kind).
        size: one of `SIZES`; single widths below override it.
        width, layers, heads: of the transformer.
        context: K, the most steps that it sees at once; `sequence_length` of the data.
        variant: how tokens are embedded, see `tokens.py`: as for MuJoCo ("gym"; ReLU) or as for
            Atari ("atari"; GELU, and no weight decay for biases, norms and embeddings).
        condition_on_returns: whether there are tokens of returns; without them it clones behaviour.
        return_scale: returns are divided by it.
        target_return: the return to ask for, in units of the environment; None asks for the best
            one in the data.
        max_timestep: steps of the longest episode.
        frame_stack: successive images that are seen at once.
        dropout: everywhere in the transformer.
        sample_actions: draw discrete actions when not exploring, too (as for Atari), in place of
            the most likely ones.
        context_hop: by how many steps a context that is full is shortened when acting; 1 is always
            the last K steps as in the official code, but reads the whole context at each step.
            None is half of it.
        lr, weight_decay, betas: of AdamW.
        clip: largest norm of the gradient.
        warmup: updates until the learning rate is reached; linear.
        anneal: update at which a cosine has brought it to a tenth; 0 keeps it (Atari).
    """

    name: ClassVar[str] = "decision-transformer"
    replay_sampling: ClassVar[str] = "contexts"
    has_seen_data: Tensor
    best_return: Tensor

    def __init__(
        self,
        spec: Spec | Mapping[str, Any],
        size: str = "gym",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        context: int = 20,
        variant: Literal["gym", "atari"] = "gym",
        condition_on_returns: bool = True,
        return_scale: float = 1000.0,
        target_return: float | None = None,
        max_timestep: int = 1000,
        frame_stack: int = 1,
        dropout: float = 0.1,
        sample_actions: bool = False,
        context_hop: int | None = None,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 0.25,
        warmup: int = 10_000,
        anneal: int = 0,
    ) -> None:
        super().__init__(spec)
        self.keep_hyperparameters(locals())
        name = "DecisionTransformer"
        w = choose_widths(name, SIZES, size, {"width": width, "layers": layers, "heads": heads})
        reject_unknown(name, VARIANTS, variant=variant)
        reject_unless_positive(name, return_scale=return_scale, max_timestep=max_timestep)
        reject_unless_positive(name, frame_stack=frame_stack, lr=lr, clip=clip)
        reject_outside(name, 2, math.inf, context=context)
        reject_outside(name, 0, math.inf, weight_decay=weight_decay, warmup=warmup, anneal=anneal)
        reject_outside(name, 0, 1, dropout=dropout)
        hop = context // 2 if context_hop is None else context_hop
        reject_outside(name, 1, context - 1, context_hop=hop)
        if w["width"] % w["heads"]:
            raise UserError(
                f"{name}: a width of {w['width']} is not divisible by {w['heads']} heads"
            )
        if frame_stack > 1 and not self.spec.images:
            raise UserError(f"{name}: frame_stack={frame_stack} stacks images, and there are none")
        self.context, self.hop, self.max_timestep = context, hop, max_timestep
        self.frame_stack, self.return_scale = frame_stack, return_scale
        self.sample_actions = sample_actions
        self.lr, self.weight_decay, self.betas = lr, weight_decay, (betas[0], betas[1])
        self.clip, self.warmup, self.anneal = clip, warmup, anneal

        atari = variant == "atari"
        self.tokens = Interleaver(
            self.spec, w["width"], condition_on_returns, squash=atari, frames=frame_stack
        )
        self.kinds = self.tokens.kinds
        self.slots = self.kinds * context
        self.time: nn.Module
        if atari:
            self.time = ContextTime(w["width"], max_timestep, self.slots, self.kinds)
        else:
            self.time = EpisodeTime(w["width"], max_timestep)
        self.transformer = CausalTransformer(
            **w, dropout=dropout, activation="gelu" if atari else "relu"
        )
        self.actions = ActionCodec(self.spec.action)
        self.head = nn.Linear(w["width"], self.spec.action.encoded_size, bias=not atari)
        if atari:
            nn.init.normal_(self.head.weight, std=INIT_STD)
        self.undecayed = (nn.LayerNorm, nn.Embedding) if atari else ()
        # Part of the weights, which act without their data.
        self.register_buffer("has_seen_data", torch.tensor(False))
        self.register_buffer("best_return", torch.tensor(0.0))
        self._target_return: float | None = None
        if target_return is not None:
            self.target_return = target_return

    # Training

    def on_fit_start(self) -> None:
        """Checks the data, and keeps its statistics if these weights have seen none before."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            return
        if not hasattr(data, "returns"):
            raise UserError(
                f"decision-transformer learns from recorded data, and a {type(data).__name__} has "
                "none: use OfflineDataModule(source=...)"
            )
        if data.sequence_length != self.context:
            raise UserError(
                f"the data has contexts of {data.sequence_length} steps and the model acts on "
                f"{self.context}: set --data.sequence_length {self.context} or --model.context "
                f"{data.sequence_length}"
            )
        if data.sampling not in (None, "contexts"):
            raise UserError(
                f"decision-transformer learns from contexts with returns-to-go, and the data has "
                f"sampling={data.sampling}: leave --data.sampling out"
            )
        longest = int(data.episodes.lengths.max())
        if longest > self.max_timestep:
            raise UserError(
                f"{data.episodes.name} has an episode of {longest} steps, but max_timestep is "
                f"{self.max_timestep}: set --model.max_timestep {longest}"
            )
        self.best_return.copy_(data.returns.max())
        if self.has_seen_data:
            return  # a network goes on with the scale that it has learnt with
        if self.tokens.vectors:
            self.tokens.standardize(data.statistics)
        self.has_seen_data.fill_(True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuses episodes that are longer than the embedding of time, before they are on a GPU."""
        last = int(batch["timestep"].max())
        if last >= self.max_timestep:
            raise UserError(
                f"an episode of the data has a step {last} (from 0), but max_timestep is "
                f"{self.max_timestep}: set --model.max_timestep to the length of the longest one"
            )
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predicts the actions of a batch of contexts (B, K), from what came before each."""
        losses, metrics = self._losses(batch)
        if self.logs_now:
            self.log_metrics(metrics)
        return self.total_loss(losses, {"action": 1.0})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the same of episodes that are not trained on, as val/<name>."""
        losses, metrics = self._losses(batch)
        values = {f"val/{name}": value for name, value in {**losses, **metrics}.items()}
        self.log_dict(values, sync_dist=self.trainer.world_size > 1, batch_size=len(batch["mask"]))

    def _losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        valid, target = batch["mask"], self.actions.encode(batch["action"])
        output = self.predict(batch)
        if isinstance(output, MSE):
            error = output.loss(target) / target.shape[-1]
            return {"action": masked_mean(error, valid)}, {}
        right = (output.pred() * target).sum(-1) == len(output.nvec)
        losses = {"action": masked_mean(-output.log_prob(target), valid)}
        return losses, {"accuracy": masked_mean(right.float(), valid)}

    def predict(self, batch: Batch) -> MSE | Categorical:
        """Predicted actions (B, K, A), encoded, each from the token of its state.

        Args:
            batch: `obs`, `action`, `return_to_go`, `timestep` and `mask` of K steps.
        """
        valid, timestep = batch["mask"], batch["timestep"]
        if valid.shape[1] > self.context:
            raise UserError(
                f"a batch has contexts of {valid.shape[1]} steps, the model of {self.context}: set "
                f"--data.sequence_length {self.context}"
            )
        obs = batch["obs"]
        if self.tokens.images:
            first = valid.shape[1] - valid.sum(1)
            images = {k: stack_frames(obs[k], first, self.frame_stack) for k in self.tokens.images}
            obs = {**obs, **images}
        tokens = self.tokens(
            batch["return_to_go"] / self.return_scale,
            self.tokens.read_state(obs),
            self.actions.encode(batch["action"]),
        )
        # Places are counted from the first valid step, as when acting.
        slots = self.kinds * (valid.long().cumsum(1) - 1).clamp(min=0)
        kind = torch.arange(self.kinds, device=slots.device)
        slots = (slots[..., None] + kind).flatten(1)
        timestep, valid = (x.repeat_interleave(self.kinds, 1) for x in (timestep, valid))
        # The last action comes before nothing that is predicted.
        x = self.time(tokens[:, :-1], timestep[:, :-1], slots[:, :-1])
        mask = causal_mask(valid[:, :-1])
        return self._output(self.transformer(x, mask, slice(self.kinds - 2, None, self.kinds)))

    def _output(self, x: Tensor) -> MSE | Categorical:
        """Outputs of state tokens (..., D) to predicted actions (..., A)."""
        raw = self.head(x)
        if self.spec.action.kind == "box":
            return MSE(torch.tanh(raw), 1)
        return Categorical(raw, self.spec.action.nvec)

    def configure_optimizers(self) -> Any:
        """AdamW, with a warm-up and, if asked for, a cosine."""
        decayed, others = [], []
        for module in self.modules():
            for key, parameter in module.named_parameters(recurse=False):
                exempt = module is self.tokens.action or isinstance(module, self.undecayed)
                if self.undecayed and (exempt or key == "bias"):
                    others.append(parameter)
                else:
                    decayed.append(parameter)
        groups = [{"params": decayed}]
        if others:
            groups.append({"params": others, "weight_decay": 0.0})  # type: ignore[dict-item]
        optimizer = AdamW(groups, self.lr, self.betas, weight_decay=self.weight_decay, foreach=True)
        rate = LambdaLR(optimizer, lambda step: schedule(step, self.warmup, self.anneal))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient's norm, unless the trainer has a setting of its own."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.clip, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Acting

    @property
    def target_return(self) -> float | None:
        """The return that it tries to get; None if it clones behaviour."""
        if self.kinds == 2:
            return None
        return float(self.best_return) if self._target_return is None else self._target_return

    @target_return.setter
    def target_return(self, value: float) -> None:
        if self.kinds == 2:
            raise UserError(
                f"a target return of {value} means nothing to behaviour cloning "
                "(condition_on_returns=False): leave it out"
            )
        self._target_return = float(value)

    @torch.no_grad()
    def initial_state(self, batch_size: int) -> State:
        """An empty context."""
        size, device = (batch_size,), self.device
        state = {
            "cache": self.transformer.empty_cache(batch_size, self.slots, device),
            "tokens": torch.zeros(*size, self.slots, self.transformer.width, device=device),
            "action": torch.zeros(*size, self.spec.action.encoded_size, device=device),
            "return_to_go": torch.full(size, self.target_return or 0.0, device=device),
            "timestep": torch.zeros(size, dtype=torch.int64, device=device),
            "length": torch.zeros(size, dtype=torch.int64, device=device),
        }
        for key in self.tokens.images:
            shape = (*size, self.frame_stack, *self.spec.obs[key].shape)
            state[f"frames/{key}"] = torch.zeros(shape, dtype=torch.uint8, device=device)
        return state

    def rewarded(self, state: State, reward: Tensor) -> State:
        """The state once the last action has earned `reward` (B,): that is no more to be got."""
        return {**state, "return_to_go": state["return_to_go"] - reward}

    @torch.no_grad()
    def act(self, obs: Obs, state: State, *, explore: bool) -> tuple[Tensor, State]:
        """Actions for observations {key: (B, ...)}; those of a box have no noise.

        Reads the last action, the return-to-go and the state, and keeps keys and values of all
        tokens of the context. A context of K steps is shortened by `context_hop` before the next
        step comes, and what is left is read anew. So each action is exactly the one that a context
        of the last n steps gives, where K - context_hop < n <= K once K steps have been made.
        """
        state = self._shortened(state)
        timestep, length = state["timestep"], state["length"]
        frames = self._frames(obs, state)
        token = self.tokens.read_state({k: frames.get(k, v)[:, None] for k, v in obs.items()})
        returns = self.tokens.read_return(state["return_to_go"] / self.return_scale)
        new = torch.stack([self.tokens.read_action(state["action"]), *returns, token[:, 0]], 1)
        # The action before the first step does not exist: it gets the last place, that of the last
        # action, which nothing sees.
        kind = torch.arange(-1, self.kinds - 1, device=length.device)
        slots = (self.kinds * length[:, None] + kind) % self.slots
        tokens = state["tokens"].scatter(1, slots[..., None].expand_as(new), new)
        x = self.time(new, timestep[:, None] + kind.clamp(max=0), slots)
        x, cache = self.transformer.extend(x, state["cache"], slots, slice(-1, None))
        output = self._output(x[:, 0])
        if isinstance(output, Categorical) and (explore or self.sample_actions):
            encoded = output.sample()
        else:
            encoded = output.pred()
        after = {
            "cache": cache,
            "tokens": tokens,
            "action": encoded,
            "return_to_go": state["return_to_go"],
            "timestep": timestep + 1,
            "length": length + 1,
        }
        after |= {f"frames/{key}": value for key, value in frames.items()}
        return self.actions.decode(encoded), after

    def _frames(self, obs: Obs, state: State) -> dict[str, Tensor]:
        """The last images (B, frames, H, W, C) of each key; the first stands for those before."""
        frames = {}
        for key in self.tokens.images:
            now = obs[key][:, None]
            before = torch.cat([state[f"frames/{key}"][:, 1:], now], 1)
            begins = (state["timestep"] == 0).view(-1, 1, 1, 1, 1)
            frames[key] = torch.where(begins, now.expand_as(before), before)
        return frames

    def _shortened(self, state: State) -> State:
        """Drops the oldest `context_hop` steps of full contexts, and reads what is left anew."""
        rows = torch.nonzero(state["length"] == self.context).flatten()
        if not len(rows):
            return state
        kept = self.context - self.hop
        tokens = state["tokens"][rows].roll(-self.kinds * self.hop, 1)
        # All but the action after the last step, which comes with the next one.
        slots = torch.arange(self.kinds * kept - 1, device=rows.device).expand(len(rows), -1)
        timestep = state["timestep"][rows, None] - kept + slots // self.kinds
        x = self.time(tokens[:, : slots.shape[1]], timestep, slots)
        empty = self.transformer.empty_cache(len(rows), self.slots, rows.device)
        _, cache = self.transformer.extend(x, empty, slots, slice(0, 0))
        length = torch.full_like(rows, kept)
        changed = {"cache": cache, "tokens": tokens, "length": length}
        return {**state, **{k: state[k].index_copy(0, rows, v) for k, v in changed.items()}}


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the values (B, K) where `valid` (B, K); padding does not count."""
    return (values * valid).sum() / valid.sum()


def schedule(step: int, warmup: int, anneal: int) -> float:
    """Factor of the learning rate of the update after `step`: linear, then constant or a cosine.

    With `anneal`, half a cosine falls from the end of the warm-up to zero at that step, but the
    factor stays at a tenth (official Atari code).
    """
    if step < warmup:
        return (step + 1) / warmup
    if not anneal:
        return 1.0
    progress = (step - warmup) / max(1, anneal - warmup)
    return max(0.1, 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))
