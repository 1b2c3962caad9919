"""What has to be compared across rows, in a temporary SQLite file: memory does not grow with it.

A *fact* is (kind, key, value): rows of one kind and key belong together, such as all rows of a
patient (key) with the splits they are in (values).
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TABLES = (
    "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
    "CREATE TABLE place (n INTEGER PRIMARY KEY, file TEXT, line INT, id TEXT, split TEXT,"
    " patient TEXT, study TEXT);"
    "CREATE TABLE fact (kind TEXT, key BLOB, value BLOB, n INT, shown TEXT);"
    "CREATE TABLE closed (source TEXT, split TEXT, question BLOB, label INT);"
    "CREATE TABLE image (path TEXT, n INT);"
    "CREATE TABLE tail (word TEXT, text BLOB, n INT);"
    "CREATE TABLE text_finding (code TEXT, text BLOB, message TEXT, n INT);"
)


class Place(NamedTuple):
    """Where a row stands (``n`` counts rows), and to whom it belongs."""

    n: int
    file: str
    line: int
    id: str
    split: str | None
    patient: str | None
    study: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Group(NamedTuple):
    """Rows with the same key: how many, with how many different values."""

    key: bytes
    shown: str
    rows: int
    values: int


_PLACE = ", ".join(f"p.{name}" for name in Place._fields)


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()


class CrossRowIndex:
    """Facts of one check. Add everything, then :meth:`finish`, then ask."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path)
        self.db.executescript(_TABLES)
        self._places = 0

    def place(self, *fields: str | int | None) -> int:
        """Keep a row's (file, line, id, split, patient, study); its number."""
        self._places += 1
        self.db.execute("INSERT INTO place VALUES (?,?,?,?,?,?,?)", (self._places, *fields))
        return self._places

    def add(self, kind: str, key: str, value: str, n: int, shown: str = "") -> None:
        self.db.execute(
            "INSERT INTO fact VALUES (?,?,?,?,?)", (kind, digest(key), digest(value), n, shown)
        )

    def image(self, path: str, n: int) -> None:
        self.db.execute("INSERT INTO image VALUES (?,?)", (path, n))

    def closed(self, source: str, split: str, question: str, yes: bool) -> None:
        row = (source, split, digest(question), int(yes))
        self.db.execute("INSERT INTO closed VALUES (?,?,?,?)", row)

    def tail(self, word: str, text: str, n: int) -> None:
        """A last word that may be the beginning of another one."""
        self.db.execute("INSERT INTO tail VALUES (?,?,?)", (word, digest(text), n))

    def text_finding(self, code: str, text: str, message: str, n: int) -> None:
        """Something about a text alone: said once, however many rows hold that text."""
        self.db.execute(
            "INSERT INTO text_finding VALUES (?,?,?,?)", (code, digest(text), message, n)
        )

    def finish(self) -> None:
        """After the last row."""
        self.db.executescript(
            "CREATE INDEX by_key ON fact (kind, key); CREATE INDEX by_row ON image (n);"
            "CREATE INDEX by_path ON image (path);"
        )

    def groups(self, kind: str, rows: int = 1, values: int = 1) -> Iterator[Group]:
        """Groups of at least so many rows and different values, by their first row."""
        found = self.db.execute(
            "SELECT key, MIN(shown), COUNT(*) AS rows, COUNT(DISTINCT value) AS vals FROM fact "
            "WHERE kind = ? GROUP BY key HAVING rows >= ? AND vals >= ? ORDER BY MIN(n)",
            (kind, rows, values),
        )
        return (Group(*row) for row in found)

    def rows(self, kind: str, key: bytes, limit: int = -1) -> Iterator[Place]:
        """The rows of a group, in the order of the files."""
        found = self.db.execute(
            f"SELECT {_PLACE} FROM fact f JOIN place p ON p.n = f.n WHERE f.kind = ? "
            "AND f.key = ? ORDER BY p.n LIMIT ?",
            (kind, key, limit),
        )
        return (Place(*row) for row in found)

    def holds(self, kind: str, key: bytes, *values: str) -> bool:
        """Whether a group has each of these values."""
        found = self.db.execute(
            "SELECT DISTINCT value FROM fact WHERE kind = ? AND key = ?", (kind, key)
        )
        return {digest(value) for value in values} <= {row[0] for row in found}

    def first_of_each_split(self, kind: str, key: bytes) -> list[Place]:
        columns = _PLACE.replace("p.n", "MIN(p.n)", 1)  # SQLite: the others are of that row
        found = self.db.execute(
            f"SELECT {columns} FROM fact f JOIN place p ON p.n = f.n WHERE f.kind = ? "
            "AND f.key = ? AND p.split IS NOT NULL GROUP BY p.split ORDER BY MIN(p.n)",
            (kind, key),
        )
        return [Place(*row) for row in found]

    def tails(self) -> Iterator[tuple[str, bytes, int]]:
        """(last word, text, how many rows hold it) of each text that may be cut in a word."""
        return self.db.execute("SELECT word, text, COUNT(*) FROM tail GROUP BY word, text")

    def cut(self, word: str, text: bytes, message: str) -> None:
        """A text of :meth:`tails` that is cut indeed."""
        self.db.execute(
            "INSERT INTO text_finding SELECT 'cut_text', text, ?, n FROM tail "
            "WHERE word = ? AND text = ?",
            (message, word, text),
        )

    def text_findings(self) -> Iterator[tuple[str, str, int, list[Place]]]:
        """(code, message, rows, the first of them) of each text that something is wrong with."""
        for code, message, count, text in self.db.execute(
            "SELECT code, message, COUNT(*), text FROM text_finding GROUP BY code, text, message "
            "ORDER BY MIN(n)"
        ):
            found = self.db.execute(
                f"SELECT {_PLACE} FROM text_finding t JOIN place p ON p.n = t.n WHERE t.code = ? "
                "AND t.text = ? AND t.message = ? ORDER BY p.n LIMIT 10",
                (code, text, message),
            )
            yield code, message, count, [Place(*row) for row in found]

    def paths(self) -> list[str]:
        """Every image file, once."""
        return [row[0] for row in self.db.execute("SELECT DISTINCT path FROM image ORDER BY path")]

    def users(self, path: str, limit: int = -1) -> list[Place]:
        """The rows that have an image file."""
        found = self.db.execute(
            f"SELECT {_PLACE} FROM image i JOIN place p ON p.n = i.n WHERE i.path = ? "
            "ORDER BY p.n LIMIT ?",
            (path, limit),
        )
        return [Place(*row) for row in found]

    def pictures(self, rows: list[Place], most: int = 4) -> list[str]:
        """Image files of these rows, for the page."""
        found: dict[str, None] = {}
        for row in rows:
            for (path,) in self.db.execute("SELECT path FROM image WHERE n = ?", (row.n,)):
                found.setdefault(path)
            if len(found) >= most:
                break
        return list(found)[:most]

    def close(self) -> None:
        self.db.close()
