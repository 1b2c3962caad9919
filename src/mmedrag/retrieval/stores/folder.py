"""A folder whose content changes all at once: numbered files, then one atomic manifest.

Place in the picture: under the index. ``commit`` writes the files of a new generation, makes
them durable, and only then replaces ``manifest.json``; a process killed at any moment leaves
the old or the new state. Readers need no lock: they open what the manifest names and try again
if a writer has replaced it in between. One writer at a time, by a lock that dies with it.

Nothing is deleted or overwritten that is not proven to be ours: before a generation is written,
the lock file notes the names that it will use (none of which is there yet) and the hashes of the
files that it replaces. The next writer finishes what the note of a killed one names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmedrag.records import UserError
from mmedrag.runtime import PART, lock_file, open_log, part_of, sha256, sync, write_json

MANIFEST, LOCK, FORMAT = "manifest.json", ".lock", 1
REPAIR = "build it again with the same command (embeddings in its cache are reused)"
NUMBERED = re.compile(r"[a-z]+-(\d{6})\.[a-z]+")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Damaged(UserError):
    """The folder does not hold what its manifest says."""


def _seal(manifest: dict[str, Any]) -> str:
    """Checksum of the manifest itself, over everything but the seal."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The committed manifest.

    Raises:
        UserError: no index here, or (:class:`Damaged`) a manifest that was changed.
    """
    path = folder / MANIFEST
    if path.is_symlink():
        raise UserError(f"{path}: a link, expected the manifest of an index")
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no index here, expected a folder with {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise Damaged(f"{path}: damaged (not JSON); {REPAIR}") from None
    if not isinstance(manifest, dict) or manifest.get("seal") != _seal(manifest):
        raise Damaged(f"{path}: damaged (its checksum differs); {REPAIR}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')}, expected {FORMAT}")
    for name in manifest["files"]:
        if not NUMBERED.fullmatch(name):
            raise Damaged(f"{path}: names the file {name!r}, expected files of the index itself")
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], limit: int | None = None) -> list[str]:
    """What is wrong with the files: missing, wrong size, wrong sha256 (up to ``limit`` bytes)."""
    wrong = []
    for name, entry in sorted(manifest["files"].items()):
        path = folder / name
        if path.is_symlink():
            wrong.append(f"{name}: a link, expected a file of the index itself")
        elif not path.exists():
            wrong.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif (limit is None or entry["bytes"] <= limit) and sha256(path) != entry["sha256"]:
            wrong.append(f"{name}: sha256 differs from the manifest")
    return wrong


def consistent(folder: Path, load: Callable[[dict[str, Any]], T]) -> T:
    """``load(manifest)``, again from the new manifest if a writer committed meanwhile."""
    while True:
        manifest = read_manifest(folder)
        try:
            return load(manifest)
        except (OSError, UserError):
            if read_manifest(folder)["generation"] == manifest["generation"]:
                raise


@contextmanager
def writer(folder: Path) -> Iterator[None]:
    """Hold the folder's write lock; it is released when the process ends, however it ends."""
    if not _plain_lock(folder / LOCK):
        raise UserError(f"{folder / LOCK}: not the lock of an index, expected another folder")
    with open_log(folder / LOCK) as handle:
        if not lock_file(handle):
            raise UserError(f"{folder}: another process is writing here, try again later")
        yield


