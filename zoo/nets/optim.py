"""Optimizers, clipping, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer


def adaptive_clip_(
    grads: list[Tensor], params: list[Tensor], clip: float, min_norm: float = 1e-3
) -> None:
    """Scales each gradient in place so that |grad| <= clip * max(min_norm, |param|).

    Norms are of the whole tensor (AGC of Brock et al. 2021, per tensor as DreamerV3 does).
    """
    grad_norms = torch.stack(torch._foreach_norm(grads))
    param_norms = torch.stack(torch._foreach_norm(params))
    limit = clip * param_norms.clamp(min=min_norm)
    scale = (limit / grad_norms.clamp(min=1e-30)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(scale.unbind()))


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights of linear maps and convolutions decay, all else does not.

    So biases, the gains of norms, embeddings and positions stay as they are learnt.
    """
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear | _ConvNd)]
    decaying = {id(weight) for weight in weights}
    others = [p for p in module.parameters() if id(p) not in decaying]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


class LaProp(Optimizer):
    """RMS scaling first, momentum after it (Ziyin et al. 2020), with AGC and linear warm-up.

    v <- b2 v + (1 - b2) g^2;  m <- b1 m + (1 - b1) g / (sqrt(v / (1 - b2^n)) + eps);
    p <- p - lr_n m / (1 - b1^n), with lr_n = lr * min(1, (n - 1) / warmup) at the n-th step
    (the very first step of a warm-up has learning rate zero, as in the official code), falling
    linearly from the end of the warm-up to lr / 10 at step `anneal` if that is not 0.

    Args:
        params: parameters or groups.
        lr: learning rate after the warm-up.
        betas: decay of momentum b1 and of the squared gradients b2.
        eps: added to the root mean square.
        agc: clip each tensor's gradient at this fraction of its weight norm; 0 disables.
        warmup: number of steps of linear warm-up.
        anneal: step from which the learning rate is a tenth; 0 keeps it constant.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        agc: float = 0.3,
        warmup: int = 1000,
        anneal: int = 0,
    ) -> None:
        if lr < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"LaProp needs lr >= 0 and betas in [0, 1), got {lr} and {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "agc": agc, "step": 0}
        defaults |= {"warmup": warmup, "anneal": anneal}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        group["step"] += 1
        count, (beta1, beta2) = group["step"], group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                self.state[p]["square"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momentum = [self.state[p]["momentum"] for p in params]
        square = [self.state[p]["square"] for p in params]
        if group["agc"]:
            adaptive_clip_(grads, params, group["agc"])
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(square)
        torch._foreach_mul_(scale, (1 - beta2**count) ** -0.5)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(momentum, grads, 1 - beta1)
        rate = group["lr"] * schedule(count - 1, group["warmup"], group["anneal"])
        torch._foreach_add_(params, momentum, alpha=-rate / (1 - beta1**count))


def schedule(step: int, warmup: int, anneal: int) -> float:
    """Factor of the learning rate: linear from 0 over `warmup` steps, then to 0.1 at `anneal`."""
    if step < warmup:
        return step / warmup
    if not anneal:
        return 1.0
    return 1.0 - 0.9 * min(1.0, (step - warmup) / max(1, anneal - warmup))


class ClippedAdam(torch.optim.AdamW):
    """Adam whose parameter groups are clipped apart, each by its own global gradient norm.

    Stands for the several optimizers of PlaNet and Dreamers V1 and V2: groups share no state, so
    that one optimizer with three groups does what three optimizers do.

    Args:
        groups: parameter groups, each with its own "lr", and "eps" if it is not `eps`.
        clip: largest global norm of a group's gradients.
        eps: Adam's epsilon.
        weight_decay: share of each weight that is taken away at every step, whatever the learning
            rate (Dreamer V2).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        clip: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # AdamW takes away lr * decay.
        groups = [{**group, "weight_decay": weight_decay / group["lr"]} for group in groups]
        super().__init__(groups, eps=eps, foreach=True)
        self.clip = clip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips, then one update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.clip)
        super().step()
        return loss
