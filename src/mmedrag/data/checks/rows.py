"""One shape for the rows that a check looks at, wherever they come from.

Read from a DATA folder (or one of its files) or from released files; the row is judged as it
stands there, before any import cleans it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmedrag.data.formats import released
from mmedrag.data.rows import SourceRow, read_rows
from mmedrag.records import Example, Pair, Record, Reference, UserError
from mmedrag.runtime import explain

TABLES: dict[str, type[Record]] = {
    "examples.jsonl": Example,
    "corpus.jsonl": Reference,
    "pairs.jsonl": Pair,
}


@dataclass
class Item:
    """What a check wants to know of a row. ``error`` is set when it cannot be read."""

    file: str
    line: int
    kind: str  # example | corpus | pair
    id: str = ""
    scope: str = ""  # ids are unique within it
    source: str = ""
    task: str = ""
    question: str | None = None
    answer: str | None = None
    closed: bool = False
    made_open: bool = False  # an import found its answer to be neither yes nor no
    text: str | None = None  # report, caption or corpus text
    images: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)  # where they lie, as far as that is known
    missing: list[str] = field(default_factory=list)  # an import said: not there
    patient: str | None = None
    split: str | None = None
    study: str | None = None
    tokens: list[tuple[str, int]] = field(default_factory=list)  # (place, count of <image>)
    tokens_needed: bool = False  # released rows carry one <image> per prompt
    sides: tuple[Any, Any] | None = None  # a pair's two sides, comparable
    texts: tuple[str, str] | None = None
    noised: bool = False
    own_id: str = ""  # what its source calls it
    error: str | None = None

    @property
    def named(self) -> list[str]:
        """The pictures that the row is about, whether they are there or not."""
        return [*self.images, *(f"{self.source}/{name}" for name in self.missing)]

    @property
    def readable_texts(self) -> list[str]:
        """Every text that a person would read, each once."""
        texts = [self.text, self.question, self.answer]
        for side in self.sides or ():
            texts += [side[0], side[3]]
        return list(dict.fromkeys(text for text in texts if text))


def read(path: Path, image_root: released.Roots | None = None) -> Iterator[Item]:
    """Items of a DATA folder, one of its files, or released files."""
    if path.is_dir() and any((path / name).is_file() for name in TABLES):
        for name in TABLES:
            if (path / name).is_file():
                yield from _native(path / name, path)
        return
    if path.name in TABLES and path.is_file():
        yield from _native(path, path.parent)
        return
    if not path.exists():
        raise UserError(f"{path}: does not exist, expected a data folder or released files")
    for file, name in released.sources(path):
        shown = str(path) if path.is_file() else f"{path}/{name}"
        last = 0
        for row in read_rows(file, shown):
            item = _released(row, name, image_root)
            if row.line == last:  # a whole array on one line: say which element
                item.file = f"{shown}[{row.number}]"
            last = row.line
            yield item


def _native(path: Path, root: Path) -> Iterator[Item]:
    record = TABLES[path.name]
    kind = {"examples.jsonl": "example", "corpus.jsonl": "corpus"}.get(path.name, "pair")
    for row in read_rows(path):
        item = Item(row.file, row.line, kind, scope=str(path))
        if row.error:
            item.error = row.error
            yield item
            continue
        try:
            value: Any = record.model_validate(row.value)
        except ValidationError as error:
            item.error = explain(error)
            yield item
            continue
        item.id, item.patient = value.id, value.patient
        meta = value.meta
        item.missing = [str(m) for m in meta.get("missing_images") or []]
        item.study = str(meta.get("study") or value.id)
        if isinstance(value, Pair):
            _pair(item, value, root)
            yield item
            continue
        item.source, item.split = value.source or root.name, value.split
        names = [value.image] if isinstance(value.image, str) else list(value.image or [])
        item.images = item.paths = [f"{root}/{name}" for name in names]
        if isinstance(value, Example):
            item.task, item.question, item.answer = value.task, value.question, value.answer
            item.closed = value.answer_type == "closed"
            was = str(meta.get("answer_type", "")).strip().lower()
            item.made_open = was == "closed" and not item.closed
            item.text = value.answer if value.task == "report" else None
            if value.question:
                item.tokens = [("question", value.question.count("<image>"))]
        elif isinstance(value, Reference):
            item.text = value.text
        yield item


def _pair(item: Item, pair: Pair, root: Path) -> None:
    item.source = str(pair.meta.get("source") or root.name)
    item.split = pair.meta.get("split")
    sides = []
    for side in (pair.chosen, pair.rejected):
        names = [side.image] if isinstance(side.image, str) else list(side.image or [])
        item.images += [f"{root}/{n}" for n in names if f"{root}/{n}" not in item.images]
        noise = side.noise.model_dump() if side.noise else None
        sides.append((side.prompt.text, tuple(names), str(noise), side.text))
    item.paths = item.images
    item.sides, item.texts = (sides[0], sides[1]), (pair.chosen.text, pair.rejected.text)
    origin = pair.meta.get("released")
    fields = origin.get("fields") if isinstance(origin, dict) else None
    item.own_id = str(fields.get("id") or "") if isinstance(fields, dict) else item.id
    item.noised = sides[0][2] != sides[1][2] or sides[0][1] != sides[1][1]


def _released(row: SourceRow, name: str, image_root: released.Roots | None) -> Item:
    item = Item(row.file, row.line, "example", scope=row.file)
    value = row.value
    kind = released.kind_of(value)
    if row.error or kind is None:
        item.error = row.error or "none of the released row formats"
        return item
    try:
        study = released.identify(value, name)
    except (TypeError, ValueError) as error:
        item.error = f"cannot be read: {error}"
        return item
    item.source, item.study, item.patient = study.dataset or name, study.name, study.patient
    item.split = released.split_of(name, value)
    own = value.get("question_id", value.get("id"))
    item.id = item.own_id = str(own) if isinstance(own, (str, int)) else ""
    names = released.image_names(value)
    item.images = [f"{item.source}/{n}" for n in names]
    roots = released.roots_for(image_root, study)
    item.paths = [
        str(next((r / n for r in roots if (r / n).is_file()), roots[0] / n)) for n in names if roots
    ]
    if kind == "alignment":
        item.kind = "pair"
        _alignment(item, value)
        return item
    if kind == "report":
        item.kind = "corpus"
        item.task = "report"
        item.text = _text(value, next(k for k in released.TEXT_KEYS if k in value))
        return item
    item.task = "report" if "gt_report" in value else "vqa"
    key = "question" if kind == "vqa" else "prompt"
    answer = "answer" if kind == "vqa" else "gt_answer"
    for wanted in (key, *([answer] if item.task == "vqa" else [])):
        if not isinstance(value.get(wanted), str):
            item.error = f"{wanted}: got {value.get(wanted)!r:.60}, expected text"
            return item
    item.question, item.answer = _text(value, key), _text(value, answer)
    item.closed = item.task == "vqa"
    item.tokens_needed = kind == "vqa"
    asked = [key, *(["text"] if isinstance(value.get("text"), str) else [])]
    item.tokens = [(k, str(value.get(k, "")).count("<image>")) for k in asked]
    return item


def _text(value: Mapping[str, Any], key: str) -> str | None:
    found = value.get(key)
    return found if isinstance(found, str) else None


def _alignment(item: Item, value: Mapping[str, Any]) -> None:
    sides: list[tuple[str, tuple[str, ...], str, str]] = []
    for key in ("conversations", "rejected_conversations"):
        turns = value[key]
        given = turns if isinstance(turns, list) else []
        values = [v for t in given if isinstance(t, dict) and isinstance(v := t.get("value"), str)]
        if len(given) != 2 or len(values) != 2:
            item.error = f"{key}: expected two turns with text"
            return
        item.tokens.append((key, values[0].count("<image>")))
        noise = bool(value.get("rejected_noised")) and key != "conversations"
        sides.append((values[0], tuple(item.images), str(noise), values[1]))
    item.tokens_needed = True
    item.sides, item.texts = (sides[0], sides[1]), (sides[0][3], sides[1][3])
    item.noised = bool(value.get("rejected_noised"))
