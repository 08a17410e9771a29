"""C: a linear map from what V and M know to an action, for one agent or a whole population.

Section 4.4 of the paper; the maps from its raw outputs to actions are those of appendices A.4 and
A.5, and a general one for any other task.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.nets.actions import ActionCodec
from zoo.nets.distributions import one_hot

ACTION_MAPS = ("general", "car-racing", "line")


class Actions(nn.Module):
    """What C's raw outputs mean, and how M sees the actions.

    | map | action space | raw outputs | action |
    |---|---|---|---|
    | `general` | discrete | one for each choice | the largest |
    | `general` | box | one for each component | tanh, scaled to the bounds |
    | `car-racing` | a box of 3 | 3 | x = tanh: steering x, gas (x + 1) / 2, brake max(x, 0) |
    | `line` | n discrete choices | 1 | tanh x in n equal parts: the choices from left to right |

    M sees encoded actions: one-hot vectors, boxes scaled to [-1, 1], and the place in [-1, 1] of a
    choice on the line.

    Args:
        spec: the action space.
        kind: one of `ACTION_MAPS`.
        order: for `line`, the choices from left to right; by default in the order of their numbers.

    Raises:
        UserError: an unknown map, or one that does not fit the action space.
    """

    order: Tensor
    place: Tensor

    def __init__(
        self, spec: ActionSpec, kind: str = "general", order: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        if kind not in ACTION_MAPS:
            raise UserError(
                f"WorldModels has no action_map '{kind}': choose one of {', '.join(ACTION_MAPS)}"
            )
        self.spec, self.kind = spec, kind
        self.codec = ActionCodec(spec)
        self.raw_size = self.encoded_size = spec.encoded_size
        if kind == "car-racing" and (spec.kind != "box" or len(spec.low) != 3):
            raise UserError("the action_map 'car-racing' is for a box of 3: steering, gas, brake")
        if kind == "line":
            if spec.kind != "discrete":
                raise UserError(f"the action_map 'line' is for discrete actions, not {spec.kind}")
            order = tuple(range(spec.n)) if order is None else tuple(order)
            if sorted(order) != list(range(spec.n)):
                raise UserError(
                    f"action_order {list(order)} must name each of the {spec.n} actions once"
                )
            self.raw_size = self.encoded_size = 1
            choices = torch.tensor(order)
            self.register_buffer("order", choices, persistent=False)
            self.register_buffer("place", choices.argsort(), persistent=False)

    def choose(self, raw: Tensor) -> Tensor:
        """Raw outputs (..., raw_size) to encoded actions (..., encoded_size)."""
        if self.kind == "line":
            n = self.spec.n
            part = ((torch.tanh(raw) + 1) * (n / 2)).floor().clamp(0, n - 1)
            return self._level(part)
        if self.spec.kind == "box":
            x = torch.tanh(raw)
            if self.kind == "car-racing":  # the scaled gas is tanh x, the scaled brake is not
                x = torch.cat([x[..., :2], 2 * x[..., 2:].clamp(min=0) - 1], -1)
            return x
        parts = raw.split(self.spec.nvec, -1)
        return torch.cat([one_hot(p.argmax(-1), p.shape[-1]) for p in parts], -1)

    def encode(self, action: Tensor) -> Tensor:
        """Actions in the units of the environment to encoded ones (..., encoded_size)."""
        if self.kind == "line":
            return self._level(self.place[action].unsqueeze(-1).float())
        return self.codec.encode(action)

    def decode(self, encoded: Tensor) -> Tensor:
        """Encoded actions (..., encoded_size) to the units of the environment."""
        if self.kind == "line":
            n = self.spec.n
            part = ((encoded.squeeze(-1) + 1) * ((n - 1) / 2)).round().long().clamp(0, n - 1)
            return self.order[part]
        return self.codec.decode(encoded)

    def _level(self, part: Tensor) -> Tensor:
        return part * (2 / max(1, self.spec.n - 1)) - 1


class Controller(nn.Module):
    """C: raw = W features + b.

    Args:
        features: width of what C sees: z and h, or z, c and h.
        outputs: raw outputs.
        bias: whether there is a b (none for Doom in the paper).
    """

    def __init__(self, features: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, features))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, features: Tensor) -> Tensor:
        """Raw outputs (..., outputs) of features (..., F)."""
        return nn.functional.linear(features, self.weight, self.bias)

    @property
    def flat(self) -> Tensor:
        """All parameters as one vector (size,)."""
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    @torch.no_grad()
    def load(self, flat: Tensor) -> None:
        """Takes parameters over from a vector (size,)."""
        nn.utils.vector_to_parameters(flat.to(self.weight), self.parameters())

    def population(self, flat: Tensor) -> Population:
        """Members with the parameters flat (P, size)."""
        weight, bias = flat.split([self.weight.numel(), self.size - self.weight.numel()], 1)
        weight = weight.unflatten(1, self.weight.shape).transpose(1, 2).contiguous()
        outputs = self.weight.shape[0]
        return Population(
            weight, weight.new_zeros(len(flat), 1, outputs) if self.bias is None else bias[:, None]
        )


class Population(NamedTuple):
    """P linear controllers.

    Attributes:
        weight: (P, F, A).
        bias: (P, 1, A).
    """

    weight: Tensor
    bias: Tensor

    def raw(self, features: Tensor) -> Tensor:
        """Raw outputs (P, R, A) of R rows of features (P, R, F) for each member."""
        return torch.baddbmm(self.bias, features, self.weight)

    def select(self, members: Tensor) -> Population:
        """Some of the members (N,), one of them maybe more than once."""
        return Population(self.weight[members], self.bias[members])
