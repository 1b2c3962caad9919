"""``data import manifest``: one JSON Lines row per image, as public sets are often prepared.

Row: ``id, domain, modality, image, text, text_kind, labels, qa, patient, source, licence,
attribution`` (docs/data.md). Every row gives a corpus row, every ``qa`` a vqa example, every
row with a ``report``, ``caption`` or ``note`` also a report example.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedrag.data.common import (
    IMAGE_KEYS,
    ImageRoot,
    extra_fields,
    image_roots,
    images_of,
    import_rows,
    is_placeholder,
    named_images,
    rows_of,
    split_named,
    text_of,
)
from mmedrag.data.options import choice_of
from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import Writer
from mmedrag.records import UserError

TEXT_KINDS = ("report", "caption", "note", "labels", "none")
WRITTEN = ("report", "caption", "note")  # kinds that are a target to write
TRAIN_ONLY = {"dsb2018": "many pictures are crops of the same slide"}
_OWN = "id domain text qa patient split source licence attribution meta".split()


def sources(src: Path) -> list[Path]:
    """The manifest files behind ``src``: itself, or every ``*.jsonl`` directly inside it."""
    if src.is_file():
        return [src]
    if not src.is_dir():
        raise UserError(f"{src}: does not exist, expected a manifest or a folder of manifests")
    found = sorted(p for p in src.iterdir() if p.suffix == ".jsonl" and p.is_file())
    if not found:
        raise UserError(f"{src}: no *.jsonl in it, expected manifests")
    return found


def load(
    src: Path,
    writer: Writer,
    *,
    image_root: ImageRoot | None = None,
    train_only: Sequence[str] = tuple(TRAIN_ONLY),
) -> None:
    """Fill ``writer`` from the manifests at ``src``.

    Image paths are relative to ``image_root`` (default: the manifest's folder). Rows of the
    sources in ``train_only`` go to split ``train``.
    """
    roots = image_roots(src, image_root)
    rows = rows_of(((path, path.name) for path in sources(src)), writer)
    import_rows(rows, writer, lambda row: _row(row, writer, roots, train_only))


def _row(row: SourceRow, writer: Writer, roots: list[Path], train_only: Sequence[str]) -> None:
    value = row.value
    if not isinstance(value, dict):
        raise UserError("expected an object with id, image, text, text_kind, qa")
    row_id = text_of(value, "id", required=True)
    kind = value.get("text_kind", "report" if value.get("text") else "none")
    if kind not in TEXT_KINDS:
        raise UserError(f"text_kind: got {kind!r:.60}, expected one of {', '.join(TEXT_KINDS)}")
    text = text_of(value, "text") or ""
    writer.placeholders += is_placeholder(value.get("text"))
    pairs = value.get("qa") or []
    if not isinstance(pairs, list):
        raise UserError("qa: expected a list of {question, answer, answer_type}")
    pictures, named = named_images(value, "", IMAGE_KEYS)
    meta = {"study": row_id} | extra_fields(value, [*_OWN, *named])
    shared: dict[str, Any] = {
        key: text_of(value, key)
        for key in ("domain", "patient", "source", "licence", "attribution")
    }
    shared["split"] = split_named(text_of(value, "split"))
    if shared["split"] is None and shared["source"] in train_only:
        shared["split"] = "train"
    image, missing = images_of(pictures, roots, writer, value.get("sha256"))
    if missing:
        meta["missing_images"] = missing
    shared["image"] = image
    if not writer.reference(row, id=row_id, text=text, meta=meta, **shared):
        return
    light = {key: meta[key] for key in ("study", "modality", "missing_images") if key in meta}
    if kind in WRITTEN and text.strip():
        writer.example(
            row,
            id=f"{row_id}/report",
            task="report",
            answer=text,
            meta=light | {"text_kind": kind},
            **shared,
        )
    for number, pair in enumerate(pairs):
        where = f"qa.{number}"
        if not isinstance(pair, dict):
            writer.reject(row, f"{where}: expected an object, got {pair!r:.60}")
            continue
        try:
            question = text_of(pair, "question", required=True) or ""
            choice = choice_of(pair, question, text_of(pair, "answer", numbers=True))
        except UserError as error:
            writer.reject(row, f"{where}: {error}")
            continue
        extra = extra_fields(pair, {"question", "answer", "answer_type"} | choice.used)
        kept, original = choice.answer_type(pair.get("answer_type"))
        writer.doubt(row, choice.doubt and f"{where}: {choice.doubt}")
        writer.example(
            row,
            id=f"{row_id}/qa-{number}",
            task="vqa",
            question=choice.question,
            answer=choice.answer,
            options=choice.options or None,
            answer_type=kept,
            meta=light | extra | original,
            **shared,
        )
