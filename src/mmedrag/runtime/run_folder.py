"""Run folders: what was run, on what, with which versions, and a log that survives a kill.

Place in the picture: around the pipeline. ``RUN/config.json`` is written before work starts;
finished rows are appended to a journal and fsynced; at the end the rows go, in input order, to
``RUN/traces.jsonl`` in one atomic step. The same command goes on where a killed one stopped and
ends with the same bytes, because the unit of work (a chunk) is repeated whole or not at all.
Times live in ``RUN/timings.jsonl``; ``RUN/finished.json`` holds count and hash of the traces, so
that a run that lost some later is found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mmedrag.records import UserError
from mmedrag.runtime.files import PART, read_json, sha256, write_json

log = logging.getLogger(__name__)
PACKAGES = (
    "numpy",
    "pydantic",
    "pillow",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "trl",
    "accelerate",
    "faiss-cpu",
    "pyarrow",
    "scikit-learn",
    "sacrebleu",
    "rouge-score",
    "nltk",
    "open_clip_torch",
    "openai",
)
FINISHED = "finished.json"

# equal in a run that goes on
IDENTITY = ("command", "settings", "system", "seeds", "inputs", "images")


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
    here = Path(__file__).resolve().parents[1]
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


def claim(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write ``config.json``, or check that a folder to go on with was made by the same call.

    Settings and inputs must be equal; other versions or another commit are only reported, and
    the folder keeps what it was begun with.
    """
    path = folder / "config.json"
    config = json.loads(json.dumps(config))
    if not path.exists():
        if folder.is_dir() and any(not PART.fullmatch(p.name) for p in folder.iterdir()):
            raise UserError(f"{folder}: not empty and no run folder; choose another --out")
        write_json(path, config)
        return config
    begun = read_json(path)
    if not isinstance(begun, dict):
        raise UserError(f"{path}: not the config of a run; choose another --out")
    for part in IDENTITY:
        if begun.get(part) != config.get(part):
            what = difference(begun.get(part), config.get(part))
            raise UserError(f"{folder}: was begun with other {part} ({what}); choose another --out")
    if begun.get("environment") != config.get("environment"):
        what = difference(begun.get("environment"), config.get("environment"))
        log.warning("%s: goes on in another environment (%s)", folder, what)
    return begun


def finish(folder: Path, traces: str) -> None:
    """Note what a finished run holds."""
    write_json(
        folder / FINISHED, {traces: {"rows": _rows(folder / traces), **_content(folder / traces)}}
    )


def check_finished(folder: Path) -> None:
    """That a finished run still holds what it held (one of before this note holds anything).

    Raises:
        UserError: rows or bytes were lost or changed since.
    """
    note = folder / FINISHED
    for name, held in (read_json(note) if note.exists() else {}).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: gone since the run was finished; choose another --out")
        if _content(path) != {key: held.get(key) for key in ("bytes", "sha256")}:
            raise UserError(
                f"{path}: {_rows(path)} rows, {path.stat().st_size} bytes, expected "
                f"{held.get('rows')} rows, {held.get('bytes')} bytes as the run was finished (or "
                "its sha256 differs): rows were lost or changed; run it again with another --out"
            )


def _content(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _rows(path: Path) -> int:
    with open(path, "rb") as lines:
        return sum(1 for _ in lines)


def difference(a: Any, b: Any, where: str = "") -> str:
    """The first place in which two JSON values differ, for a message."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return difference(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {json.dumps(a)[:60]} before, {json.dumps(b)[:60]} now"
