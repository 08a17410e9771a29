"""Finding out early, and saying precisely, that a training has gone to NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from callbacks.counters import counters
from datamodules.errors import UserError


def total_loss(outputs: Any) -> Tensor | None:
    """The loss among what `training_step` gave, if it gave one."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("loss")
    return outputs if isinstance(outputs, Tensor) else None


def check_loss(loss: Tensor, pl_module: pl.LightningModule, kept: str) -> None:
    """Raises if the total loss is not finite.

    Args:
        loss: the total loss (scalar).
        pl_module: has the named losses of the last step in `last_losses`, if it keeps them.
        kept: what the message says of the last good checkpoint.

    Raises:
        UserError: which losses, at which update.
    """
    value = loss.item()
    if math.isfinite(value):
        return
    named: Mapping[str, Tensor] = getattr(pl_module, "last_losses", None) or {}
    means = {name: float(torch.as_tensor(x).float().mean()) for name, x in named.items()}
    bad = ", ".join(f"'{name}' is {x}" for name, x in means.items() if not math.isfinite(x))
    what = f"of the losses {bad}" if bad else f"the total loss is {value}"
    raise UserError(
        f"{what} {_where(pl_module)}; {kept}. A smaller learning rate or data without extreme "
        "values usually mends it"
    )


def check_parameters(pl_module: pl.LightningModule, kept: str) -> None:
    """Raises if a parameter is not finite, which its loss may not have shown yet.

    Raises:
        UserError: which parameter, at which update.
    """
    for name, parameter in pl_module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"the parameter '{name}' is not finite {_where(pl_module)}; {kept}. A smaller "
                "learning rate or data without extreme values usually mends it"
            )


def _where(pl_module: pl.LightningModule) -> str:
    updates, env_steps = counters(pl_module)
    return f"at update {updates} (env step {env_steps})"
