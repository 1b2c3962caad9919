"""``data import data``: several DATA folders become one.

SRC is a folder with DATA folders below it (or one of them). Ids, studies and stored images get the
folder's name before them; splits and everything else stay. Whether a patient or a picture then
stands in two splits is what ``data check`` says.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmedrag.data.common import images_of, import_rows, rows_of
from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import Writer
from mmedrag.records import UserError

_FILES = ("examples.jsonl", "corpus.jsonl")


def load(src: Path, writer: Writer) -> None:
    """Fill ``writer`` from the DATA folders at and below ``src``.

    Raises:
        UserError: none there.
    """
    folders = sorted({path.parent for name in _FILES for path in src.rglob(name)})
    if not folders:
        raise UserError(f"{src}: no data folder in it, expected {' or '.join(_FILES)}")
    for folder in folders:
        name = folder.relative_to(src).as_posix()
        prefix = "" if name == "." else f"{name}/"
        for file in _FILES:
            path = folder / file
            if path.is_file() and path.stat().st_size:
                add = writer.example if file == "examples.jsonl" else writer.reference
                use = partial(_row, folder=folder, prefix=prefix, writer=writer, add=add)
                import_rows(rows_of([(path, prefix + file)], writer), writer, use)
        for left in ("pairs.jsonl", "truth.jsonl"):
            if (folder / left).is_file():
                writer.result.notes.append(f"{prefix}{left} is not joined")


def _row(row: SourceRow, folder: Path, prefix: str, writer: Writer, add: Any) -> None:
    if not isinstance(row.value, dict):
        raise UserError("expected an object")
    fields: dict[str, Any] = dict(row.value)
    fields["image"], missing = images_of(fields.get("image"), [folder], writer, prefix=prefix)
    if isinstance(fields.get("id"), str):
        fields["id"] = prefix + fields["id"]
    meta = fields.get("meta")
    if isinstance(meta, dict):
        study = meta.get("study")
        fields["meta"] = meta | ({"study": prefix + study} if isinstance(study, str) else {})
    if missing:
        known = (fields.get("meta") or {}).get("missing_images") or []
        fields["meta"] = (fields.get("meta") or {}) | {"missing_images": [*known, *missing]}
    add(row, **fields)
