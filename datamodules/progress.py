"""How far something is, for people."""

from __future__ import annotations

import sys
import time

PAUSE = 10.0  # seconds between lines where there is no terminal


class Progress:
    """One live line on a terminal, one line every 10 seconds elsewhere; on standard error."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._next = time.monotonic() + (0 if self._live else PAUSE)
        self._shown = False

    def show(self, what: str, done: int, wanted: int) -> None:
        """Shows how far it is if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._live else PAUSE)
        text = f"{what}: {done:,}/{wanted:,} ({done / wanted:.0%})"
        print(f"\r{text}\x1b[K" if self._live else text, end="" if self._live else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
        self._shown = self._live

    def end(self) -> None:
        """Leaves the live line."""
        if self._shown:
            print(file=sys.stderr)
            self._shown = False
