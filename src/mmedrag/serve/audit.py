"""The audit log: who asked when, of which picture, with which versions. Append-only.

One JSON line per answer, opened for appending only, fsynced before the answer is given. Each
line holds the hash of the line before it, so that a changed or removed line is found
(:func:`verify`). No text of a question, answer or report, and no file name, is written.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedrag.records import UserError
from mmedrag.runtime import append_bytes, lock_file, open_log

START = "0" * 64


class Audit:
    """An audit log file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last = START  # hash of the last line
        self._lock = threading.Lock()
        try:
            self._file = open_log(self.path, 0o600)
        except OSError as error:
            raise UserError(f"{path}: audit log cannot be opened: {error.strerror}") from None
        if not lock_file(self._file):
            self._file.close()
            raise UserError(f"{path}: another service writes this audit log")
        self._mend()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records durably, all or none.

        Raises:
            OSError: the disk is full or gone; nothing of these records stays behind.
        """
        with self._lock:
            last = self._last
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            lines = []
            for record in records:
                line = json.dumps({"time": now, **record, "previous": last}, ensure_ascii=False)
                lines.append(line.encode() + b"\n")
                last = hashlib.sha256(lines[-1]).hexdigest()
            append_bytes(self._file, b"".join(lines))
            self._last = last

    def close(self) -> None:
        self._file.close()

    def _mend(self) -> None:
        """Find the last line; cut off what a kill left half-written."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        if not _is_first(lines[0] if lines else data):
            raise UserError(f"{self.path}: not an audit log, expected a new file or one of ours")
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        self._last = hashlib.sha256(lines[-1]).hexdigest() if lines else START


def _is_first(line: bytes) -> bool:
    """Whether a log of ours begins so: with its first record, whole or cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return not line.endswith(b"\n") and b'{"time": "'.startswith(line[:10])
    return isinstance(record, dict) and record.get("previous") == START


def verify(path: str | Path) -> int:
    """How many records the log holds, when its chain is whole.

    Raises:
        UserError: the first line that was changed, or follows one that was.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    last, count = START, 0
    for count, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            previous = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{count}: not an audit record") from None
        if previous != last:
            raise UserError(f"{path}:{count}: does not follow the line before it: altered")
        last = hashlib.sha256(line).hexdigest()
    return count
