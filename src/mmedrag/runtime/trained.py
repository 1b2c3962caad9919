"""What a model was trained on, for the checks that nobody is tested on it.

Place in the picture: beside the model card. ``train_ids.jsonl`` lists every training row; pair
building and evaluation refuse its patients and pictures (``preference.pairs.held_out``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmedrag.records import Row
from mmedrag.runtime.files import sha256, write_jsonl


def write_train_ids(path: Path, rows: Sequence[Row]) -> None:
    """id, patient and sha256 of the first image file (None: it is not there) of every row."""
    listed = [(row, row.images[0]) for row in sorted(rows, key=lambda r: r.id) if row.images]
    write_jsonl(
        path,
        (
            {
                "id": row.id,
                "patient": row.patient,
                "image_sha256": sha256(image) if image.exists() else None,
            }
            for row, image in listed
        ),
    )
