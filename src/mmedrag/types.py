"""The records that travel through the system, and their JSON Lines form.

Place in the picture: everything. An :class:`Example` (what is asked) becomes a
:class:`Trace` that gains fields stage by stage; :class:`Reference` rows are what can be
retrieved; the log, the page, the scorer and the pair builder all read traces.

Field names are those of the public contract (docs/data.md). Unknown fields are kept on a
round trip; a bad row is reported as ``file:line: field: what is wrong, what was expected``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

UNKNOWN = "unknown"  # the reserved domain label: no retriever, prompt without references
Task = Literal["vqa", "report"]
Split = Literal["train", "val", "test"]
AnswerType = Literal["closed", "open"]
Label = Literal["yes", "no", "unclear"]
NoiseKind = Literal["gaussian_clip", "additive", "blank", "other_patient", "shuffle_patches"]
PairKind = Literal["cross_modal", "copy", "resist", "stage1", "unaided"]


class UserError(Exception):
    """Bad input or usage. The message is one line: what, where, expected. Exit code 2."""


class Record(BaseModel):
    """Base of all records: strict types, unknown fields kept, absent fields stay absent."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    def to_json(self) -> str:
        """One JSON line (no newline): the fields that were given or set, in declared order."""
        return json.dumps(
            self.model_dump(mode="json", exclude_unset=True), ensure_ascii=False, allow_nan=False
        )

    @classmethod
    def from_json(cls, line: str | bytes) -> Any:
        return cls.model_validate_json(line)


class _Row(Record):
    """Fields shared by examples and references."""

    id: str = Field(min_length=1)
    image: str | list[str] | None = None
    domain: str | None = None
    patient: str | None = None
    split: Split | None = None
    source: str | None = None
    licence: str | None = None
    attribution: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    root: Path | None = Field(default=None, exclude=True, repr=False)  # DATA folder, not stored

    @field_validator("image")
    @classmethod
    def _inside_data(cls, value: str | list[str] | None) -> str | list[str] | None:
        for path in [value] if isinstance(value, str) else value or []:
            if not path or path.startswith("/") or ".." in Path(path).parts or "\\" in path:
                raise ValueError(f"{path!r} is not a relative path inside the data folder")
        return value

    @field_validator("domain")
    @classmethod
    def _not_reserved(cls, value: str | None) -> str | None:
        if value == UNKNOWN or value == "":
            raise ValueError("'unknown' and '' are reserved; leave the field out instead")
        return value

    @property
    def images(self) -> list[Path]:
        """Paths of the views, resolved against the data folder the row was read from."""
        names = [self.image] if isinstance(self.image, str) else self.image or []
        return [(self.root or Path()) / name for name in names]


class Example(_Row):
    """One question (``task="vqa"``) or one report to write (``task="report"``).

    ``answer`` is the target: the answer, or the ground-truth report; None when unknown.
    """

    task: Task
    question: str | None = None
    answer: str | None = None
    answer_type: AnswerType | None = None

    @model_validator(mode="after")
    def _complete(self) -> Example:
        if self.task == "vqa" and not (self.question or "").strip():
            raise ValueError("question: missing or empty, expected text for task 'vqa'")
        return self


class Reference(_Row):
    """One corpus row: a report that can be retrieved. ``text`` may be empty (image only)."""

    text: str


class Finding(Record):
    """State of one finding in the benchmark's ground truth."""

    present: bool
    side: str | None = None
    count: int | None = None
    severity: str | None = None


class Truth(Record):
    """One line of ``truth.jsonl``: the exact findings of one benchmark study."""

    study: str
    patient: str
    domain: str
    findings: dict[str, Finding]


class Hit(Record):
    """One retrieved reference: cosine ``score``, ``rank`` from 0 (best)."""

    id: str
    text: str
    score: float
    rank: int


class Domain(Record):
    """Result of domain identification: ``label`` may be ``"unknown"``; scores are calibrated."""

    label: str
    confidence: float | None = None
    scores: dict[str, float] = Field(default_factory=dict)


class Selection(Record):
    """What a rule kept of the hits, and why it cut there."""

    rule: str
    params: dict[str, Any] = Field(default_factory=dict)
    kept: list[str] = Field(default_factory=list)
    reason: str = ""


class Prompt(Record):
    """A rendered prompt. ``text`` is the user turn (style "chat": the model's own chat template
    wraps it and places the image) or the whole conversation with ``<image>`` (style "raw")."""

    template: str  # "set/name@hash"
    text: str
    style: Literal["chat", "raw"] = "chat"
    references: list[str] = Field(default_factory=list)  # ids inside the text, in order
    dropped: list[str] = Field(default_factory=list)  # selected, but did not fit the context


class Answer(Record):
    """What the model said. ``p_yes`` is P(yes)/(P(yes)+P(no)) at the first answer token of a
    closed question; ``other_mass`` is the probability outside both verbalizer sets."""

    text: str
    label: Label | None = None
    p_yes: float | None = None
    other_mass: float | None = None
    model: str = ""
    logprob: float | None = None


