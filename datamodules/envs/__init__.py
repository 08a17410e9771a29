"""Environments: one factory, `make_env`, whose environments all look like a `Spec`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.envs.factory import make_env
    from datamodules.envs.wrappers import (
        ActionRepeat,
        DictObservation,
        Resize,
        frames_per_step,
    )

__all__ = ["ActionRepeat", "DictObservation", "Resize", "frames_per_step", "make_env"]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that importing the package costs nothing."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "factory" if name == "make_env" else "wrappers"
    return getattr(import_module(f"{__name__}.{home}"), name)
