"""`RunLogger`: the metrics of a run as `metrics.csv` and as TensorBoard events.

`metrics.csv` is in long form (`updates,env_steps,metric,value`) and only grows. Floats are written
by `repr`, so equal files mean bit-equal metrics. A checkpoint records how many bytes the file had;
resuming cuts the file there, so that a run that was killed and resumed has the rows of one that was
never stopped, but for `time/*`.
"""

from __future__ import annotations

import io
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from callbacks.counters import counters
from callbacks.files import atomic_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HEADER = b"updates,env_steps,metric,value\n"
FLUSH_SECONDS = 5.0
GIF_MILLISECONDS = 100


class RunLogger(Logger):
    """Writes `metrics.csv`, TensorBoard events and `videos/*.gif` into one folder.

    The horizontal axis of the charts is `env_steps`, or `updates` where there are no environment
    steps. `RunCheckpoint` tells the logger the model's counters and keeps its position in the
    checkpoints; without it the rows count Lightning's steps and a resumed run starts a new file.

    Args:
        save_dir: the folder of the run; by default the Trainer's `default_root_dir`.
    """

    def __init__(self, save_dir: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self._save_dir = None if save_dir is None else Path(save_dir)
        self._trainer: pl.Trainer | None = None
        self._rows: list[tuple[int, int, str, float]] = []
        self._flushed_at = time.monotonic()
        self._file: BinaryIO | None = None
        self._writer: SummaryWriter | None = None
        self._offset = 0
        self._purge_step: int | None = 0
        self._written_early: tuple[int, set[str]] | None = None

    @property
    def name(self) -> str:
        """Nothing: the folder is the run."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: the folder is the run."""
        return ""

    @property
    def save_dir(self) -> str | None:
        """The folder of the run."""
        return None if self._save_dir is None else str(self._save_dir)

    @property
    def directory(self) -> Path:
        """The folder of the run, by default the current one."""
        return self._save_dir or Path.cwd()

    def attach(self, trainer: pl.Trainer) -> None:
        """Reads the counters from this trainer's model from now on."""
        self._trainer = trainer
        if self._save_dir is None:
            self._save_dir = Path(trainer.default_root_dir)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: `config.yaml` is complete."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Lightning's door: the values of `self.log` at every `log_every_n_steps`-th batch."""
        trainer = self._trainer
        if trainer is not None and step is not None and trainer.training:
            if trainer.should_stop and not _is_log_step(trainer, step):
                return  # Lightning also logs where a run stops; a run that goes on would not
            if self._written_early is not None and self._written_early[0] == step:
                metrics = {k: v for k, v in metrics.items() if k not in self._written_early[1]}
        self.write(metrics, step or 0)

    @rank_zero_only
    def write(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Writes a row for each metric at the present counters (at `step` updates without them)."""
        updates, env_steps = step, 0
        if self._trainer is not None:
            updates, env_steps = counters(self._trainer.lightning_module)
        self._rows += [
            (updates, env_steps, k, float(v)) for k, v in metrics.items() if k != "epoch"
        ]
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def write_early(self) -> None:
        """Writes now what Lightning would log after the hooks of this batch.

        A checkpoint taken in `on_train_batch_end` would otherwise miss that batch's rows.
        """
        trainer = self._trainer
        if trainer is None or not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if _is_log_step(trainer, step):
            metrics = trainer._logger_connector.metrics["log"]
            self.write({k: v.item() for k, v in metrics.items()})
            self._written_early = (step, set(metrics))

    @rank_zero_only
    def log_gif(self, tag: str, frames: np.ndarray, step: int) -> None:
        """Writes an animation to TensorBoard and to `videos/<tag>-<step>.gif`.

        Args:
            tag: its name; slashes become dashes in the file name.
            frames: uint8 (T, H, W, 3).
            step: position on the horizontal axis, usually `env_steps`.
        """
        gif = encode_gif(frames)
        with atomic_file(self.directory / "videos" / f"{tag.replace('/', '-')}-{step}.gif") as file:
            file.write(gif)
        # SummaryWriter.add_video drops the video with moviepy 2, so the summary is made here
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, height, width, _ = frames.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._tensorboard()._get_file_writer().add_summary(summary, step)

    def save(self) -> None:
        """Lightning calls this after every `log_metrics`; `write` already flushes now and then."""

    @rank_zero_only
    def flush(self, durable: bool = False) -> None:
        """Hands the buffered rows to the operating system, and with `durable` to the disk."""
        file = self._open_csv()
        file.write(b"".join(b"%d,%d,%s,%r\n" % (u, e, k.encode(), v) for u, e, k, v in self._rows))
        file.flush()
        if durable:
            os.fsync(file.fileno())
        if self._rows:
            writer = self._tensorboard()
            for updates, env_steps, key, value in self._rows:
                writer.add_scalar(key, value, env_steps or updates)
        self._rows.clear()
        self._flushed_at = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flushes everything and closes the files; they open again when needed."""
        if self._rows or self._file is not None:
            self.flush()
        if self._file is not None:
            self._offset = self._file.tell()
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, int]:
        """Flushes durably; the length of `metrics.csv` in bytes and the step of the charts."""
        if self._trainer is not None and not self._trainer.is_global_zero:
            return {}
        self.flush(durable=True)
        assert self._file is not None
        axis = 0 if self._trainer is None else counters(self._trainer.lightning_module).axis
        return {"offset": self._file.tell(), "step": axis}

    @rank_zero_only
    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes back to a recorded position; rows written later are cut at the next flush."""
        self.finalize("rewound")
        self._offset, self._purge_step = int(state["offset"]), int(state["step"]) + 1

    def _open_csv(self) -> BinaryIO:
        if self._file is None:
            path = self.directory / "metrics.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            size = self._file.tell()
            if size < self._offset:
                rank_zero_warn(
                    f"{path} holds {size} bytes but the checkpoint recorded {self._offset}: the "
                    "metrics logged before the checkpoint are not all there"
                )
            self._file.truncate(min(size, self._offset))
            self._file.seek(0, os.SEEK_END)
            if self._file.tell() == 0:
                self._file.write(HEADER)
        return self._file

    def _tensorboard(self) -> SummaryWriter:
        if self._writer is None:
            # imported at the first flush, some seconds into the run: the import takes a second
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory), purge_step=self._purge_step)
            self._purge_step = None
        return self._writer


def encode_gif(frames: np.ndarray) -> bytes:
    """Encodes uint8 frames (T, H, W, 3) as an endless GIF.

    Neighbours that are equal become one frame that is shown longer.
    """
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=GIF_MILLISECONDS, loop=0
    )
    return buffer.getvalue()


def _is_log_step(trainer: Any, step: int) -> bool:
    every: int = trainer.log_every_n_steps
    return every > 0 and (step + 1) % every == 0
