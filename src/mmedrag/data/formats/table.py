"""``data import table``: CSV, TSV, JSON rows, Parquet, Arrow and Hugging Face datasets folders.

A row with a question gives a vqa example, a row with a text (report, caption) a report example
and a corpus row; both are possible. Columns are found by common names, or by a column map. A row
that holds a conversation (``messages``) is read as in ``llava``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from mmedrag.data.common import (
    IMAGE_KEYS,
    NOTHING,
    PLACEHOLDERS,
    Defaults,
    ImageRoot,
    clean_question,
    expect_image,
    image_roots,
    images_of,
    is_placeholder,
    named_images,
    rows_of,
    split_named,
    text_of,
)
from mmedrag.data.formats.llava import conversation, talk_of
from mmedrag.data.formats.table_files import JSON, read_table, tables
from mmedrag.data.formats.vqa import split_from
from mmedrag.data.options import choice_of
from mmedrag.data.rows import SourceRow, literal
from mmedrag.data.writer import Writer
from mmedrag.records import UserError

NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "uid", "image_id", "study_id", "dicom_id", "question_id", "qid", "index"),
    "image": (
        *("image", "image_path", "img", "img_path"),
        *dict.fromkeys(key.lower() for key in IMAGE_KEYS),
        *("path", "file_name", "filename", "file"),
    ),
    "text": ("text", "report", "caption", "note", "description"),
    "question": ("question", "prompt"),
    "answer": ("answer", "label_text"),
    "answer_type": ("answer_type", "question_type"),
    "domain": ("domain",),
    "split": ("split", "subset", "partition"),
    "patient": ("patient", "patient_id", "subject_id", "patientid"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "attribution": ("attribution",),
}
SEVERAL = ("image", "text")  # may come from more than one column
# the sections of one report, in its order, as their columns are called
_SECTION = r"(?:(?:report|section|text|clean)[ _.-])?{}(?:[ _.-](?:section|text|report|clean|en))?"
SECTIONS = tuple(re.compile(_SECTION.format(name)) for name in ("findings", "impressions?"))


def load(
    src: Path,
    writer: Writer,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    image_root: ImageRoot | None = None,
    domain: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    attribution: str | None = None,
) -> None:
    """Fill ``writer`` from tables at ``src`` (a file, a folder of them, or a saved dataset).

    ``columns`` maps our names (``id, image, text, question, answer, answer_type, domain,
    split, patient, source, licence, attribution``) to the table's; an empty value switches one
    off. Several ``image`` columns are views, several ``text`` columns one text, a paragraph
    each. Images are paths, or ``{bytes, path}`` as Hugging Face datasets store them; their
    class numbers become names.
    """
    mapped = _map(columns or {})
    roots = image_roots(src, image_root)
    defaults = Defaults(domain, source, licence, attribution)
    chosen: dict[tuple[str, ...], dict[str, list[str]]] = {}  # rows of JSON may differ in fields
    alone: dict[str, str] = {}  # tables of pictures alone → their columns
    bad: set[str] = set()  # one table of many does not stop the others
    for done, row in enumerate(rows_of(tables(src), writer, read_table), 1):
        writer.tick(done)
        if row.file in bad:
            continue
        try:
            if row.error:
                raise UserError(row.error)
            if not isinstance(row.value, dict):
                raise UserError("expected an object")
            if talk_of(row.value):
                conversation(row, writer, roots, defaults, "auto")
                continue
            key = (row.file, *map(str, row.value))
            if key not in chosen:
                chosen[key] = _choose(row.value, mapped, row.file)
                if not any(chosen[key][name] for name in ("text", "sections", "question")):
                    alone[row.file] = ", ".join(map(str, row.value))
            _row(row, chosen[key], writer, roots, defaults)
        except _BadTable as error:
            if src.is_file() and not chosen:
                raise UserError(str(error)) from None
            writer.reject(row, str(error))
            bad |= set() if row.file.lower().endswith(JSON) else {row.file}
        except UserError as error:
            writer.reject(row, str(error))
    writer.result.notes += [
        f"{name}: pictures alone, no column for a text or question among {columns:.200}"
        for name, columns in alone.items()
    ]


def _map(columns: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    """A column map with lists of columns, or UserError for a name that is not ours."""
    mapped = {}
    for key, value in columns.items():
        if key not in NAMES:
            raise UserError(f"columns: {key!r} is not known, expected {', '.join(NAMES)}")
        mapped[key] = [c for c in ([value] if isinstance(value, str) else value) if c]
        if len(mapped[key]) > 1 and key not in SEVERAL:
            raise UserError(f"columns: {key} takes one column, got {', '.join(mapped[key])}")
    return mapped


class _BadTable(Exception):
    """The column map does not fit the table: no row can be read."""


def _choose(
    row: Mapping[str, Any], given: Mapping[str, list[str]], table: str
) -> dict[str, list[str]]:
    """Our names → the table's columns."""
    lower = {str(column).lower(): str(column) for column in reversed(list(row))}
    chosen: dict[str, list[str]] = {}
    for key, names in NAMES.items():
        if key in given:
            for column in given[key]:
                if column not in row:
                    have = ", ".join(map(str, row))
                    raise _BadTable(f"{table}: no column {column!r} for {key}, it has {have:.300}")
            chosen[key] = given[key]
        else:
            chosen[key] = [lower[n] for n in names if n in lower][:1]
    if chosen["text"] and chosen["text"] == chosen["question"]:
        chosen["text"] = []
    if "image" not in given and not chosen["image"]:
        _, chosen["image"] = named_images(row, "", ())
    # what a row says that has no whole report
    chosen["sections"] = [
        column
        for section in SECTIONS
        if "text" not in given
        for column in [lower[low] for low in lower if section.fullmatch(low)][:1]
    ]
    if not (chosen["text"] or chosen["sections"] or chosen["question"] or chosen["image"]):
        have = ", ".join(map(str, row))
        raise _BadTable(
            f"{table}: no column for text, question or image among {have:.300}; name "
            "one: --column text=COLUMN"
        )
    return chosen


