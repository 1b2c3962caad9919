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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmedrag.records.vocabulary import (
    UNKNOWN,
    AnswerType,
    Label,
    NoiseKind,
    PairKind,
    Split,
    Task,
    UserError as UserError,  # every user of records needs it
)


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
    options: list[str] | None = None  # of a multiple-choice question; ``answer`` is one of them

    @classmethod
    def of(
        cls, image: str | Path | Sequence[str | Path], question: str | None = None, **fields: Any
    ) -> Example:
        """The example of picture files outside a data folder (one, or the views of a study).

        Example::

            example = Example.of("chest.png", "Is there a nodule?", patient="p7")
        """
        given = [image] if isinstance(image, (str, Path)) else image
        views = [Path(view).resolve() for view in given]
        root = Path(os.path.commonpath([view.parent for view in views]))
        names = [view.relative_to(root).as_posix() for view in views]
        known = {"id": "asked", "task": "report" if question is None else "vqa"}
        example = cls(**{**known, "question": question, "image": names, **fields})
        example.root = root
        return example

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
    """Result of domain identification: ``label`` may be ``"unknown"``, ``reason`` then says why;
    scores are calibrated. ``by`` says who stated it: ``option`` (the user, for all), ``model``
    (one that the user named), ``embedded``, ``shipped``, ``row`` or ``index`` (the only one)."""

    label: str
    confidence: float | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    reason: str | None = None
    by: str | None = None


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
    closed question; ``other_mass`` is the probability outside both verbalizer sets. What a model
    thought before it answered is in ``raw`` (the whole reply) or ``reasoning`` (sent apart)."""

    text: str
    label: Label | None = None
    p_yes: float | None = None
    other_mass: float | None = None
    model: str = ""
    logprob: float | None = None
    raw: str | None = None  # only where it is more than ``text``
    reasoning: str | None = None
    refusal: str | None = None  # why a server would not answer
    finish_reason: str | None = None  # stop, length, content_filter, ... where a server says so


class Noise(Record):
    """A seeded degradation of the image, drawn at model resolution (see images.apply_noise)."""

    kind: NoiseKind
    seed: int
    params: dict[str, Any] = Field(default_factory=dict)


class Condition(Record):
    """Under which circumstances a trace was made."""

    image: Literal["clean", "noise"] = "clean"
    noise: Noise | None = None
    references: str = "selected"  # none|all|selected|shuffled|random|contradicting|own|shown


class Trace(Record):
    """The one record that travels: an example plus what every stage added to it."""

    example_id: str
    task: Task
    question: str | None = None
    answer_type: AnswerType | None = None
    options: list[str] | None = None
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

    @property
    def live(self) -> Example:
        """The example in flight."""
        if self.example is None:
            raise UserError(
                f"{self.example_id}: trace was read from a file, expected a live example"
            )
        return self.example

    @classmethod
    def of(cls, example: Example, condition: Condition | None = None) -> Trace:
        """The empty trace of an example; the example itself rides along, unstored."""
        trace = cls(
            example_id=example.id,
            task=example.task,
            question=example.question,
            answer_type=example.answer_type,
            patient=example.patient,
            split=example.split,
            source=example.source,
            meta=dict(example.meta),
            image=example.image,
            target=example.answer,
            target_domain=example.domain,
            condition=condition or Condition(),
            example=example,
        )
        if example.options:  # unset where there are none, so that such rows have no such field
            trace.options = list(example.options)
        return trace


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
    """One per-example value of one metric: of which run and task it is, is said where several
    stand in one file."""

    example_id: str
    metric: str
    value: float
    run: str | None = None
    task: str | None = None


def group_of(trace: Trace) -> str:
    """The domain a row is scored under: the data's own label, else the identified one."""
    return trace.target_domain or (trace.domain.label if trace.domain else None) or "unspecified"


Row = Example | Reference
