"""Files: every write is whole or absent, every hash is one of two functions.

Place in the picture: below everything that keeps something. A file is written beside its target,
made durable and renamed onto it (``replacing`` and what stands on it), so that a
kill, a power cut or a full disk leaves the old file or the new one. ``new_folder`` does the
same for a folder. What grows line by line is a ``journal``. ``sha256`` is the content hash that
manifests, run folders and lists of training rows hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import ValidationError

from mmedrag.records import Record, UserError

R = TypeVar("R", bound=Record)
UNFINISHED = ".unfinished"  # in a folder that new_folder is filling
PART = re.compile(r"\.mmedrag-[0-9a-f]{16}\.part")  # name of what is not finished
LEDGER = ".mmedrag.json"  # in a folder of results: name of each file that we wrote → its hashes


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


# --- writing -------------------------------------------------------------------------------------


def part_of(path: Path) -> Path:
    """Where a file or folder lies until it is whole: a name that nobody else gives, and the same
    at each try, so that what a kill has left is written over and not heaped up."""
    digest = hashlib.sha256(b"mmedrag\0" + os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".mmedrag-{digest}.part")


def _open_part(part: Path) -> BinaryIO:
    """Empty and locked: a writer that lives is waited for, what a killed one left is cleared."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags & ~os.O_TRUNC | os.O_NOFOLLOW, 0o666)

    while True:
        handle = open(part, "wb", opener=opener)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), os.lstat(part)):
                handle.truncate(0)
                return handle
        handle.close()  # whoever had it has given it its name


def check_own(*paths: str | Path) -> None:
    """That these files may be written: none is there, or what is there we wrote.

    Raises:
        UserError: a file that the ledger of its folder does not name with its hash.
    """
    for path in map(Path, paths):
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a file to write to")
        if path.exists() and sha256(path) not in _ledger(path.parent).get(path.name, []):
            raise UserError(
                f"{path}: is there already and is not, or no longer, what this command wrote; move "
                "it away or choose another --out"
            )


def _ledger(folder: Path) -> dict[str, list[str]]:
    path = folder / LEDGER
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(row, list) for row in found.values()):
        raise UserError(f"{path}: not a list of the results that were written here; move it away")
    return found


def _vouch(path: Path, digest: str) -> None:
    """Say in the ledger that a file of this content is ours, before it gets its name."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = _ledger(path.parent)
        there = [sha256(path)] if path.exists() else []
        known[path.name] = list(dict.fromkeys([*there, digest]))
        write_json(path.parent / LEDGER, known, sort_keys=True)
    finally:
        os.close(folder)


@contextmanager
def replacing(path: str | Path, own: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write to, which becomes ``path`` at the end of the block, or does not.

    It lies beside ``path`` (a rename does not cross file systems) and is fsynced before the
    rename; the folder is fsynced after it. On an error it is removed and ``path`` stays. ``own``:
    only over a file that we wrote (:func:`check_own`), which the folder's ledger then tells.

    Raises:
        UserError: the file cannot be written (a full disk, no permission, somebody else's).
    """
    path = Path(path)
    if own:
        check_own(path)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_part(part) as handle:
            try:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
                if own:
                    _vouch(path, sha256(part))
                os.replace(part, path)
            except BaseException:
                _remove(part)  # while it is locked
                raise
        sync(path.parent)
    except OSError as error:  # its file name tells ours from one that the block reads
        if error.filename is None or Path(error.filename) in (part, *path.parents):
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def write_bytes(path: str | Path, data: bytes, own: bool = False) -> None:
    with replacing(path, own) as out:
        out.write(data)


def write_text(path: str | Path, text: str, own: bool = False) -> None:
    """As UTF-8, with the line ends that ``text`` has."""
    write_bytes(path, text.encode(), own)


def write_json(
    path: str | Path, value: Any, indent: int = 1, sort_keys: bool = False, own: bool = False
) -> None:
    """Indented JSON and a line end. NaN and infinity, which JSON does not have, are refused."""
    options: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False}
    write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys, **options) + "\n", own)


def write_jsonl(
    path: str | Path, rows: Iterable[Record | Mapping[str, Any] | str], own: bool = False
) -> int:
    """JSON Lines from records, from objects, or from rows that are JSON already. Returns how
    many."""
    count = 0
    with replacing(path, own) as out:
        for row in rows:
            count += 1
            if isinstance(row, Record):
                row = row.to_json()
            text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
            out.write(text.encode() + b"\n")
    return count


def write_unsynced(path: Path, data: bytes) -> None:
    """One of thousands of small files: whole after a kill, durable only after :func:`sync`.

    fsync of a file and its folder takes 2 to 6 ms, a third of the time in which a picture is
    drawn or imported; of many at once 0.2 ms each, because the disk takes them together. So
    pictures are renamed into place without it, and made durable in groups before the row or
    journal line that vouches for them is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        with _open_part(part) as handle:
            try:
                handle.write(data)
                handle.flush()
                os.replace(part, path)
            except BaseException:
                _remove(part)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _remove(part: Path) -> None:
    """Without a word: the error that is on its way says more."""
    with suppress(OSError):
        part.unlink()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which appears at ``out`` complete and durable, or not at all.

    Raises:
        UserError: ``out`` exists already.
    """
    if out.exists():
        raise UserError(f"{out}: exists already, expected a new folder")
    part = part_of(out)
    mark = part / UNFINISHED
    if part.is_dir() and any(part.iterdir()) and not mark.is_file():
        raise UserError(f"{part}: is in the way and not ours; move it or choose another name")
    part.mkdir(parents=True, exist_ok=True)
    with open(mark, "ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing here, try again later") from None
        try:
            for left in set(part.iterdir()) - {mark}:  # of a call that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield part
            mark.unlink()
            sync(*part.rglob("*"), part)
            os.replace(part, out)
            sync(out.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def sync(*paths: Path) -> None:
    """fsync of files and folders: what was written, or renamed in them, survives a power cut."""
    if len(paths) == 1:
        _fsync(paths[0])
    elif paths:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_fsync, paths))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading -------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


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


# --- hashes --------------------------------------------------------------------------------------


def sha256(path: str | Path) -> str:
    """Content hash (hexadecimal) of a file, or of a folder with all its files."""
    path = Path(path)
    if path.is_dir():
        return sha256_of(path, (p for p in path.rglob("*") if p.is_file()))
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def sha256_of(folder: Path, files: Iterable[Path]) -> str:
    """Hash over names (below ``folder``) and contents of some files, whatever their order."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(folder).as_posix()}\0{sha256(file)}\n".encode())
    return total.hexdigest()