def _ours(
    value: Mapping[str, Any], chosen: Mapping[str, list[str]], writer: Writer
) -> tuple[dict[str, Any], set[str]]:
    """The row's fields under our names, without placeholders, and the columns they came from.

    The parts of a text are joined; sections count where there is no whole text.
    """
    used = {column for key, columns in chosen.items() if key != "sections" for column in columns}
    ours = {
        key: plain(value.get(columns[0]))
        for key, columns in chosen.items()
        if columns and key not in ("image", "sections")
    }
    for columns in (chosen["text"], chosen["sections"]):
        parts = [plain(value.get(column)) for column in columns]
        sound = [part for part in parts if not is_placeholder(part, NOTHING)]
        writer.placeholders += len(parts) - len(sound)
        ours["text"] = "\n".join(str(part).strip() for part in sound if part not in (None, ""))
        used |= set(columns)
        if ours["text"]:
            break
    for key, given in ours.items():
        if is_placeholder(given, PLACEHOLDERS if key in ("question", "answer") else NOTHING):
            ours[key] = None
        elif isinstance(given, str):
            ours[key] = given.strip()
    return {key: v for key, v in ours.items() if v not in (None, "")}, used


def _row(
    row: SourceRow,
    chosen: Mapping[str, list[str]],
    writer: Writer,
    roots: Sequence[Path],
    defaults: Defaults,
) -> None:
    value = row.value
    ours, used = _ours(value, chosen, writer)
    choice = None
    pictures: list[Any] = [value.get(column) for column in chosen["image"]]
    if question := text_of(ours, "question", numbers=True):
        named = [picture for picture in pictures if picture]
        pictures = named or named_images({}, question, ())[0]
        writer.doubt(row, expect_image(question, pictures if len(pictures) > 1 else named))
        choice = choice_of(value, clean_question(question), text_of(ours, "answer", numbers=True))
        used |= choice.used
    meta = {str(k): plain(v) for k, v in value.items() if k not in used and v not in (None, "")}
    stem = row.file.rsplit(".", 1)[0]
    own = text_of(ours, "id", numbers=True)
    base = f"{stem}/{own if own is not None else row.number}"
    image, missing = _images(pictures, base, writer, roots)
    text = text_of(ours, "text", numbers=True)
    if text is None and question is None and image is None:
        raise UserError("row has no text, no question and no image")
    # questions about one picture share its corpus row; a text is a corpus row of its own
    study = base if text is not None or image is None else f"{stem}/{_first(image)}"
    meta = (
        {"study": study} | meta if isinstance(meta.get("study"), str) else meta | {"study": study}
    )
    if missing:
        meta["missing_images"] = missing
    shared = defaults.fields(ours) | {
        "image": image,
        "patient": text_of(ours, "patient", numbers=True),
        "split": split_named(text_of(ours, "split")) or split_from(row.file),
    }
    if text is not None or not writer.has("corpus", study):
        corpus_id = writer.unique("corpus", study, row.number)
        writer.reference(row, id=corpus_id, text=text or "", meta=meta, **shared)
    if text is not None and text.strip():
        writer.example(
            row,
            id=writer.unique("examples", f"{base}/report", row.number),
            task="report",
            answer=text,
            meta=meta,
            **shared,
        )
    if choice is not None:
        kept, original = choice.answer_type(ours.get("answer_type"))
        writer.doubt(row, choice.doubt)
        writer.example(
            row,
            id=writer.unique("examples", base, row.number),
            task="vqa",
            question=choice.question,
            answer=choice.answer,
            options=choice.options or None,
            answer_type=kept,
            meta=meta | original,
            **shared,
        )


def _first(image: str | list[str]) -> str:
    return image if isinstance(image, str) else image[0]


def plain(value: Any) -> Any:
    """A table value as JSON has it: whole floats as ints in text, dates as ISO text."""
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 2**53
        return int(value) if whole else None if math.isnan(value) else value
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    if isinstance(value, bytes):
        return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _images(
    values: Sequence[Any], base: str, writer: Writer, roots: Sequence[Path]
) -> tuple[str | list[str] | None, list[str]]:
    """Paths or embedded bytes of the image columns → stored images, the ones not there."""
    flat: list[Any] = []
    for value in values:
        views = literal(value.strip()) if isinstance(value, str) else value
        flat += views if isinstance(views, list) else [value]
    stored: list[str] = []
    missing: list[str] = []
    flat = [value.strip() if isinstance(value, str) else value for value in flat]
    flat = [v for v in flat if v not in (None, "") and not is_placeholder(v, NOTHING)]
    for number, value in enumerate(flat):
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if isinstance(data, bytes):
            key = f"{base}#{number}"
            stored.append(writer.picture(key, data, re.sub(r"[^\w/.-]", "_", f"{base}-{number}")))
            continue
        image, gone = images_of(value, roots, writer)
        stored += [image] if isinstance(image, str) else []
        missing += gone
    if not stored:
        return None, missing
    return (stored[0] if len(stored) == 1 else stored), missing
