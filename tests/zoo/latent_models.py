"""Specs, batches and gradient checks that the tests of PlaNet and the Dreamers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.rssm.model import LatentModel

BATCH, STEPS = 2, 6  # steps with the context

VECTOR = {"vector": ArraySpec((4,), "float32")}
IMAGE = {"image": ArraySpec((64, 64, 3), "uint8")}
ACTIONS = {
    "discrete": ActionSpec("discrete", nvec=(3,)),
    "box": ActionSpec("box", low=(-2.0, 0.0), high=(2.0, 1.0)),
    "multi_discrete": ActionSpec("multi_discrete", nvec=(2, 4)),
}


def vectors(action: str = "box") -> Spec:
    return Spec(VECTOR, ACTIONS[action])


def images(action: str = "box") -> Spec:
    return Spec(VECTOR | IMAGE, ACTIONS[action])


def sequences(spec: Spec, steps: int = STEPS) -> dict[str, Any]:
    """Random sequences (BATCH, steps) by the batch contract, always the same, without any end."""
    generator = torch.Generator().manual_seed(3)
    lead = (BATCH, steps)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(*lead, *shape).uniform_(generator=generator)

    obs = {
        key: (uniform(*a.shape) * 255).to(torch.uint8) if a.is_image else uniform(*a.shape) - 0.5
        for key, a in spec.obs.items()
    }
    act = spec.action
    if act.kind == "box":
        low, high = torch.tensor(act.low), torch.tensor(act.high)
        action = low + uniform(len(act.low)) * (high - low)
    else:
        action = (uniform(len(act.nvec)) * torch.tensor(act.nvec)).long()
        action = action[..., 0] if act.kind == "discrete" else action
    flags = ("is_first", "is_last", "is_terminal")
    batch = {"obs": obs, "action": action, "reward": uniform()}
    return batch | {key: torch.zeros(lead, dtype=torch.bool) for key in flags}


def shake(module: nn.Module, amount: float = 0.2) -> None:
    """Moves all weights, so that gradients pass through parts that start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def seed_dreams(model: LatentModel) -> None:
    """From now on every rollout of the prior draws the same noise."""
    imagine = model.rssm.imagine

    def seeded(*arguments: Any) -> Any:
        torch.manual_seed(11)
        return imagine(*arguments)

    model.rssm.imagine = seeded


def train(model: LatentModel, batch: dict[str, Any], updates: int) -> None:
    """Updates as the trainer makes them."""
    optimizer: Any = model.configure_optimizers()
    for _ in range(updates):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
        model.updates += 1
        model.after_update()


def touched(module: nn.Module) -> bool:
    """Whether any parameter has a gradient other than zero."""
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def parts_with_gradient(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_children() if touched(part)}


def parts_trained_by(model: LatentModel, loss: str, batch: dict[str, Any]) -> set[str]:
    """The parts that learn when this is the only loss that counts."""
    model.loss_scales = {key: float(key == loss) for key in model.loss_scales}
    model.zero_grad()
    model.training_step(batch, 0).backward()
    return parts_with_gradient(model)


def lambda_targets(reward: Tensor, value: Tensor, discount: Tensor, lam: float) -> Tensor:
    """V_t = r_t + d_t ((1 - lam) v_{t+1} + lam V_{t+1}) in a loop, for all states but the last."""
    targets = [value[:, -1]]
    for t in reversed(range(reward.shape[1] - 1)):
        ahead = (1 - lam) * value[:, t + 1] + lam * targets[0]
        targets.insert(0, reward[:, t] + discount[:, t] * ahead)
    return torch.stack(targets[:-1], 1)


def reached(discount: Tensor) -> Tensor:
    """1, d_0, d_0 d_1, ... in a loop."""
    weights = [torch.ones_like(discount[:, 0])]
    for t in range(discount.shape[1] - 1):
        weights.append(weights[-1] * discount[:, t])
    return torch.stack(weights, 1)


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear map."""
    return inputs * outputs + outputs


def mlp(inputs: int, layers: int, units: int) -> int:
    """Parameters of an MLP without norms."""
    return linear(inputs, units) + (layers - 1) * linear(units, units)


def conv(kernel: int, inputs: int, outputs: int) -> int:
    """Parameters of a convolution."""
    return kernel * kernel * inputs * outputs + outputs


def counts(model: nn.Module) -> dict[str, int]:
    """Learning parameters of each part."""
    found = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in model.named_children()
    }
    return {name: count for name, count in found.items() if count}