def commit(
    folder: Path,
    manifest: dict[str, Any],
    files: dict[str, Callable[[Path], Any]],
    note: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a new generation and switch to it. Call with the :func:`writer` lock held.

    Args:
        manifest: settings; ``generation``, ``files`` and ``seal`` are filled in.
        files: stem and suffix (``"rows.parquet"``) -> function that writes that file and
            returns settings to store in the manifest under the stem, or None.
        note: what else :func:`settle` tells the next writer, if this one is killed.
    """
    current = folder / MANIFEST
    settle(folder)
    before: dict[str, Any] = {"generation": 0, "files": {}}
    if current.exists():
        before = read_manifest(folder)
    taken = [int(found[1]) for p in folder.iterdir() if (found := NUMBERED.fullmatch(p.name))]
    generation = max([before["generation"], *taken]) + 1
    names = {
        name: f"{stem}-{generation:06d}.{suffix}"
        for name, (stem, _, suffix) in ((name, name.partition(".")) for name in files)
    }
    replaced = {name: entry["sha256"] for name, entry in before["files"].items()}
    _note(folder, {**(note or {}), "written": [*names.values()], "replaced": replaced})
    entries: dict[str, Any] = {}
    for name, write in files.items():
        path = folder / names[name]
        try:
            settings = write(path)
        except (OSError, RuntimeError) as error:  # FAISS says a full disk by the latter
            _delete(folder)
            raise UserError(f"{path}: cannot be written: {str(error)[:200]}") from None
        entries[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        if settings is not None:
            manifest = {**manifest, name.partition(".")[0]: settings}
    sync(*(folder / name for name in entries), folder)
    manifest = {**manifest, "format": FORMAT, "generation": generation, "files": entries}
    manifest["seal"] = _seal(manifest)
    write_json(current, manifest, sort_keys=True)
    _delete(folder)
    return manifest


def _plain_lock(path: Path) -> bool:
    """Nothing, or a file that a writer of an index made: empty, or with its note."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return False
    return not path.exists() or path.read_bytes()[:2] in (b"", b"{", b'{"')


def _note(folder: Path, note: dict[str, Any] | None) -> None:
    """Say in the lock file what is about to be done; None: all is done."""
    with open(folder / LOCK, "r+b", buffering=0) as handle:
        handle.truncate(0)
        if note is not None:
            handle.write(json.dumps(note).encode() + b"\n")
        os.fsync(handle.fileno())


def pending(folder: Path) -> dict[str, Any]:
    """What the last writer was about to do, if it was killed; else an empty note."""
    try:
        note = json.loads((folder / LOCK).read_bytes() or b"{}")
    except (OSError, ValueError):  # a note that was cut short: nothing had been done yet
        return {}
    return note if isinstance(note, dict) else {}


def settle(folder: Path) -> dict[str, Any]:
    """Finish what the note of a killed writer names; the note. Call with the lock held."""
    note = pending(folder)
    _delete(folder)
    return note


def _delete(folder: Path) -> None:
    """Delete what the note names and the manifest does not, then the note."""
    note = pending(folder)
    if not note:
        return
    named = set(read_manifest(folder)["files"]) if (folder / MANIFEST).exists() else set()
    for name in set(note.get("written", [])) - named:
        if NUMBERED.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
    for name, digest in note.get("replaced", {}).items():
        path = folder / name
        if name in named or not NUMBERED.fullmatch(name) or not path.is_file():
            continue
        if sha256(path) == digest:
            path.unlink()
        else:
            log.warning("%s: left, it is not the file that this index wrote", path)
    part_of(folder / MANIFEST).unlink(missing_ok=True)
    _note(folder, None)


def set_aside(folder: Path) -> None:
    """Rename a damaged manifest, so that a build can begin again beside it."""
    number = 1
    while (aside := folder / f"{MANIFEST}.damaged-{number}").exists():
        number += 1
    os.replace(folder / MANIFEST, aside)
    log.warning("%s: kept as %s", folder / MANIFEST, aside.name)


def is_ours(folder: Path, own: Callable[[Path], bool]) -> bool:
    """May an index be built here: in a new or empty folder, over an index, or where a build was
    killed or its manifest damaged? ``own``: whether an entry beside them belongs to an index."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not _plain_lock(folder / LOCK):
        return False
    try:
        read_manifest(folder)
        return True
    except Damaged:
        marks = {LOCK, MANIFEST}
        names = {path.name for path in folder.iterdir()}
        rows = {name for name in names if NUMBERED.fullmatch(name)}
        if not rows or LOCK not in names:
            return False
    except UserError:
        marks, rows = {LOCK}, set(pending(folder).get("written", []))
    marks |= rows
    return all(
        path.name in marks
        or path.name.startswith(MANIFEST + ".damaged-")
        or PART.fullmatch(path.name)
        or own(path)
        for path in folder.iterdir()
    )
