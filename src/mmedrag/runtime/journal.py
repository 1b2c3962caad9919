"""Logs that only grow: whole lines, on disk when the call returns.

Place in the picture: beside ``files``. Runs, imports and the caches of a tuning keep finished work
in a :class:`Journal`. ``open_log``, ``lock_file`` and ``append_bytes`` are under it, and under the
logs of another form: embeddings (``retrieval.embeddings``: batches of float vectors, a third
longer and slow to read as lines of text), vision features (``preference.dpo.cache``: raw tensors
that a journal points into) and the audit log (``serve.audit``: each line holds the hash of the one
before, so that none can be changed or taken out unseen).
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mmedrag.records import UserError
from mmedrag.runtime.files import replacing, sync

log = logging.getLogger(__name__)


def open_log(path: Path, mode: int = 0o666) -> io.FileIO:
    """A file to read and to append to, unbuffered; it and its folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a+b", buffering=0, opener=lambda p, flags: os.open(p, flags, mode))


def lock_file(handle: io.FileIO, wait: bool = False) -> bool:
    """Take the file's one write lock; it goes when the handle is closed or its process ends.
    False: another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def append_bytes(handle: io.FileIO, data: bytes) -> int:
    """Add ``data`` at the end, durably and whole; where it begins.

    Raises:
        OSError: the disk is full or gone; nothing of ``data`` stays behind.
    """
    start = os.fstat(handle.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle.fileno(), rest) :]
        os.fsync(handle.fileno())
    except OSError:
        os.ftruncate(handle.fileno(), start)
        raise
    if not start:
        sync(Path(handle.name).parent)  # the name of a new file, too
    return start


def append_line(path: Path, text: str) -> None:
    """Append a line to a side file; a line that a kill cut short is ended first."""
    with open_log(path) as handle:
        append_bytes(handle, _line_end(handle) + text.encode() + b"\n")


def _line_end(handle: io.FileIO) -> bytes:
    """What the last line lacks: nothing, unless a kill cut it short."""
    size = os.fstat(handle.fileno()).st_size
    return b"\n" if size and os.pread(handle.fileno(), 1, size - 1) != b"\n" else b""


class Journal:
    """Append-only log of keyed lines ``checksum key<TAB>row``.

    ``append`` returns after fsync. Opening replays the file: a torn or damaged line is dropped,
    so its row is done again. Of a key that comes twice the last row counts.

    Args:
        shared: other processes may append, too (a line is all theirs or all ours); otherwise the
            file is locked until :meth:`close`.
        older: key and row of a line of the form that this file had before; ValueError: it is
            not one.

    Attributes:
        where: key → (offset, length) of its row.
        damaged: number of lines that the last replay dropped.

    Raises:
        UserError: another process is writing here.
    """

    def __init__(
        self,
        path: Path,
        shared: bool = False,
        older: Callable[[bytes], tuple[str, bytes]] | None = None,
    ) -> None:
        self.path, self.shared, self.older = path, shared, older
        self._held = open_log(path)
        if shared:
            self._held.close()
        elif not lock_file(self._held):
            self._held.close()
            raise UserError(f"{path.parent}: another process is writing this folder")
        self.replay()

    def replay(self) -> None:
        """Read the file from its start, with what other processes have added since."""
        self.where: dict[str, tuple[int, int]] = {}
        self.damaged = offset = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                try:
                    key, row = self._parse(line)
                    self.where[key] = (offset + line.index(row), len(row))
                except ValueError:
                    self.damaged += 1
                    log.warning("%s: damaged line at byte %d: dropped", self.path, offset)
                offset += len(line)

    def _parse(self, line: bytes) -> tuple[str, bytes]:
        crc, _, rest = line[:-1].partition(b" ")
        key, tab, row = rest.partition(b"\t")
        if line[-1:] == b"\n" and tab and crc == b"%08x" % zlib.crc32(rest):
            return json.loads(key), row
        if self.older is None or line[-1:] != b"\n":
            raise ValueError("not a line of this journal")
        return self.older(line[:-1])

    def append(self, rows: Mapping[str, str]) -> None:
        """Write ``key → row`` (JSON without newlines), all or none, and fsync once.

        Raises:
            UserError: the disk is full or gone.
        """
        block, lengths = bytearray(), {}
        for key, row in rows.items():
            rest = json.dumps(key).encode() + b"\t" + row.encode()
            block += b"%08x " % zlib.crc32(rest) + rest + b"\n"
            lengths[key] = (len(block) - 1, len(row.encode()))
        with open_log(self.path) as handle:
            if self.shared:
                lock_file(handle, wait=True)
            torn = _line_end(handle)
            try:
                start = append_bytes(handle, torn + block) + len(torn)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        for key, (end, length) in lengths.items():
            self.where[key] = (start + end - length, length)

    def __contains__(self, key: object) -> bool:
        return key in self.where

    def rows(self, keys: Iterable[str]) -> Iterator[bytes]:
        """The rows of these keys, in this order."""
        with open(self.path, "rb") as handle:
            for key in keys:
                offset, length = self.where[key]
                handle.seek(offset)
                yield handle.read(length)

    def write(self, target: Path, order: Iterable[str]) -> None:
        """The rows of these keys, in this order, to ``target``, atomically."""
        with replacing(target) as out:
            for row in self.rows(order):
                out.write(row + b"\n")

    def close(self, remove: bool = False) -> None:
        if remove:
            self.path.unlink()
        self._held.close()
