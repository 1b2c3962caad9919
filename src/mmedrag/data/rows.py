"""Rows of JSON and JSON Lines files with the line each one starts on.

Place in the picture: under every importer and under the check. A broken row is yielded with
its error instead of stopping the rest.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mmedrag.records import UserError

MAX_LINE = 64 * 2**20  # bytes; a longer "line" is no row of text


@dataclass(frozen=True)
class SourceRow:
    """One row of a source file: ``number`` counts rows from 0, ``line`` lines from 1."""

    file: str
    line: int
    number: int
    value: Any = None
    error: str | None = None
    text: str | None = None  # the raw line, when it could not be parsed


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_NULLS = json.JSONDecoder(parse_constant=lambda name: None)
# a file may be one object around its rows
_WRAPPERS = ("data", "annotations", "questions", "rows", "examples", "samples", "items", "records")


def parse(text: str, decoder: json.JSONDecoder = _DECODER) -> Any:
    """Strict JSON (no NaN, no lone surrogates, no absurd nesting); ValueError otherwise."""
    try:
        value = decoder.decode(text)
        if "\\u" in text:  # an escaped lone surrogate parses, but cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("lone surrogate in a string, expected valid Unicode") from None
    return value


def literal(text: str) -> Any:
    """What a text that is itself JSON or a Python literal stands for; None for any other text."""
    if text[:1] not in ("[", "{") or text[-1:] not in ("]", "}"):
        return None
    for read in (parse, ast.literal_eval):  # literal_eval reads literals only, it runs nothing
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def read_rows(path: Path, name: str | None = None, nulls: bool = False) -> Iterator[SourceRow]:
    """All rows of a JSON Lines file, of one JSON array, or of objects one after the other.

    The content decides which; an array may stand in an object, as in ``{"data": [...]}``.
    ``name`` is what ``SourceRow.file`` says (default: the path as given). ``nulls``: NaN counts as
    null, as Python and pandas write what is absent. An array that breaks off yields the rows
    before the break and then one row with the error.
    """
    name, decoder = name or str(path), _NULLS if nulls else _DECODER
    try:
        if holds_lines(path):
            with open(path, "rb") as handle:
                yield from _lines(handle, name, decoder)
        else:
            data = path.read_bytes()
            if data[:3] == b"\xef\xbb\xbf":
                data = data[3:]
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                line = data[: error.start].count(b"\n") + 1
                yield SourceRow(name, line, 0, error="not UTF-8 text")
                return
            yield from _values(text, name, decoder)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def holds_lines(path: Path) -> bool:
    """Is the file JSON Lines (a row a line) rather than one array? Its suffix decides doubts."""
    named = path.suffix.lower() in (".jsonl", ".ndjson")
    with open(path, "rb") as handle:
        filled = (line for line in iter(lambda: handle.readline(MAX_LINE), b"") if line.strip())
        first = next(filled, b"").removeprefix(b"\xef\xbb\xbf").strip()
        if named and not first.startswith(b"[") and first != b"{":
            return True
        if not named and not first.startswith(b"{"):
            return False
        try:  # a whole value on the first line, and more behind it: a row a line
            parse(first.decode("utf-8"))
        except ValueError:
            return False
        return next(filled, None) is not None


def _lines(handle: Any, name: str, decoder: json.JSONDecoder) -> Iterator[SourceRow]:
    number = 0
    line_no = 0
    while line := handle.readline(MAX_LINE):
        line_no += 1
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            yield SourceRow(name, line_no, number, error=f"line longer than {MAX_LINE:,} bytes")
            return
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if line_no == 1 else "utf-8")
            text = text.rstrip().removesuffix(",")  # of an array without its brackets
            yield SourceRow(name, line_no, number, value=parse(text, decoder))
        except UnicodeDecodeError:
            shown = line.decode("utf-8", "replace").rstrip()
            yield SourceRow(name, line_no, number, error="not UTF-8 text", text=shown)
        except ValueError as error:
            shown = line.decode("utf-8", "replace").rstrip()
            yield SourceRow(name, line_no, number, error=f"not JSON: {_where(error)}", text=shown)
        number += 1


def _where(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error)


def _values(text: str, name: str, decoder: json.JSONDecoder, start: int = 0) -> Iterator[SourceRow]:
    """Elements of one JSON array, or objects one after the other, each with the line it starts on.

    What follows a break is lost, what stands before it is not.
    """
    at, number = _skip(text, start), 0
    line, array = 1 + text.count("\n", 0, at), text[at : at + 1] == "["
    if not array and text[at : at + 1] != "{":
        try:
            parse(text)
            shown = "a single JSON value"
        except ValueError as error:
            shown = f"not JSON: {_where(error)}"
        yield SourceRow(name, line, 0, error=f"{shown}, expected an array of rows")
        return
    at, seen = (_skip(text, at + 1) if array else at), at
    while at < len(text) or array:
        if array and text[at : at + 1] == "]":
            break
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, stop = decoder.raw_decode(text, at)
            inner = None if array or number else _inside(text, value, _skip(text, stop))
            if inner is not None:
                yield from _values(text, name, decoder, inner)
                return
            json.dumps(value, ensure_ascii=False).encode("utf-8")
            yield SourceRow(name, line, number, value=value)
        except UnicodeEncodeError:
            yield SourceRow(name, line, number, error="lone surrogate in a string")
            stop = decoder.raw_decode(text, at)[1]
        except RecursionError:
            yield SourceRow(name, line, number, error="not JSON: nested too deeply")
            return
        except ValueError as error:
            yield SourceRow(name, line, number, error=f"not JSON: {_where(error)}; rows end here")
            return
        number += 1
        at = _skip(text, stop)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif array and text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            yield SourceRow(
                name, line, number, error="not JSON: expected ',' or ']'; rows end here"
            )
            return
    rest = _skip(text, at + 1)
    if rest < len(text) and not start:
        line += text.count("\n", seen, rest)
        yield SourceRow(name, line, number, error="not JSON: text after the end of the array")


def _inside(text: str, value: Any, stop: int) -> int | None:
    """Where the array of rows begins in a file that is one object around it."""
    if stop < len(text) or not isinstance(value, dict):
        return None
    for key in _WRAPPERS:
        rows = value.get(key)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            found = re.search(rf'"{key}"\s*:\s*(?=\[)', text)
            return found.end() if found else None
    return None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
