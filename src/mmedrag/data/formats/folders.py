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
from mmedrag.data.formats.released import STYLES
from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import KINDS, Writer
from mmedrag.records import UserError
from mmedrag.runtime import read_json, write_json

_DATA = ("examples.jsonl", "corpus.jsonl")  # one of them makes a folder a DATA folder
_LEFT = ("benchmark.json",)  # says how one folder was made, not what is in it


def load(src: Path, writer: Writer) -> None:
    """Fill ``writer`` from the DATA folders at and below ``src``.

    Raises:
        UserError: none there.
    """
    folders = sorted({path.parent for name in _DATA for path in src.rglob(name)})
    if not folders:
        raise UserError(f"{src}: no data folder in it, expected {' or '.join(_DATA)}")
    styles: dict[str, Any] = {}
    for folder in folders:
        name = folder.relative_to(src).as_posix()
        prefix = "" if name == "." else f"{name}/"
        for kind in KINDS:
            path = folder / f"{kind}.jsonl"
            if path.is_file() and path.stat().st_size:
                use = partial(_row, folder=folder, prefix=prefix, writer=writer, kind=kind)
                import_rows(rows_of([(path, prefix + path.name)], writer), writer, use)
        own = read_json(folder / STYLES) if (folder / STYLES).is_file() else {}
        styles |= {prefix + file: style for file, style in own.items()} if _object(own) else {}
        writer.result.notes += [
            f"{prefix}{left} is not joined" for left in _LEFT if (folder / left).is_file()
        ]
    if styles:
        write_json(writer.out / STYLES, styles, indent=2, own=True)


def _row(row: SourceRow, folder: Path, prefix: str, writer: Writer, kind: str) -> None:
    if not _object(row.value):
        raise UserError("expected an object")
    fields: dict[str, Any] = dict(row.value)
    fields |= {key: prefix + fields[key] for key in ("id", "study") if _text(fields.get(key))}
    for key in ("reference_ids", "trace_ids"):
        if isinstance(fields.get(key), list):
            fields[key] = [prefix + one if _text(one) else one for one in fields[key]]
    meta = dict(fields["meta"]) if _object(fields.get("meta")) else {}
    if _text(meta.get("study")):
        meta["study"] = prefix + meta["study"]
    origin: Any = meta.get("released")  # which line of which released file it was
    if _object(origin) and _text(origin.get("file")):
        meta["released"] = origin | {"file": prefix + origin["file"]}
    sides = ("chosen", "rejected") if kind == "pairs" else ()
    gone = list(meta.get("missing_images") or [])
    fields |= {side: dict(fields[side]) for side in sides if _object(fields.get(side))}
    for holder in [fields[side] for side in sides if side in fields] or [fields]:
        if "image" in holder:
            holder["image"], missing = images_of(holder["image"], [folder], writer, prefix=prefix)
            gone += [name for name in missing if name not in gone]
    if meta or gone:
        fields["meta"] = meta | ({"missing_images": gone} if gone else {})
    add = {"examples": writer.example, "corpus": writer.reference}
    (add | {"pairs": writer.pair, "truth": writer.truth})[kind](row, **fields)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any) -> bool:
    return isinstance(value, dict)
