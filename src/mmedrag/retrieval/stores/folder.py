"""A folder whose content changes all at once: numbered files, then one atomic manifest.

Place in the picture: under the index. ``commit`` writes the files of a new generation, makes
them durable, and only then replaces ``manifest.json``; a process killed at any moment leaves
the old or the new state. Readers need no lock: they open what the manifest names and try again
if a writer has replaced it in between. One writer at a time, by a lock that dies with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmedrag.records import UserError
from mmedrag.runtime import PART, lock_file, open_log, sha256, sync, write_json

MANIFEST, LOCK, FORMAT = "manifest.json", ".lock", 1
REPAIR = "build it again with the same command (embeddings in its cache are reused)"
T = TypeVar("T")


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
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], limit: int | None = None) -> list[str]:
    """What is wrong with the files: missing, wrong size, wrong sha256 (up to ``limit`` bytes)."""
    wrong = []
    for name, entry in sorted(manifest["files"].items()):
        path = folder / name
        if not path.exists():
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
    with open_log(folder / LOCK) as handle:
        if not lock_file(handle):
            raise UserError(f"{folder}: another process is writing here, try again later")
        yield


def commit(
    folder: Path, manifest: dict[str, Any], files: dict[str, Callable[[Path], Any]]
) -> dict[str, Any]:
    """Write a new generation and switch to it. Call with the :func:`writer` lock held.

    Args:
        manifest: settings; ``generation``, ``files`` and ``seal`` are filled in.
        files: stem and suffix (``"rows.parquet"``) -> function that writes that file and
            returns settings to store in the manifest under the stem, or None.
    """
    current = folder / MANIFEST
    generation = read_manifest(folder)["generation"] + 1 if current.exists() else 1
    sweep(folder)
    entries: dict[str, Any] = {}
    for name, write in files.items():
        stem, _, suffix = name.partition(".")
        path = folder / f"{stem}-{generation:06d}.{suffix}"
        settings = write(path)
        entries[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        if settings is not None:
            manifest = {**manifest, stem: settings}
    sync(*(folder / name for name in entries), folder)
    manifest = {**manifest, "format": FORMAT, "generation": generation, "files": entries}
    manifest["seal"] = _seal(manifest)
    write_json(current, manifest, sort_keys=True)
    sweep(folder)
    return manifest


def sweep(folder: Path) -> None:
    """Delete files of other generations: leftovers of a killed writer, or the one replaced."""
    named = set(read_manifest(folder)["files"]) if (folder / MANIFEST).exists() else set()
    for path in folder.iterdir():
        numbered = path.stem.rpartition("-")[2].isdigit() and path.name not in named
        if path.is_file() and (numbered or path.suffix == PART):
            path.unlink()
