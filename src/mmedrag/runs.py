"""Run folders: what was run, on what, with which versions, and a log that survives a kill.

Place in the picture: around the pipeline. ``RUN/config.json`` is written before work starts;
finished rows are appended to a journal and fsynced; at the end the rows go, in input order, to
``RUN/traces.jsonl`` in one atomic step. The same command goes on where a killed one stopped and
ends with the same bytes, because the unit of work (a chunk) is repeated whole or not at all.
Times live in ``RUN/timings.jsonl``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from mmedrag.types import UserError

log = logging.getLogger(__name__)
PACKAGES = (
    "numpy", "pydantic", "pillow", "torch", "transformers", "tokenizers", "peft", "trl",
    "accelerate", "faiss-cpu", "pyarrow", "scikit-learn", "sacrebleu", "rouge-score", "nltk",
    "open_clip_torch", "openai",
)  # fmt: skip

# equal in a run that goes on
IDENTITY = ("command", "settings", "system", "seeds", "inputs", "images")


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


def inputs(named: Mapping[str, Path]) -> dict[str, str]:
    """name → sha256 of every input, in sorted order."""
    return {name: sha256(named[name]) for name in sorted(named)}


def picture_inputs(paths: Iterable[Path]) -> dict[str, Any]:
    """Names and sizes of the images a run reads, as one hash: hashing their contents would read
    a large set twice. A missing file is left for its row to report."""
    digest, count, size = hashlib.sha256(), 0, 0
    for path in sorted(set(paths)):
        length = path.stat().st_size if path.is_file() else -1
        digest.update(f"{path}\0{length}\n".encode())
        count, size = count + 1, size + max(length, 0)
    return {"count": count, "bytes": size, "sha256_of_names_and_sizes": digest.hexdigest()}


def environment() -> dict[str, Any]:
    """Versions and commit, without importing any of the packages."""
    from mmedrag import __version__

    versions = {"python": platform.python_version(), "mmedrag": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "commit": commit(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "cpus": os.cpu_count(),
    }


def commit() -> str | None:
    """The git commit of this checkout (with ``+changes``), None for an installed package."""
    here = Path(__file__).resolve().parent
    if not (here.parent.parent / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


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


def claim(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write ``config.json``, or check that a folder to go on with was made by the same call.

    Settings and inputs must be equal; other versions or another commit are only reported, and
    the folder keeps what it was begun with.
    """
    path = folder / "config.json"
    config = json.loads(json.dumps(config))
    if not path.exists():
        if folder.is_dir() and any(p.suffix != ".part" for p in folder.iterdir()):
            raise UserError(f"{folder}: not empty and no run folder; choose another --out")
        write_json(path, config)
        return config
    begun = read_json(path)
    for part in IDENTITY:
        if begun.get(part) != config.get(part):
            what = difference(begun.get(part), config.get(part))
            raise UserError(f"{folder}: was begun with other {part} ({what}); choose another --out")
    if begun.get("environment") != config.get("environment"):
        what = difference(begun.get("environment"), config.get("environment"))
        log.warning("%s: goes on in another environment (%s)", folder, what)
    return begun


def difference(a: Any, b: Any, where: str = "") -> str:
    """The first place in which two JSON values differ, for a message."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return difference(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {json.dumps(a)[:60]} before, {json.dumps(b)[:60]} now"
