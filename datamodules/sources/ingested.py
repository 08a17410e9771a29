"""`IngestedSource`: recordings that were decoded once into a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.sources.ingesting import INDEX, Index, Item
from datamodules.sources.stores import StoreSource
from datamodules.sources.video_files import natural
from datamodules.store import Episode

MOST_NAMED = 3  # of what is left out, in a note


class IngestedSource(StoreSource):
    """What an ingestion left in a folder.

    Args:
        folder: the store and its index.
        name: what error messages call it.
        items: the recordings to read, in their order; by default all that were ever ingested.
        only: observation keys to read; by default all.
        size: side in pixels to which images are resized.

    Attributes:
        kind: "video" or "lerobot".
        broken: a sentence for each recording that cannot be read.
        original: bytes on disk of what was ingested; 0 if that is not known.

    Raises:
        UserError: nothing in it can be read.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        items: Sequence[Item] | None = None,
        only: Sequence[str] | None = None,
        size: int | None = None,
    ) -> None:
        self._index = Index.read(folder)
        about = self._index.about
        self.kind: str = about["kind"]
        self.original = sum(item.bytes for item in items or [])
        labels = {item.name: item.label for item in items or []}
        names = list(labels) or sorted(self._index.recordings, key=natural)
        entries = {name: self._index.recordings[name] for name in names}
        whole = {name: entry for name, entry in entries.items() if "broken" not in entry}
        self._long = {name: entry for name, entry in whole.items() if entry["steps"] > 1}
        self._labels = [labels.get(name, f"'{folder}', {name}") for name in self._long]
        self.broken = [
            f"{labels.get(name, name)} {entry['broken']}"
            for name, entry in entries.items()
            if "broken" in entry
        ]
        if not self._long:
            first = f"the first is: {self.broken[0]}" if self.broken else "all have one frame only"
            raise UserError(f"none of the {len(names)} recordings of '{name}' is usable: {first}")
        super().__init__(folder, only, size)
        self.name = name
        self.inferred = self.spec.action is not None
        short = [labels.get(name, name) for name, entry in whole.items() if entry["steps"] == 1]
        uneven = [name for name, entry in self._long.items() if not entry["constant"]]
        self.notes += [f"{name}: {note}" for note in about["notes"]]
        self.notes += _note(name, len(names), self.broken, "cannot be read and are left out")
        self.notes += _note(name, len(names), short, "have one frame only and are left out")
        self.notes += _note(
            self.name, len(names), uneven, "have no constant frame rate; all their frames are kept"
        )

    def files(self) -> list[Path]:
        """The index says which rows of the store are read."""
        return [*super().files(), self.path / INDEX]

    def where(self, episode: int) -> str:
        """The recording that it was."""
        return self._labels[episode]

    def _held(self) -> list[Episode]:
        return [Episode(0, entry["row"], entry["steps"], True) for entry in self._long.values()]

    def _described(self) -> dict[str, Any] | None:
        return self._index.about.get("spec")

    def _find_fps(self) -> np.ndarray | None:
        return np.array([entry["fps"] for entry in self._long.values()], np.float64)


def _note(source: str, total: int, names: Sequence[str], what: str) -> list[str]:
    """A sentence on some of the recordings."""
    if not names:
        return []
    more = len(names) - MOST_NAMED
    named = "; ".join(names[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return [f"{source}: {len(names)} of {total} recordings {what}: {named}"]
