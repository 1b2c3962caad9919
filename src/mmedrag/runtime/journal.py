"""An append-only log of keyed lines that survives a kill.

Place in the picture: what a resumable job has finished (``pipeline/run``, the embedding cache).
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from mmedrag.records import UserError
from mmedrag.runtime.files import sync_folder
from mmedrag.runtime.run_folder import log


class Journal:
    """Append-only log of keyed lines ``checksum key<TAB>row``.

    ``append`` returns after fsync. Opening replays the file: a torn or damaged line is dropped,
    so its row is done again. One process writes at a time.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.handle: BinaryIO = open(path, "a+b")  # noqa: SIM115 - closed by close()
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.handle.close()
            raise UserError(f"{path.parent}: another process is writing this folder") from None
        self.where: dict[str, tuple[int, int]] = {}  # key → (offset, length) of its row
        self._replay()

    def _replay(self) -> None:
        self.handle.seek(0)
        offset = 0
        for line in self.handle:
            start, offset = offset, offset + len(line)
            crc, _, rest = line.rstrip(b"\n").partition(b" ")
            key, tab, row = rest.partition(b"\t")
            if line[-1:] == b"\n" and tab and crc == b"%08x" % zlib.crc32(rest):
                self.where[json.loads(key)] = (offset - 1 - len(row), len(row))
                continue
            log.warning("%s: damaged line at byte %d: its row is done again", self.path, start)
            if line[-1:] != b"\n":
                self.handle.truncate(start)

    def append(self, rows: Mapping[str, str]) -> None:
        """Write ``key → row`` (JSON without newlines) and fsync once."""
        offset = self.handle.seek(0, os.SEEK_END)
        block = bytearray()
        for key, row in rows.items():
            rest = json.dumps(key).encode() + b"\t" + row.encode()
            block += b"%08x " % zlib.crc32(rest) + rest + b"\n"
            length = len(row.encode())
            self.where[key] = (offset + len(block) - 1 - length, length)
        self.handle.write(block)
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def __contains__(self, key: object) -> bool:
        return key in self.where

    def write(self, target: Path, order: Iterable[str]) -> None:
        """The rows of these keys, in this order, to ``target``, atomically."""
        part = target.with_name(target.name + ".part")
        with open(part, "wb") as out:
            for key in order:
                offset, length = self.where[key]
                self.handle.seek(offset)
                out.write(self.handle.read(length) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, target)
        sync_folder(target.parent)

    def close(self, remove: bool = False) -> None:
        if remove:
            self.path.unlink()
        self.handle.close()
