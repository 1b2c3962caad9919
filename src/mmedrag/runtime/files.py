"""Files that are whole or not there: atomic writes, hashes, JSON and JSON Lines.

Place in the picture: under everything that reads or writes. A bad row becomes one line with file,
line, field and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mmedrag.records import Record, UserError

R = TypeVar("R", bound=Record)


class BadRow(Record):
    """A row that could not be used; one line of ``rejected.jsonl``."""

    file: str
    line: int
    reason: str
    row: Any = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def explain(error: ValidationError) -> str:
    """The first validation error as ``field: what is wrong`` on one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) else f", got {given!r:.60}"
    return " ".join(f"{where + ': ' if where else ''}{message}{shown}".split())


def read_jsonl(path: Path, record: type[R], rejected: list[BadRow] | None = None) -> Iterator[R]:
    """Yield the valid rows of a JSON Lines file.

    A bad row is appended to ``rejected`` when a list is given, otherwise it raises
    :class:`UserError` with file, line, field and what was expected. Blank lines are skipped.
    """
    try:
        handle = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield record.from_json(line)
            except ValidationError as error:
                bad = BadRow(
                    file=str(path),
                    line=number,
                    reason=explain(error),
                    row=line.decode("utf-8", "replace").rstrip("\n"),
                )
                if rejected is None:
                    raise UserError(str(bad)) from None
                rejected.append(bad)


def write_jsonl(path: Path, rows: Iterable[Record]) -> int:
    """Write rows atomically (temporary file, fsync, rename). Returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = 0
    with open(part, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(row.to_json() + "\n")
            count += 1
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    return count


def sha256(path: str | Path) -> str:
    """Content hash of a file, or of a folder (names and contents of all files, sorted)."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    try:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> None:
    """JSON Lines from objects, or from rows that are JSON already; atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False))
            handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    with open(part, "w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def append_line(path: Path, text: str) -> None:
    """Append a line to a side file; a line that a kill cut short is ended first."""
    with open(path, "a+b") as side:
        if size := side.seek(0, os.SEEK_END):
            side.seek(size - 1)
            side.write(b"" if side.read(1) == b"\n" else b"\n")
        side.write(text.encode() + b"\n")


def sync_folder(path: Path) -> None:
    """fsync of a directory, so that a rename survives a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
