"""Stopping politely: the first SIGTERM or Ctrl-C asks, the second insists."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
MESSAGE = b"\nSaving and stopping; a second signal stops at once without saving.\n"


class StopSignals:
    """Remembers the first SIGTERM or SIGINT in `received`; a second raises KeyboardInterrupt.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Takes the signals over."""
        self.received = None
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS}

    def restore(self) -> None:
        """Gives the signals back to whoever had them before."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        os.write(2, MESSAGE)  # print is not safe in a handler: it may interrupt another print
