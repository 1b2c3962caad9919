"""The held-out rule: no pair from the retriever's training data, none from a test patient.

Place in the picture: guards traces ─► pairs. A pair whose image the retriever was trained on sees
its own report come back, and one of a test patient leaks the test set into the alignment.

Training folders list what they saw in ``train_ids.jsonl`` (id, patient, image sha256).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmedrag.records import Example, Trace, UserError, _Row
from mmedrag.runtime import sha256

HASH_FIELDS = ("image_sha256", "sha256", "image")


@dataclass
class HeldOut:
    """What pairs may not come from, each with where it was seen (for the count)."""

    patients: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)

    def add_trained(self, folder: Path, label: str = "retriever") -> HeldOut:
        """Add the ``train_ids.jsonl`` of a trained folder (or that file itself)."""
        path = folder / "train_ids.jsonl" if folder.is_dir() else folder
        for number, row in _rows(path):
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected an object with id, patient, sha256")
            if row.get("patient"):
                self.patients.setdefault(str(row["patient"]), f"{label}_patient")
            for name in HASH_FIELDS:
                for value in _listed(row.get(name)):
                    self.images.setdefault(value, f"{label}_image")
        return self

    def add_test(self, rows: Iterable[Example | _Row]) -> HeldOut:
        """Add the patients and images of the rows whose split is ``test``."""
        for row in rows:
            if row.split != "test":
                continue
            if row.patient:
                self.patients.setdefault(row.patient, "test_patient")
            for path in row.images:
                for value in image_hashes(path):
                    self.images.setdefault(value, "test_image")
        return self

    def violation(self, trace: Trace, root: Path | None) -> str | None:
        """Why a trace may not give a pair (``retriever_patient``, ``test_image``, …), or None."""
        if trace.patient and trace.patient in self.patients:
            return self.patients[trace.patient]
        if not self.images:
            return None
        for name in _listed(trace.image):
            for value in image_hashes((root or Path()) / name):
                if value in self.images:
                    return self.images[value]
        return None


@lru_cache(maxsize=65536)
def image_hashes(path: Path) -> tuple[str, ...]:
    """sha256 of the file's bytes and of its decoded pixels; an unreadable file has none."""
    from mmedrag.images import files, pixel_hash

    try:
        of_bytes = sha256(path)
    except UserError:
        return ()
    try:
        return of_bytes, pixel_hash(files.load_image(path))
    except UserError:  # undecodable (`data check` reports it): its bytes still identify the file
        return (of_bytes,)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(v) for v in value or []]


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; expected a trained folder") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON: {error}") from None
