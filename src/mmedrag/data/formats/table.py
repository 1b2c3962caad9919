"""``data import table``: CSV, TSV, JSON rows, Parquet, Arrow and Hugging Face datasets folders.

A row with a question gives a vqa example, a row with a text (report, caption) a report example
and a corpus row; both are possible. Columns are found by common names, or by a column map. A row
that holds a conversation (``messages``) is read as in ``llava``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
    rows_of,
    source_files,
    split_named,
    text_of,
)
from mmedrag.data.formats.llava import conversation, talk_of
from mmedrag.data.formats.vqa import split_from
from mmedrag.data.options import choice_of
from mmedrag.data.rows import SourceRow, parse, read_rows
from mmedrag.data.writer import Writer
from mmedrag.records import UserError

NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "uid", "image_id", "study_id", "dicom_id", "question_id", "qid", "index"),
    "image": (
        *("image", "image_path", "img", "img_path"),
        *dict.fromkeys(key.lower() for key in IMAGE_KEYS),
        *("path", "file_name", "filename", "file"),
    ),
    "text": ("text", "report", "caption", "impression", "findings", "note", "description"),
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
SECTIONS = ("findings", "impression")  # of one report, in its order
_ENDS = (".csv", ".tsv", ".parquet", ".arrow")
_JSON = (".json", ".jsonl", ".ndjson")


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
            _row(row, chosen[key], writer, roots, defaults)
        except _BadTable as error:
            if src.is_file() and not chosen:
                raise UserError(str(error)) from None
            writer.reject(row, str(error))
            bad |= set() if row.file.lower().endswith(_JSON) else {row.file}
        except UserError as error:
            writer.reject(row, str(error))
    if placeholders := writer.placeholders:
        writer.result.notes.append(
            f"{placeholders} texts that say nan, N/A or the like are no text"
        )


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


def tables(src: Path) -> list[tuple[Path, str]]:
    """(file, name) of the tables at ``src``; of a saved dataset its data files."""
    if src.is_file() and src.suffix.lower() not in (*_ENDS, *_JSON):
        raise UserError(f"{src}: expected {', '.join((*_ENDS, *_JSON))} or a folder of these")
    skip = ("cache-", ".")
    try:  # the .json files of a saved dataset describe its tables
        return source_files(src, *_ENDS, skip=skip)
    except UserError:
        return source_files(src, *_JSON, skip=skip)


def read_table(path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of one table as dicts; for binary tables ``line`` counts rows from 1."""
    with open(path, "rb") as handle:
        magic = handle.read(8)
    binary = magic.startswith((b"PAR1", b"ARROW1")) or path.suffix.lower() in (".parquet", ".arrow")
    if not binary:
        json_rows = path.suffix.lower() in _JSON
        yield from read_rows(path, name) if json_rows else _read_csv(path, name)
        return
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(path):
            classes = _classes(batch.schema.metadata)
            for value in batch.to_pylist():
                for column in classes.keys() & value.keys():
                    value[column] = classes[column].get(value[column], value[column])
                yield SourceRow(name, number + 1, number, value=value)
                number += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        yield SourceRow(
            name, number + 1, number, error=f"table cannot be read: {reason}; rows end here"
        )


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[Any, str]]:
    """Columns of class numbers → their names, as Hugging Face datasets describe them."""
    try:
        described = parse((metadata or {}).get(b"huggingface", b"{}").decode("utf-8"))
        features = described.get("info", {}).get("features", {})
        return {
            column: dict(enumerate(map(str, feature["names"])))
            for column, feature in features.items()
            if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}  # a description is not needed to read the rows


