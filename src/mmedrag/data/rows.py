"""Rows of JSON and JSON Lines files with the line each one starts on.

Place in the picture: under every importer and under the check. A broken row is yielded with
its error instead of stopping the rest.
"""

from __future__ import annotations

import json
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


def parse(text: str) -> Any:
    """Strict JSON (no NaN, no lone surrogates, no absurd nesting); ValueError otherwise."""
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # an escaped lone surrogate parses, but cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("lone surrogate in a string, expected valid Unicode") from None
    return value


def read_rows(path: Path, name: str | None = None) -> Iterator[SourceRow]:
    """All rows of a JSON Lines file, or of a file that is one JSON array; the content decides.

    ``name`` is what ``SourceRow.file`` says (default: the path as given). A JSON array that breaks
    off yields the rows before the break and then one row with the error.
    """
    name = name or str(path)
    try:
        if holds_lines(path):
            with open(path, "rb") as handle:
                yield from _lines(handle, name)
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
            yield from _array(text, name)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def holds_lines(path: Path) -> bool:
    """Is the file JSON Lines (a row a line) rather than one array? Its suffix decides doubts."""
    named = path.suffix.lower() in (".jsonl", ".ndjson")
    with open(path, "rb") as handle:
        filled = (line for line in iter(lambda: handle.readline(MAX_LINE), b"") if line.strip())
        first = next(filled, b"").removeprefix(b"\xef\xbb\xbf").strip()
        if named and not first.startswith(b"["):
            return True
        if not named and not first.startswith(b"{"):
            return False
        try:  # a whole value on the first line, and more behind it: a row a line
            parse(first.decode("utf-8"))
        except ValueError:
            return False
        return next(filled, None) is not None


def _lines(handle: Any, name: str) -> Iterator[SourceRow]:
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
            yield SourceRow(name, line_no, number, value=parse(text))
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


def _array(text: str, name: str) -> Iterator[SourceRow]:
    """Elements of one JSON array, each with the line it starts on, without losing the rest."""
    at, line, number = _skip(text, 0), 1, 0
    line += text.count("\n", 0, at)
    if not text[at : at + 1] == "[":
        try:
            parse(text)
            shown = "a single JSON value"
        except ValueError as error:
            shown = f"not JSON: {_where(error)}"
        yield SourceRow(name, line, 0, error=f"{shown}, expected an array of rows")
        return
    at, seen = _skip(text, at + 1), at
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, stop = _DECODER.raw_decode(text, at)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
            yield SourceRow(name, line, number, value=value)
        except UnicodeEncodeError:
            yield SourceRow(name, line, number, error="lone surrogate in a string")
            stop = _DECODER.raw_decode(text, at)[1]
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
        elif text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            yield SourceRow(
                name, line, number, error="not JSON: expected ',' or ']'; rows end here"
            )
            return
    rest = _skip(text, at + 1)
    if rest < len(text):
        line += text.count("\n", seen, rest)
        yield SourceRow(name, line, number, error="not JSON: text after the end of the array")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
