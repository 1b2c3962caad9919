"""What a model was trained on: row, patient and image of every training row.

Place in the picture: written by every training, read by the held-out rule of preference pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mmedrag.records import Row


def write_train_ids(path: Path, rows: Sequence[Row]) -> None:
    """id, patient and sha256 of the image file of every training row (for leakage checks)."""
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        for row in sorted(rows, key=lambda r: r.id):
            for image in row.images[:1]:
                digest = hashlib.sha256(image.read_bytes()).hexdigest() if image.exists() else None
                entry = {"id": row.id, "patient": row.patient, "image_sha256": digest}
                handle.write(json.dumps(entry, ensure_ascii=False) + "\n")
