"""The two clocks of a run."""

from __future__ import annotations

from typing import Any, NamedTuple


class Counters(NamedTuple):
    """How far a run is.

    Attributes:
        updates: optimizer steps taken.
        env_steps: frames the agent caused, over all ranks.
    """

    updates: int
    env_steps: int

    @property
    def axis(self) -> int:
        """The horizontal axis of charts: env steps, or updates where there are none."""
        return self.env_steps or self.updates


def counts_env_steps(trainer: Any) -> bool:
    """Whether the training has env steps at all: on recorded data nobody acts."""
    data = getattr(trainer, "datamodule", None)
    return data is None or hasattr(data, "env_steps")


def counters(model: Any) -> Counters:
    """The counters that a ZooModel keeps."""
    return Counters(int(model.updates), int(model.env_steps))
