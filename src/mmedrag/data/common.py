"""What the importers share: their files, their rows, a row's fields, and finding its images."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mmedrag.data.rows import SourceRow, literal, read_rows
from mmedrag.data.writer import Writer
from mmedrag.records import Split, UserError

_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
# where a prompt has its pictures, in the words of LLaVA, Qwen, InternLM, InternVL, Phi, Llama,
# Gemma, Pixtral, MiniCPM, DeepSeek, GLM, Kimi and others: a pair of marks with what stands between
# (Qwen's has the path), or one mark
_PAD = r"<[|｜]?(?:image|img_context|imgpad|image_pad|image_soft_token|media_\w+|patch)[|｜]?>"
_MARKER = (
    r"\(<image>\./</image>\)|(?:Picture \d+:\s*)?<(img|image)>(?:[^<\n]|<img_context>)*</\1>"
    r"|<(?:[|｜](?:vision_start|begin_of_image|image_start|media_start|img_start)[|｜]"
    rf"|boi|im_start|img_start|start_of_image)>(?:[^<\n]|{_PAD})*?"
    r"<(?:[|｜](?:vision_end|end_of_image|image_end|media_end|img_end)[|｜]"
    r"|eoi|im_end|img_end|end_of_image)>"
    r"|<[|｜/]?(?:fim_|begin_of_|start_of_|end_of_)?(?:image|img)"
    r"(?:[ _-]?(?:\d+|start|end|pad|placeholder|token|soft_token|context|here))?[|｜]?>"
    r"|<(?:boi|eoi|[|｜]vision_(?:start|end)[|｜]|[|｜]media_\w+[|｜])>|\[IMG(?:_END|_BREAK)?\]"
)
_PLACE = re.compile(_MARKER, re.IGNORECASE)
_IMAGE_TOKEN = re.compile(rf"\s*(?:{_MARKER})\s*", re.IGNORECASE)
_PATH = re.compile(r"<img>([^<\n]+)</img>")
# texts that stand for no text; NOTHING is more, for fields that are never "none"
PLACEHOLDERS = frozenset({"nan", "n/a", "#n/a", "<na>", "null", "nat"})
NOTHING = PLACEHOLDERS | {"na", "none", "nil", "n.a", "unknown", "not available", "not applicable"}
# fields that name the picture or the views of a row
IMAGE_KEYS = (
    *("image", "images", "image_name", "img_name", "image_path", "image_paths", "images_path"),
    *("img_path", "img", "figure_path", "image_file", "img_file", "path_to_image"),
)
_VIEW = re.compile(r"(?:image|img)[ _-]?\d+", re.IGNORECASE)  # a field each, as in MMMU
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
# the first bytes of PNG, JPEG, GIF, WebP and BMP in base64, as some tables hold pictures
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk")
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

    ``skip``: beginnings of names that are left out, as hidden ones are.

    Raises:
        UserError: none there.
    """
    if src.is_file():
        if src.suffix.lower() in TABLES and src.suffix.lower() not in suffixes:
            raise UserError(f"{src}: is a table; import it as one: mmedrag data import table")
        return [(src, src.name)]
    found = sorted(
        path
        for path in src.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not path.name.startswith((".", *skip))
    )
    if not found:
        raise UserError(f"{src}: no {' or '.join(suffixes)} in it")
    return [(path, path.relative_to(src).as_posix()) for path in found]


ImageRoot = Path | Sequence[Path]


def image_roots(src: Path, image_root: ImageRoot | None) -> list[Path]:
    """Where a source's images lie: where the user says (one or several), else beside it."""
    if image_root:
        return [image_root] if isinstance(image_root, Path) else list(image_root)
    return [src if src.is_dir() else src.parent]


def rows_of(
    files: Iterable[tuple[Path, str]],
    writer: Writer,
    read: Callable[[Path, str], Iterable[SourceRow]] | None = None,
) -> Iterator[SourceRow]:
    """The rows of all files; a file without any is named in the notes.

    Raises:
        UserError: all are empty.
    """
    empty, filled, read = [], False, read or partial(read_rows, nulls=True)
    for path, name in files:
        count = 0
        if not _blank(path):
            for row in read(path, name):
                count += 1
                yield row
        filled = filled or count > 0
        empty += [] if count else [name]
    if empty and not filled:
        raise UserError(f"{', '.join(empty):.300}: empty, expected rows")
    writer.result.notes += [f"{name}: empty, no row in it" for name in empty]


def _blank(path: Path) -> bool:
    try:
        with open(path, "rb") as handle:
            return all(not line.strip(b"\xef\xbb\xbf \t\r\n") for line in handle)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


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
    """The question without image markers and without the released yes/no instruction.

    Both belong to the prompt, which is rendered anew.
    """
    return _OPTIONS.sub("", unmarked(text)).strip()