class Noise(Record):
    """A seeded degradation of the image, drawn at model resolution (see images.apply_noise)."""

    kind: NoiseKind
    seed: int
    params: dict[str, Any] = Field(default_factory=dict)


class Condition(Record):
    """Under which circumstances a trace was made."""

    image: Literal["clean", "noise"] = "clean"
    noise: Noise | None = None
    references: str = "selected"  # none|all|selected|shuffled|random|contradicting|own


class Trace(Record):
    """The one record that travels: an example plus what every stage added to it."""

    example_id: str
    task: Task
    question: str | None = None
    answer_type: AnswerType | None = None
    patient: str | None = None
    split: Split | None = None
    source: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    image: str | list[str] | None = None
    target: str | None = None
    target_domain: str | None = None  # the example's own domain, when the data states one
    condition: Condition = Field(default_factory=Condition)
    domain: Domain | None = None
    hits: list[Hit] = Field(default_factory=list)
    excluded: int = 0
    selection: Selection | None = None
    prompt: Prompt | None = None
    answer: Answer | None = None
    error: str | None = None
    example: Example | None = Field(default=None, exclude=True, repr=False)  # while in flight

    @classmethod
    def of(cls, example: Example, condition: Condition | None = None) -> Trace:
        """The empty trace of an example; the example itself rides along, unstored."""
        return cls(
            example_id=example.id, task=example.task, question=example.question,
            answer_type=example.answer_type, patient=example.patient, split=example.split,
            source=example.source, meta=dict(example.meta), image=example.image,
            target=example.answer, target_domain=example.domain,
            condition=condition or Condition(), example=example,
        )  # fmt: skip


class Side(Record):
    """One side of a preference pair: the full prompt, the image and its noise, the answer."""

    prompt: Prompt
    image: str | list[str] | None = None
    noise: Noise | None = None
    text: str


class Pair(Record):
    """A preference pair. Each side has its own prompt, image and text, so no flags are needed."""

    id: str
    kind: PairKind
    chosen: Side
    rejected: Side
    reference_ids: list[str] = Field(default_factory=list)
    trace_ids: list[str] = Field(default_factory=list)
    reason: str = ""
    patient: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    root: Path | None = Field(default=None, exclude=True, repr=False)


class Score(Record):
    """One per-example value of one metric."""

    example_id: str
    metric: str
    value: float


R = TypeVar("R", bound=Record)


class BadRow(Record):
    """A row that could not be used; one line of ``rejected.jsonl``."""

    file: str
    line: int
    reason: str
    row: Any = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def explain(error: ValidationError) -> str:
    """The first validation error as ``field: what is wrong`` on one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) else f", got {given!r:.60}"
    return " ".join(f"{where + ': ' if where else ''}{message}{shown}".split())


def read_jsonl(path: Path, record: type[R], rejected: list[BadRow] | None = None) -> Iterator[R]:
    """Yield the valid rows of a JSON Lines file.

    A bad row is appended to ``rejected`` when a list is given, otherwise it raises
    :class:`UserError` with file, line, field and what was expected. Blank lines are skipped.
    """
    try:
        handle = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield record.from_json(line)
            except ValidationError as error:
                bad = BadRow(
                    file=str(path), line=number, reason=explain(error),
                    row=line.decode("utf-8", "replace").rstrip("\n"),
                )  # fmt: skip
                if rejected is None:
                    raise UserError(str(bad)) from None
                rejected.append(bad)


def write_jsonl(path: Path, rows: Iterable[Record]) -> int:
    """Write rows atomically (temporary file, fsync, rename). Returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = 0
    with open(part, "w", encoding="utf-8", newline="\n") as handle:
        for row in rows:
            handle.write(row.to_json() + "\n")
            count += 1
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    return count


class DataFolder:
    """A DATA folder of the contract: examples.jsonl, corpus.jsonl, truth.jsonl, images/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such data folder, expected a folder with examples.jsonl")

    def _rows(self, name: str, record: type[R]) -> list[R]:
        path = self.path / name
        if not path.exists():
            return []
        rows, seen = [], set()
        for number, row in enumerate(read_jsonl(path, record), 1):
            if hasattr(row, "root"):
                row.root = self.path
                row.model_fields_set.discard("root")
            key = getattr(row, "id", None)
            if key is not None:
                if key in seen:
                    raise UserError(f"{path}:{number}: id: {key!r} stands twice, expected unique")
                seen.add(key)
            rows.append(row)
        return rows

    def examples(self, split: str | None = None, task: str | None = None) -> list[Example]:
        rows = self._rows("examples.jsonl", Example)
        return [r for r in rows if split in (None, r.split) and task in (None, r.task)]

    def corpus(self, split: str | None = None, domain: str | None = None) -> list[Reference]:
        rows = self._rows("corpus.jsonl", Reference)
        return [r for r in rows if split in (None, r.split) and domain in (None, r.domain)]

    def truth(self) -> dict[str, Truth]:
        """Ground truth by study id (benchmark data only; empty otherwise)."""
        return {row.study: row for row in self._rows("truth.jsonl", Truth)}
