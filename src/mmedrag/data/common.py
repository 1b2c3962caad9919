"""What the importers share: their files, their rows, a row's fields, and finding its images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.data.rows import SourceRow
from mmedrag.data.writer import Writer
from mmedrag.records import Split, UserError

_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_IMAGE_TOKEN = re.compile(r"\s*<image>\s*")
_OPTIONS = re.compile(
    r"\s*Please choose from the following two options:\s*\[yes, no\]\.?\s*$", re.IGNORECASE
)


@dataclass(frozen=True)
class Defaults:
    """What a whole source has in common where its rows do not say it."""

    domain: str | None = None
    source: str | None = None
    licence: str | None = None
    attribution: str | None = None
    split: Split | None = None

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's own value of each field, else the common one."""
        own = {key: text_of(row, key) for key in ("domain", "source", "licence", "attribution")}
        return {key: value or getattr(self, key) for key, value in own.items()}


def source_files(src: Path, *suffixes: str, skip: tuple[str, ...] = ()) -> list[tuple[Path, str]]:
    """(file, name relative to ``src``) of ``src`` itself, or of every such file below it, in order.

    ``skip``: beginnings of names that are left out.

    Raises:
        UserError: none there.
    """
    if src.is_file():
        return [(src, src.name)]
    found = sorted(
        path
        for path in src.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(skip)
    )
    if not found:
        raise UserError(f"{src}: no {' or '.join(suffixes)} in it")
    return [(path, path.relative_to(src).as_posix()) for path in found]


def image_roots(src: Path, image_root: Path | None) -> list[Path]:
    """Where a source's images lie: where the user says, else beside the source."""
    return [image_root or (src if src.is_dir() else src.parent)]


def import_rows(
    rows: Iterable[SourceRow], writer: Writer, use: Callable[[SourceRow], None]
) -> None:
    """Give each row to ``use``; one that cannot be read or used is refused, the others go on."""
    for done, row in enumerate(rows, 1):
        writer.tick(done)
        try:
            if row.error:
                raise UserError(row.error)
            use(row)
        except UserError as error:
            writer.reject(row, str(error))


def row_id(row: SourceRow, own: Any, fallback: str | None = None) -> str:
    """``file/own id``, or the row's number (or ``fallback``) where it has no id of its own."""
    named = isinstance(own, (str, int)) and own != ""
    return f"{row.file.rsplit('.', 1)[0]}/{own if named else fallback or row.number}"


def clean_question(text: str) -> str:
    """The question without ``<image>`` markers and without the released yes/no instruction.

    Both belong to the prompt, which is rendered anew.
    """
    return _OPTIONS.sub("", _IMAGE_TOKEN.sub("\n", text).strip()).strip()


def text_of(
    row: dict[str, Any], key: str, required: bool = False, numbers: bool = False
) -> str | None:
    """A text field; null and absent are None; ``numbers`` also takes ints and floats as text."""
    value = row.get(key)
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        if required:
            raise UserError(f"{key}: missing or empty, expected text")
        return value
    if not isinstance(value, str):
        raise UserError(f"{key}: got {type(value).__name__} {value!r:.60}, expected text")
    return value


_SPLITS: dict[str, Split] = {
    **{name: "train" for name in ("train", "training")},
    **{name: "val" for name in ("val", "valid", "validation", "dev")},
    **{name: "test" for name in ("test", "testing")},
}


def split_named(name: str | None) -> Split | None:
    """train, val or test from the names in use; None stays None."""
    if name is None or name == "":
        return None
    if name.strip().lower() not in _SPLITS:
        raise UserError(f"split: got {name!r:.60}, expected train, val or test")
    return _SPLITS[name.strip().lower()]


def extra_fields(row: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The row's other fields, which travel on in ``meta`` (its own ``meta`` merged in)."""
    own = row.get("meta")
    rest = {key: value for key, value in row.items() if key not in set(known)}
    return (own if isinstance(own, dict) else {}) | rest


def answer_type(given: Any, answer: str | None) -> tuple[str, dict[str, Any]]:
    """(type, what to keep in meta): closed means that the answer begins with yes or no.

    A closed question whose answer is not yes or no becomes open, the original kept; without a
    given type the answer decides.
    """
    yes_no = bool(answer and _YES_NO.match(answer))
    if given is None or given == "":
        return ("closed" if yes_no else "open"), {}
    if not isinstance(given, str) or given.strip().lower() not in ("closed", "open"):
        return ("closed" if yes_no else "open"), {"answer_type": given}
    name = given.strip().lower()
    if name == "closed" and not yes_no:
        return "open", {"answer_type": given}
    return name, {}


def images_of(
    named: Any, roots: Sequence[Path], writer: Writer, sha256: Any = None, prefix: str = ""
) -> tuple[str | list[str] | None, list[str]]:
    """Store the image or views a row names: (stored path or paths, the ones not there).

    Raises:
        UserError: a path that leaves its root, or a file that is no sound image.
    """
    if named is None or named == "" or named == []:
        return None, []
    names = named if isinstance(named, list) else [named]
    stored, missing, wrong = [], [], []
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"image: got {name!r:.60}, expected a path")
        path = find(name, roots)
        if path is None:
            missing.append(name)
            continue
        digest = sha256 if isinstance(sha256, str) and len(names) == 1 else None
        try:
            stored.append(writer.image(path, prefix + name, digest))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(dict.fromkeys(wrong)))
    writer.missing.update(prefix + name for name in missing)
    if not stored:
        return None, missing
    return (stored if isinstance(named, list) else stored[0]), missing


def find(name: str, roots: Sequence[Path]) -> Path | None:
    """The file ``name`` under one of ``roots``; None if it is not there."""
    if "\0" in name:
        raise UserError(f"image: got {name!r:.60}, expected a path")
    parts = Path(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"image: {name!r:.80} leaves its folder, expected a relative path inside")
    for root in roots:
        try:
            if (root / parts).is_file():
                return root / parts
        except OSError:  # a name the file system cannot hold
            return None
    return None