def pick(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The row's own name of the first of ``names``, in any case, that has a value."""
    filled = [str(key) for key, value in row.items() if value not in (None, "", [])]
    own = {key.casefold(): key for key in reversed(filled)}
    return next((own[n] for n in names if n in own), None)


def named_images(row: Mapping[str, Any], text: str, names: Sequence[str]) -> tuple[Any, list[str]]:
    """What names a row's picture or views, and the fields that say it.

    Those are the first of ``names``; else a field a view (``image_1``, ``image_2``); else a path in
    the text (``<img>a.png</img>``).
    """
    if (key := pick(row, names)) and not is_placeholder(row[key], NOTHING):
        value = row[key]
        views = literal(value.strip()) if isinstance(value, str) else None  # "['a.png', 'b.png']"
        return (views if isinstance(views, list) else value), [key]
    views = [str(k) for k in row if _VIEW.fullmatch(str(k)) and row[k] not in (None, "", [])]
    if views:
        return [row[view] for view in views], views
    return _PATH.findall(text), [key] if key else []


def expect_image(text: str, named: Any) -> str | None:
    """Refuse a row whose text has a place for a picture, but that names none.

    Returns what is doubtful: more places than pictures.
    """
    places = sum(1 for _ in _PLACE.finditer(text))
    if places and named in (None, "", []):
        raise UserError(
            "the text has a place for a picture, but the row names none; "
            f"expected one of {', '.join(IMAGE_KEYS)}"
        )
    pictures = len(named) if isinstance(named, list) else 1
    return f"{places} places for pictures, {pictures} named" if places > pictures else None


def is_placeholder(value: Any, words: frozenset[str] = PLACEHOLDERS) -> bool:
    """Is it a word such as ``nan`` or ``N/A`` that stands for nothing?"""
    if not isinstance(value, str):
        return False
    word = value.strip().casefold()
    bare = words is NOTHING and bool(word) and not any(c.isalnum() for c in word)  # "--", "___"
    return bare or word in words or word.rstrip(".") in words


def unmarked(text: str) -> str:
    """The text without its places for pictures."""
    return _IMAGE_TOKEN.sub("\n", text).strip()


def text_of(
    row: Mapping[str, Any],
    key: str,
    required: bool = False,
    numbers: bool = False,
    absent: frozenset[str] = PLACEHOLDERS,
) -> str | None:
    """A text field; null, absent and the words ``absent`` are None.

    ``numbers`` also takes ints and floats as text.
    """
    value = row.get(key)
    if is_placeholder(value, absent):
        value = None
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
    names = [n for n in named if n not in (None, "")] if isinstance(named, list) else [named]
    stored, missing, wrong = [], [], []
    for given in names:
        path_given, data = _named(given)
        if data is not None:
            short = hashlib.sha256(data).hexdigest()[:16]
            stored.append(writer.picture(f"embedded {short}", data, f"{prefix}embedded/{short}"))
            continue
        name = below(path_given, roots)
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
    looked = ", ".join(dict.fromkeys(map(str, roots)))
    writer.missing.update((prefix + name, looked) for name in missing)
    if not stored:
        return None, missing
    return (stored if isinstance(named, list) else stored[0]), missing


def _named(given: Any) -> tuple[str, bytes | None]:
    """(path, content): an image as a row has it, the content where it stands in the row."""
    if isinstance(given, Mapping):
        if isinstance(given.get("bytes"), bytes):
            return "", bytes(given["bytes"])
        given = given.get(pick(given, ("bytes", "path", "url", "image")) or "path")
    if not isinstance(given, str) or not given or "\0" in given:
        raise UserError(f"image: got {given!r:.60}, expected a path")
    coded = re.sub(r"^data:image/[\w.+-]+;base64,", "", given)
    if coded != given or (len(given) > 200 and given.startswith(_BASE64)):
        try:
            return "", base64.b64decode("".join(coded.split()), validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"image: {given[:40]!r}… is not base64") from None
    if given.startswith("file://"):
        return unquote(given.removeprefix("file://").removeprefix("localhost")), None
    return given, None


def below(name: str, roots: Sequence[Path]) -> str:
    """An absolute path below one of ``roots`` as a path relative to it; others as they are."""
    if not os.path.isabs(name):
        return name
    for root in roots:
        for start in (os.path.abspath(root), os.path.realpath(root)):
            if os.path.normpath(name).startswith(start.rstrip("/") + "/"):
                return os.path.relpath(name, start)
    return name


def find(name: str, roots: Sequence[Path]) -> Path | None:
    """The file ``name`` under one of ``roots``; None if it is not there."""
    if "\0" in name:
        raise UserError(f"image: got {name!r:.60}, expected a path")
    parts = Path(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(
            f"image: {name!r:.80} leaves its folder, expected a path below the image root"
        )
    for root in roots:
        try:
            if (root / parts).is_file():
                return root / parts
        except OSError:  # a name the file system cannot hold
            return None
    return None
