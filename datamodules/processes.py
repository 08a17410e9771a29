"""Worker processes: plain Python processes that import one module, not the user's script.

So a script needs no `__main__` guard, and a worker never outlives its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection


def start_worker(serve: str) -> tuple[subprocess.Popen, Connection]:
    """Starts a process and the connection to it.

    Args:
        serve: "module:function", called with the worker's `Connection`. It ends when that is
            closed at the other side (EOFError).
    """
    module, function = serve.split(":")
    # Not multiprocessing: that would run the user's script again in every worker.
    ours, theirs = socket.socketpair()
    with theirs:
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from datamodules.processes import run\n"
            f"from {module} import {function}\n"
            f"run({function}, {theirs.fileno()}, {os.getpid()})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's business
        )
    return process, Connection(ours.detach())


def run(serve: Callable[[Connection], None], descriptor: int, parent: int) -> None:
    """What a worker process does: serves until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=[parent], daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(Connection(descriptor))


def epitaph(process: subprocess.Popen, seconds: float) -> str:
    """How a worker ended whose connection is closed, for people; kills it if it has not."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "its worker process closed its connection"
    if code >= 0:
        return f"its worker process exited with code {code}"
    return f"its worker process was killed by {signal.Signals(-code).name}"


def _die_with(parent: int) -> None:
    """Ends this process when its parent is gone, even while it is busy."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
