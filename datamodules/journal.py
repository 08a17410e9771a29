"""The journal of an episode store: what is committed, in which order.

`journal` is a row of fixed-size records, each chained to the one before it by its checksum, and
`seal.json`, replaced atomically, says how many of them are committed. Whatever lies beyond the
seal was never committed: a crash may leave it, nobody reads it, and the next writer cuts it off.
Whatever lies before the seal must be there and be right, or the store is corrupted.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from datamodules.errors import UserError
from datamodules.files import StoreCorrupted, naming, read_json, sync, write_at, write_json

ROWS: Final = 1
EVICT: Final = 2

_BODY = struct.Struct("<QIIIII")
_LINK = struct.Struct("<I")
RECORD_BYTES: Final = _BODY.size + _LINK.size


class Record(NamedTuple):
    """One entry of the journal.

    `ROWS`: rows [row, row + steps) of `stream` lie in `chunk` and have the checksum `crc32`.
    `EVICT`: `chunk` no longer belongs to the store; the other entries are 0.
    """

    row: int
    kind: int
    chunk: int
    stream: int = 0
    steps: int = 0
    crc32: int = 0


class Journal:
    """Reads and appends the records of one store folder.

    `position` counts the committed records known to this object and holds the checksum of the
    last one. As the checksums are chained, two equal positions mean two equal histories.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal"
        self._seal = folder / "seal.json"
        self.position = {"records": 0, "crc32": 0}

    def create(self) -> None:
        """Writes an empty journal."""
        write_at(self._path, [], create=True, durable=True)
        write_json(self._seal, self.position, durable=True)

    def load(self) -> list[Record]:
        """All committed records, read anew.

        Raises:
            StoreCorrupted: the seal or a sealed record is damaged or missing.
        """
        while True:
            seal = read_json(self._seal)
            try:
                records, crc = self._decode(seal["records"])
                if crc != seal["crc32"]:
                    raise StoreCorrupted(
                        f"{self._path} and {self._seal.name} do not belong together: restore both "
                        "from one backup"
                    )
            except StoreCorrupted:
                # A writer that rewinds lowers the seal first and then cuts the journal.
                if read_json(self._seal) == seal:
                    raise
            else:
                self.position = seal
                return records

    def load_until(self, position: dict[str, int]) -> list[Record]:
        """The records up to an earlier position of this same history.

        Raises:
            UserError: the journal never was at this position.
        """
        records = self.load()[: position["records"]]
        crc = 0
        for record in records:
            crc = zlib.crc32(_BODY.pack(*record), crc)
        if len(records) < position["records"] or crc != position["crc32"]:
            raise UserError(
                f"the store {self._path.parent} is not the one that this position belongs to: it "
                f"holds {len(records)} of {position['records']} records with checksum {crc:08x} "
                f"instead of {position['crc32']:08x}; bring back the folder that was saved with it"
            )
        return records

    def append(self, records: Iterable[Record], durable: bool) -> None:
        """Commits records. On an error nothing is committed and the call can be repeated."""
        crc, data = self.position["crc32"], bytearray()
        for record in records:
            body = _BODY.pack(*record)
            crc = zlib.crc32(body, crc)
            data += body + _LINK.pack(crc)
        end = self.position["records"] * RECORD_BYTES
        write_at(self._path, [(end, data)], durable=durable)
        position = {"records": (end + len(data)) // RECORD_BYTES, "crc32": crc}
        write_json(self._seal, position, durable)
        self.position = position

    def cut(self, position: dict[str, int]) -> None:
        """Discards everything committed after `position`, for good even at a power loss."""
        write_json(self._seal, position, durable=True)
        self.position = dict(position)

    def trim(self) -> None:
        """Cuts off what lies beyond the seal."""
        sync(self._seal.parent)  # the seal first
        with naming(self._path):
            os.truncate(self._path, self.position["records"] * RECORD_BYTES)

    def _decode(self, count: int) -> tuple[list[Record], int]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            data = b""
        crc = 0
        records: list[Record] = []
        for index in range(count):
            at = index * RECORD_BYTES
            body, link = data[at : at + _BODY.size], data[at + _BODY.size : at + RECORD_BYTES]
            crc = zlib.crc32(body, crc)
            if link != _LINK.pack(crc):
                steps = sum(record.steps for record in records)
                state = "missing" if at + RECORD_BYTES > len(data) else "damaged"
                raise StoreCorrupted(
                    f"{self._path}: record {index} of {count} (byte {at}) is {state}; the records "
                    f"before it hold {steps} steps. Restore this file from a backup, or delete "
                    f"{self._path.parent} and collect again"
                )
            records.append(Record(*_BODY.unpack(body)))
        return records, crc
