"""Decodes recordings into files of plain arrays, several at once in processes of their own.

Imports neither torch nor gymnasium, so that these processes begin quickly.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np

from datamodules.processes import epitaph, start_worker
from datamodules.sources.video_files import BrokenVideo, Frames, fit

IMAGE_KEY = "image"  # as in datamodules.spec, which imports gymnasium
AHEAD = 4  # recordings of each process that may wait for an earlier one
Piece = Mapping[str, np.ndarray]  # some consecutive steps: arrays (T, ...) by name


class Facts(NamedTuple):
    """What is known of a recording besides its steps.

    Attributes:
        fps: frames per second, if known.
        constant: whether they are evenly spaced in time.
        terminal: whether the task ended with it.
    """

    fps: float | None = None
    constant: bool = True
    terminal: bool = False


class Job(Protocol):
    """A recording to decode; it is pickled."""

    def decode(self, append: Callable[[Piece], None]) -> Facts:
        """Hands over all steps, piece by piece.

        Raises:
            BrokenVideo: it cannot be read.
        """


@dataclass(frozen=True)
class VideoJob:
    """Decodes a video file or a folder of numbered images as the observation `image`."""

    path: Path
    size: int | None
    crop: bool

    def decode(self, append: Callable[[Piece], None]) -> Facts:
        """Hands over its frames, one by one."""
        frames = Frames(self.path)
        for image in frames:
            append({f"obs/{IMAGE_KEY}": fit(image, self.size, self.crop)[None]})
        return Facts(frames.fps, frames.is_constant)


class Decoded(NamedTuple):
    """Arrays on the disk, one file each.

    Attributes:
        fields: shape of a step and dtype of each array.
        steps: steps of all of them.
        facts: what else is known.
        folder: where they are.
    """

    fields: dict[str, tuple[tuple[int, ...], str]]
    steps: int
    facts: Facts
    folder: str

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays (steps, ...), mapped."""
        return {
            key: np.memmap(Path(self.folder) / str(i), dtype, "r", shape=(self.steps, *shape))
            for i, (key, (shape, dtype)) in enumerate(self.fields.items())
        }


class Broken(NamedTuple):
    """Why a recording cannot be read: what follows its name in a sentence."""

    reason: str


class Failed(NamedTuple):
    """Why its arrays cannot be written: a whole sentence."""

    reason: str


Result = Decoded | Broken | Failed


def decode_all(jobs: Sequence[Job], folder: Path, workers: int) -> Generator[Result, None, None]:
    """Decodes recordings and yields the results in their order.

    What was yielded is deleted when the next one is asked for.

    Args:
        jobs: the recordings.
        folder: for the decoded arrays; nothing else is in it.
        workers: processes; 0 decodes in this one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        if workers:
            results = _in_processes(jobs, folder, workers)
        else:
            results = (_decode(job, folder / str(i)) for i, job in enumerate(jobs))
        with contextlib.closing(results):
            for number, result in enumerate(results):
                yield result
                shutil.rmtree(folder / str(number), ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(connection: Connection) -> None:
    """A worker process: decodes what it is sent."""
    while True:
        job, folder = connection.recv()
        connection.send(_decode(job, Path(folder)))


def _decode(job: Job, folder: Path) -> Result:
    try:
        folder.mkdir()
        with contextlib.ExitStack() as files:
            spool = _Spool(folder, files)
            facts = job.decode(spool.append)
    except BrokenVideo as error:
        return Broken(str(error))
    except OSError as error:
        return Failed(f"cannot write to '{folder}': {error.strerror or error}")
    return Decoded(spool.fields, spool.steps, facts, str(folder))


class _Spool:
    """Files that grow by pieces."""

    def __init__(self, folder: Path, files: contextlib.ExitStack) -> None:
        self.fields: dict[str, tuple[tuple[int, ...], str]] = {}
        self.steps = 0
        self._folder, self._stack = folder, files
        self._files: dict[str, IO[bytes]] = {}

    def append(self, piece: Piece) -> None:
        """Appends some steps."""
        if not self.fields:
            for i, (key, value) in enumerate(piece.items()):
                self.fields[key] = value.shape[1:], value.dtype.name
                self._files[key] = self._stack.enter_context((self._folder / str(i)).open("wb"))
        for key, value in piece.items():
            shape, _ = self.fields[key]
            if value.shape[1:] != shape:
                raise BrokenVideo(
                    f"changes at frame {self.steps} from {pixels(shape)} to "
                    f"{pixels(value.shape[1:])}: a size for all of them (size=) mends that"
                )
            self._files[key].write(np.ascontiguousarray(value).data)
        self.steps += len(value)


def pixels(shape: Sequence[int]) -> str:
    """How people call the size of an image (H, W, C)."""
    return f"{shape[1]}x{shape[0]} pixels" if len(shape) == 3 else f"the shape {tuple(shape)}"


def _in_processes(jobs: Sequence[Job], folder: Path, workers: int) -> Generator[Result, None, None]:
    pool = [_Worker() for _ in range(min(workers, len(jobs)))]
    finished: dict[int, Result] = {}
    given = done = 0
    try:
        while done < len(jobs):
            for worker in pool:
                if worker.number is None and given < min(len(jobs), done + AHEAD * workers):
                    worker.give(given, jobs[given], folder / str(given))
                    given += 1
            busy = {w.connection: w for w in pool if w.number is not None}
            if done not in finished:
                for connection in wait(list(busy)):
                    number, result = busy[connection].take()  # type: ignore[index]
                    finished[number] = result
            while done in finished:
                yield finished.pop(done)
                done += 1
    finally:
        for worker in pool:
            worker.close()


class _Worker:
    """A process that decodes one recording at a time."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._start()

    def _start(self) -> None:
        self.process, self.connection = start_worker("datamodules.sources.decoding:serve")

    def give(self, number: int, job: Job, folder: Path) -> None:
        """Sends a recording."""
        self.number = number
        with contextlib.suppress(OSError):  # it died: `take` says so
            self.connection.send((job, str(folder)))

    def take(self) -> tuple[int, Result]:
        """Its number and result; a new process takes the place of one that died of it."""
        assert self.number is not None
        number, self.number = self.number, None
        try:
            return number, self.connection.recv()
        except (EOFError, OSError):
            reason = f"cannot be read: {epitaph(self.process, 5.0)}"
            self.connection.close()
            self._start()
            return number, Broken(reason)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.connection.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
