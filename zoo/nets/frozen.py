"""Gradients through networks, but not into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, the modules' parameters are constants: gradients pass to the inputs only.

    This is how one summed loss trains an actor through a world model without training the model.
    None stands for a part that a model does not have.
    """
    parts = nn.ModuleList(module for module in modules if module is not None)
    learning = [p for p in parts.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