def _batches(path: Path) -> Iterator[Any]:
    """Record batches, few rows at a time (they may hold images)."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=64)
        return
    import pyarrow as pa

    with pa.memory_map(str(path)) as handle:
        try:
            reader: Any = pa.ipc.open_stream(handle)  # Hugging Face save_to_disk
        except pa.ArrowInvalid:
            handle.seek(0)
            opened = pa.ipc.open_file(handle)
            reader = (opened.get_batch(i) for i in range(opened.num_record_batches))
        for batch in reader:
            for start in range(0, batch.num_rows, 64):
                yield batch.slice(start, 64)


def _read_csv(path: Path, name: str) -> Iterator[SourceRow]:
    csv.field_size_limit(16 * 2**20)
    data = path.read_bytes()
    try:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # "Unicode text" of spreadsheets
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        yield SourceRow(name, line, 0, error="not UTF-8 text, expected UTF-8")
        return
    skipped = len(text) - len(text.lstrip("\r\n"))  # empty lines above the header
    above, text = text.count("\n", 0, skipped), text[skipped:]
    head, _, rest = text.partition("\n")
    if named := re.fullmatch(r'"?sep=(.)"?[,;\s]*', head, re.IGNORECASE):  # as Excel writes it
        above, text, delimiter = above + 1, rest, named[1]
    else:
        tab = "\t" in head and (path.suffix.lower() == ".tsv" or "," not in head)
        delimiter = "\t" if tab else max(",;|", key=head.count)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] | None = None
    number = 0
    while True:
        line = above + reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield SourceRow(name, line, number, error=f"not CSV: {error}")
            number += 1
            continue
        if header is None:
            header = [field.strip() for field in fields]
            if len(set(header)) != len(header):
                yield SourceRow(name, line, number, error="two columns have the same name")
                return
        elif fields and len(fields) != len(header):
            reason = f"{len(fields)} fields, expected {len(header)}"
            yield SourceRow(name, line, number, value=fields, error=reason)
            number += 1
        elif fields:
            yield SourceRow(name, line, number, value=dict(zip(header, fields, strict=True)))
            number += 1


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
            if key == "text" and chosen[key] and chosen[key][0].lower() in SECTIONS:
                chosen[key] = [lower[section] for section in SECTIONS if section in lower]
    if chosen["text"] and chosen["text"] == chosen["question"]:
        chosen["text"] = []
    if not (chosen["text"] or chosen["question"] or chosen["image"]):
        have = ", ".join(map(str, row))
        raise _BadTable(
            f"{table}: no column for text, question or image among {have:.300}; name "
            "one: --column text=COLUMN"
        )
    return chosen


def _ours(
    value: Mapping[str, Any], chosen: Mapping[str, list[str]], writer: Writer
) -> dict[str, Any]:
    """The row's fields under our names, without placeholders; the parts of a text joined."""
    ours = {
        key: plain(value.get(columns[0]))
        for key, columns in chosen.items()
        if columns and key != "image"
    }
    parts = [plain(value.get(column)) for column in chosen["text"]]
    sound = [part for part in parts if not is_placeholder(part, NOTHING)]
    writer.placeholders += len(parts) - len(sound)
    if chosen["text"]:
        ours["text"] = "\n".join(str(part).strip() for part in sound if part not in (None, ""))
    for key, given in ours.items():
        if is_placeholder(given, PLACEHOLDERS if key in ("question", "answer") else NOTHING):
            ours[key] = None
        elif isinstance(given, str):
            ours[key] = given.strip()
    return {key: v for key, v in ours.items() if v not in (None, "")}


def _row(
    row: SourceRow,
    chosen: Mapping[str, list[str]],
    writer: Writer,
    roots: Sequence[Path],
    defaults: Defaults,
) -> None:
    value = row.value
    ours = _ours(value, chosen, writer)
    used = {column for columns in chosen.values() for column in columns}
    choice = None
    if question := text_of(ours, "question", numbers=True):
        expect_image(question, [v for c in chosen["image"] if (v := value.get(c))])
        choice = choice_of(value, clean_question(question), text_of(ours, "answer", numbers=True))
        used |= choice.used
    meta = {str(k): plain(v) for k, v in value.items() if k not in used and v not in (None, "")}
    stem = row.file.rsplit(".", 1)[0]
    own = text_of(ours, "id", numbers=True)
    base = f"{stem}/{own if own is not None else row.number}"
    image, missing = _images([value.get(c) for c in chosen["image"]], base, writer, roots)
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
        flat += value if isinstance(value, list) else [value]
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
