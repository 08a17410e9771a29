"""`TrainingClock`: the seconds that a run has trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# What clocks themselves log: no measuring took so long.
OWN = frozenset({"time/updates_per_s", "time/wall_s"})


class TrainingClock:
    """Counts seconds from `start` on, over all resumed parts, without those spent on measuring.

    Attributes:
        trained: seconds up to the last look; a resumed run sets it to what it was.

    Args:
        timer: tells the time in seconds.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self.timer = timer
        self.trained = 0.0
        self._at = 0.0

    def start(self) -> None:
        """Begins to count, or to count again."""
        self._at = self.timer()

    def seconds(self) -> float:
        """What has been trained up to now."""
        now = self.timer()
        if self._at:
            self.trained += now - self._at
            self._at = now
        return self.trained

    def leave_out(self, metrics: Mapping[str, float]) -> None:
        """Takes out what measuring these metrics took: their `time/*_s`."""
        if OWN.isdisjoint(metrics):
            spent = (v for k, v in metrics.items() if k.startswith("time/") and k.endswith("_s"))
            self.trained -= sum(spent)
