"""Files of tables as rows: CSV and TSV in their many forms, JSON, Parquet, Arrow, saved datasets.

Place in the picture: under ``table``, which says what the columns of a row mean.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmedrag.data.common import TABLES, source_files
from mmedrag.data.rows import SourceRow, parse, read_rows
from mmedrag.records import UserError

JSON = (".json", ".jsonl", ".ndjson")


def tables(src: Path) -> list[tuple[Path, str]]:
    """(file, name) of the tables at ``src``; of a saved dataset its data files."""
    if src.is_file() and src.suffix.lower() not in (*TABLES, *JSON):
        raise UserError(f"{src}: expected {', '.join((*TABLES, *JSON))} or a folder of these")
    skip = ("cache-", ".")
    try:  # the .json files of a saved dataset describe its tables
        return source_files(src, *TABLES, skip=skip)
    except UserError:
        return source_files(src, *JSON, skip=skip)


def read_table(path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of one table as dicts; for binary tables ``line`` counts rows from 1."""
    with open(path, "rb") as handle:
        magic = handle.read(64)
    binary = magic.startswith((b"PAR1", b"ARROW1")) or path.suffix.lower() in (".parquet", ".arrow")
    if not binary:  # a spreadsheet's header begins with neither
        json_rows = magic.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
        yield from read_rows(path, name, nulls=True) if json_rows else _read_csv(path, name)
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
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", data, data.find(b"\0"), len(data), "NUL")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        yield SourceRow(name, line, 0, error="not UTF-8 text, expected UTF-8")
        return
    skipped = len(text) - len(text.lstrip("\r\n"))  # empty lines above the header
    above, text = text.count("\n", 0, skipped), text[skipped:]
    head, _, rest = text.partition("\n")
    if named := re.fullmatch(r'"?sep *= *(.)"?[,;\s]*', head, re.IGNORECASE):  # as Excel writes it
        above, text, delimiter = above + 1, rest, named[1]
    else:
        tab = "\t" in head and (path.suffix.lower() == ".tsv" or "," not in head)
        delimiter = "\t" if tab else max(",;|", key=head.count)
    # blanks between a closing quote and what ends the field
    closed = re.compile(rf'("(?:[^"]|"")*")(?: +(?=[{re.escape(delimiter)}\r\n]|\Z))?')
    stream = io.StringIO(closed.sub(r"\1", text), newline="")
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
        elif len(fields) == 1 and not fields[0].strip():
            continue  # a line of blanks
        elif fields and len(fields) != len(header):
            reason = f"{len(fields)} fields, expected {len(header)}"
            yield SourceRow(name, line, number, value=fields, error=reason)
            number += 1
        elif fields:
            yield SourceRow(name, line, number, value=dict(zip(header, fields, strict=True)))
            number += 1
