"""M: an LSTM that predicts what V will see next, as a mixture of normals for each part of z.

Section 4.3 and appendix A.2 of the paper; `Mixture` is the mixture density network with its
temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from zoo.nets.heads import BinaryHead, ScalarHead
from zoo.nets.layers import RELU

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Mixture:
    """Independent mixtures of K normals, one for each of D variables.

    Args:
        logits: (..., K, D) unnormalised log-weights.
        mean: (..., K, D).
        log_sigma: (..., K, D) logarithms of the standard deviations.
    """

    def __init__(self, logits: Tensor, mean: Tensor, log_sigma: Tensor) -> None:
        self.logits, self.mean, self.log_sigma = logits, mean, log_sigma

    def pred(self) -> Tensor:
        """The mean (..., D)."""
        return (self.logits.softmax(-2) * self.mean).sum(-2)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (..., D) of each variable at x (..., D)."""
        distance = (x.unsqueeze(-2) - self.mean) * torch.exp(-self.log_sigma)
        density = -0.5 * distance.square() - self.log_sigma - _HALF_LOG_TWO_PI
        return torch.logsumexp(self.logits.log_softmax(-2) + density, -2)

    def loss(self, target: Tensor) -> Tensor:
        """Negative log-density (...), mean over the D variables, as in the official code."""
        return -self.log_prob(target).mean(-1)

    def sample(
        self, temperature: float = 1.0, choice: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A sample (..., D): weights softmax(logits / temperature), noise sqrt(temperature) times.

        Args:
            temperature: above 1 the future is less certain than M believes, below 1 more.
            choice: uniform in [0, 1), broadcast to (..., D): which normal.
            noise: standard normal, broadcast to (..., D).
        """
        one = self.mean[..., 0, :]
        choice = torch.rand_like(one) if choice is None else choice
        noise = torch.randn_like(one) if noise is None else noise
        weights = torch.softmax(self.logits / temperature, -2).cumsum(-2)
        # The last sum is 1 up to rounding, and never asked.
        which = (weights[..., :-1, :] <= choice.unsqueeze(-2)).sum(-2, keepdim=True)
        mean = self.mean.gather(-2, which).squeeze(-2)
        sigma = self.log_sigma.gather(-2, which).squeeze(-2).exp()
        return mean + sigma * (noise * math.sqrt(temperature))


class Point:
    """D variables of which only the mean is predicted: the loss is half the squared error."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def pred(self) -> Tensor:
        """The mean (..., D)."""
        return self.mean

    def loss(self, target: Tensor) -> Tensor:
        """Half the squared error (...), mean over the D variables."""
        return 0.5 * (target - self.mean).square().mean(-1)

    def sample(
        self, temperature: float = 1.0, choice: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The mean (..., D): there is no spread to draw from."""
        return self.mean


class Memory(nn.Module):
    """M: h and c of an LSTM, and heads on h.

    Args:
        latent: length Z of z.
        action: length A of an encoded action.
        hidden: units of the LSTM.
        mixtures: normals for each variable of z; 0 predicts z only as a point.
        delta: predict the step z' - z in units of its standard deviation rather than z'.
        restart: read, as one more input, whether the episode begins here (Doom, appendix A.2).
        min_log_sigma, max_log_sigma: bounds of the logarithms of the standard deviations.
        step_reward: what each dreamed step earns; None has a head that learns it.
        predict_done: have a head for the task's end; without it dreams never end.
        head_units: width of the hidden layer of these heads, which then see h and the next z;
            0 makes them linear maps of h, as in the paper.
        done_weight: weight of the steps at which the task ends in the loss of that head; it adds
            ln(done_weight) to the log-odds that the head learns.
        halt_outside: dreams end where z leaves the range [low, high] of the data by more than this
            share of it; None lets them go on.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    rewards: Tensor
    reward_head: ScalarHead | None
    done_head: BinaryHead | None

    def __init__(
        self,
        latent: int,
        action: int,
        hidden: int,
        mixtures: int = 5,
        delta: bool = False,
        restart: bool = False,
        min_log_sigma: float = -math.inf,
        max_log_sigma: float = math.inf,
        step_reward: float | None = None,
        predict_done: bool = True,
        head_units: int = 0,
        done_weight: float = 10.0,
        halt_outside: float | None = None,
    ) -> None:
        super().__init__()
        self.latent, self.hidden, self.mixtures = latent, hidden, mixtures
        self.delta, self.restart, self.done_weight = delta, restart, done_weight
        self.min_log_sigma, self.max_log_sigma = min_log_sigma, max_log_sigma
        self.step_reward = step_reward
        self.head_units, self.halt_outside = head_units, halt_outside
        # The input that is always 1 makes the one bias vector of the paper; torch has two.
        inputs = latent + action + restart + 1
        self.lstm = nn.LSTM(inputs, hidden, bias=False, batch_first=True)
        with torch.no_grad():
            self.weights[0][:, -1] = 0
            self.weights[0][hidden : 2 * hidden, -1] = 1  # remember at first
        self.out = nn.Linear(hidden, latent * max(1, 3 * mixtures))
        head_inputs = hidden + latent if head_units else hidden
        layers, units = (1, head_units) if head_units else (0, hidden)
        self.reward_head = (
            ScalarHead(head_inputs, layers, units, RELU) if step_reward is None else None
        )
        self.done_head = BinaryHead(head_inputs, layers, units, RELU) if predict_done else None
        self.register_buffer("scale", torch.ones(latent))
        self.register_buffer("low", torch.full((latent,), -1e6))
        self.register_buffer("high", torch.full((latent,), 1e6))
        self.register_buffer("rewards", torch.tensor([-1e6, 1e6]))

    def bound(self, codes: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor]) -> None:
        """Takes over the range of the data: least and most of z (Z,), and of rewards (1,)."""
        self.low.copy_(codes[0])
        self.high.copy_(codes[1])
        self.rewards.copy_(torch.cat(rewards))

    def forward(self, z: Tensor, action: Tensor, first: Tensor) -> Tensor:
        """h (B, T, H) after each step of sequences that start from zeros.

        Args:
            z: (B, T, Z).
            action: (B, T, A) encoded.
            first: (B, T) bool; where an episode begins, the LSTM starts from zeros again.
        """
        x = self.inputs(z, action, first)
        return self._packed(x, first) if x.is_cuda else self._unrolled(x, first)

    def _unrolled(self, x: Tensor, first: Tensor) -> Tensor:
        """One step after the other; on CPUs twice as fast as packed sequences."""
        weight_input, weight_hidden = self.weights
        keep = (~first).to(x.dtype).unsqueeze(-1).unbind(1)
        h = c = x.new_zeros(len(x), self.hidden)
        steps = []
        for gates, kept in zip(F.linear(x, weight_input).unbind(1), keep, strict=True):
            gates = torch.addmm(gates, h * kept, weight_hidden.t())
            i, f, g, o = gates.chunk(4, -1)
            c = torch.sigmoid(f) * (c * kept) + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            steps.append(h)
        return torch.stack(steps, 1)

    def _packed(self, x: Tensor, first: Tensor) -> Tensor:
        """One call, in which each stretch of an episode is a sequence of its own."""
        begins = first.clone()
        begins[:, 0] = True
        at = torch.nonzero(begins.flatten()).flatten()
        lengths = torch.diff(at, append=at.new_tensor([first.numel()])).tolist()
        packed = pack_sequence(list(x.flatten(0, 1).split(lengths)), enforce_sorted=False)
        h = torch.cat(unpack_sequence(self.lstm(packed)[0]))
        return h.unflatten(0, first.shape)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The LSTM's weights for its inputs (4H, I) and for h (4H, H)."""
        return cast(Tensor, self.lstm.weight_ih_l0), cast(Tensor, self.lstm.weight_hh_l0)

    def step(self, state: Mapping[str, Tensor], action: Tensor) -> tuple[Tensor, Tensor]:
        """The next h and c (N, H) of states {"z", "h", "c", "first"} and encoded actions (N, A)."""
        x = self.inputs(state["z"], action, state["first"])
        h, c = torch.lstm_cell(x, (state["h"], state["c"]), *self.weights)
        return h, c

    def predict(self, h: Tensor) -> Mixture | Point:
        """What the next z will be, in the units of `target`, of h (..., H)."""
        out = self.out(h).float()
        if not self.mixtures:
            return Point(out)
        logits, mean, log_sigma = out.unflatten(-1, (3, self.mixtures, self.latent)).unbind(-3)
        return Mixture(logits, mean, log_sigma.clamp(self.min_log_sigma, self.max_log_sigma))

    def target(self, z: Tensor, following: Tensor) -> Tensor:
        """What is predicted of the z that follows: itself, or the step to it."""
        return (following - z) / self.scale if self.delta else following

    def following(self, z: Tensor, target: Tensor) -> Tensor:
        """The next z; the inverse of `target`."""
        return z + target * self.scale if self.delta else target

    def head_inputs(self, h: Tensor, following: Tensor) -> Tensor:
        """What the heads for reward and end see: h, and the next z if they have a hidden layer."""
        return torch.cat([h, following], -1) if self.head_units else h

    def losses(self, z: Tensor, action: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of predicting each step of z (B, T, Z) from those before it.

        Steps that begin an episode are not predicted.

        Args:
            z: sampled codes.
            action: (B, T, A) encoded.
            batch: `reward`, `is_first` and `is_terminal` (B, T).
        """
        first = batch["is_first"]
        h = self(z[:, :-1], action[:, :-1], first[:, :-1])
        mask = (~first[:, 1:]).float()
        count = mask.sum().clamp(min=1)

        def mean(loss: Tensor) -> Tensor:
            return (loss * mask).sum() / count

        losses = {"mixture": mean(self.predict(h).loss(self.target(z[:, :-1], z[:, 1:])))}
        inputs = self.head_inputs(h, z[:, 1:])
        if self.reward_head is not None:
            losses["reward"] = mean(self.reward_head(inputs).loss(batch["reward"][:, 1:].float()))
        if self.done_head is not None:
            done = batch["is_terminal"][:, 1:].float()
            weight = 1 + (self.done_weight - 1) * done
            losses["done"] = mean(self.done_head(inputs).loss(done) * weight)
        return losses

    def inputs(self, z: Tensor, action: Tensor, first: Tensor) -> Tensor:
        """What the LSTM reads: (..., Z + A + 1), and one more with `restart`."""
        begins = [first.unsqueeze(-1).to(z.dtype)] if self.restart else []
        return torch.cat([z, action, *begins, torch.ones_like(z[..., :1])], -1)
