"""``data import manifest``: one JSON Lines row per image, as public sets are often prepared.

Row: ``id, domain, modality, image, text, text_kind, labels, qa, patient, source, licence,
attribution`` (docs/data.md). Every row gives a corpus row, every ``qa`` a vqa example, every
row with a ``report``, ``caption`` or ``note`` also a report example.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmedrag.datasets.rows import Row, read_rows
from mmedrag.datasets.writer import Writer
from mmedrag.types import Split, UserError

TEXT_KINDS = ("report", "caption", "note", "labels", "none")
WRITTEN = ("report", "caption", "note")  # kinds that are a target to write
TRAIN_ONLY = {"dsb2018": "many pictures are crops of the same slide"}
_OWN = {
    "id", "domain", "image", "text", "qa", "patient", "split", "source", "licence",
    "attribution", "meta",
}  # fmt: skip
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


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
    src: Path, writer: Writer, *, image_root: Path | None = None,
    train_only: Sequence[str] = tuple(TRAIN_ONLY),
) -> None:  # fmt: skip
    """Fill ``writer`` from the manifests at ``src``.

    Image paths are relative to ``image_root`` (default: the manifest's folder). Rows of the
    sources in ``train_only`` go to split ``train``.
    """
    done = 0
    for path in sources(src):
        for row in read_rows(path, path.name):
            done += 1
            writer.tick(done)
            if row.error:
                writer.reject(row, row.error)
                continue
            try:
                _row(row, writer, image_root or path.parent, train_only)
            except UserError as error:
                writer.reject(row, str(error))


def _row(row: Row, writer: Writer, root: Path, train_only: Sequence[str]) -> None:
    value = row.value
    if not isinstance(value, dict):
        raise UserError("expected an object with id, image, text, text_kind, qa")
    row_id = text_of(value, "id", required=True)
    kind = value.get("text_kind", "report" if value.get("text") else "none")
    if kind not in TEXT_KINDS:
        raise UserError(f"text_kind: got {kind!r:.60}, expected one of {', '.join(TEXT_KINDS)}")
    text = text_of(value, "text") or ""
    pairs = value.get("qa") or []
    if not isinstance(pairs, list):
        raise UserError("qa: expected a list of {question, answer, answer_type}")
    meta = {"study": row_id} | free(value, _OWN)
    shared: dict[str, Any] = {
        key: text_of(value, key)
        for key in ("domain", "patient", "source", "licence", "attribution")
    }
    shared["split"] = split_named(text_of(value, "split"))
    if shared["split"] is None and shared["source"] in train_only:
        shared["split"] = "train"
    image, missing = images_of(value.get("image"), [root], writer, value.get("sha256"))
    if missing:
        meta["missing_images"] = missing
    shared["image"] = image
    if not writer.reference(row, id=row_id, text=text, meta=meta, **shared):
        return
    light = {key: meta[key] for key in ("study", "modality", "missing_images") if key in meta}
    if kind in WRITTEN and text.strip():
        writer.example(
            row, id=f"{row_id}/report", task="report", answer=text,
            meta=light | {"text_kind": kind}, **shared,
        )  # fmt: skip
    for number, pair in enumerate(pairs):
        where = f"qa.{number}"
        if not isinstance(pair, dict):
            writer.reject(row, f"{where}: expected an object, got {pair!r:.60}")
            continue
        extra = free(pair, {"question", "answer", "answer_type"})
        try:
            question = text_of(pair, "question", required=True)
            answer = text_of(pair, "answer", numbers=True)
        except UserError as error:
            writer.reject(row, f"{where}: {error}")
            continue
        kept, original = answer_type(pair.get("answer_type"), answer)
        writer.example(
            row, id=f"{row_id}/qa-{number}", task="vqa", question=question,
            answer=answer, answer_type=kept, meta=light | extra | original, **shared,
        )  # fmt: skip


# --- shared by the importers ---------------------------------------------------------------------


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
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip


def split_named(name: str | None) -> Split | None:
    """train, val or test from the names in use; None stays None."""
    if name is None or name == "":
        return None
    if name.strip().lower() not in _SPLITS:
        raise UserError(f"split: got {name!r:.60}, expected train, val or test")
    return _SPLITS[name.strip().lower()]


def free(row: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
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
    stored, missing = [], []
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f"image: got {name!r:.60}, expected a path")
        path = find(name, roots)
        if path is None:
            missing.append(name)
            continue
        digest = sha256 if isinstance(sha256, str) and len(names) == 1 else None
        stored.append(writer.image(path, prefix + name, digest))
    writer.missing.update(prefix + name for name in missing)
    if not stored:
        return None, missing
    return (stored if isinstance(named, list) else stored[0]), missing


def find(name: str, roots: Sequence[Path]) -> Path | None:
    """The file ``name`` under one of ``roots``; None if it is not there."""
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
