"""What a check can find, and the report of one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mmedrag.data.checks.baselines import Baseline

FINDINGS = {  # code: (severity, what it means), the worst first
    "bad_row": ("error", "row cannot be read"),
    "empty_text": ("error", "question, answer or report is empty"),
    "image_missing": ("error", "image is not there"),
    "image_undecodable": ("error", "image is truncated or cannot be decoded"),
    "image_bomb": ("error", "image would decode to too many pixels"),
    "duplicate_id": ("error", "id stands twice"),
    "wrong_image": ("error", "row's id names another image than its own"),
    "leak_patient": ("error", "patient is in several splits"),
    "leak_image": ("error", "image is in several splits"),
    "leak_near_duplicate": ("error", "near-identical images are in different splits"),
    "image_token": ("error", "number of <image> marks differs from the number of images"),
    "closed_answer": ("error", "answer to a closed question does not begin with yes or no"),
    "answer_in_question": ("error", "closed question ends with its own yes or no"),
    "contradiction": ("error", "same image and closed question, yes and no"),
    "no_signal": ("error", "chosen and rejected are the same in everything"),
    "identity": ("error", "name-, date-, id- or contact-like words in a text"),
    "repeated_image": ("warning", "one image under several ids with different texts"),
    "duplicate_image": ("warning", "same picture in several files"),
    "near_duplicate": ("warning", "near-identical pictures of different patients"),
    "duplicate_question": ("warning", "same image and question more than once"),
    "question_in_answer": ("warning", "answer repeats the question, or holds one"),
    "cut_text": ("warning", "text breaks off in the middle"),
    "identical_texts": ("warning", "chosen and rejected say the same; only the image differs"),
    "duplicate_text": ("note", "same text under several studies"),
    "no_full_stop": ("note", "texts without final punctuation"),
    "made_open": ("note", "closed questions that import made open: neither yes nor no"),
    "wordy_answer": ("note", "closed answers with more than yes or no"),
    "no_id": ("note", "rows without an id"),
    "text_only": ("note", "rows whose image was absent at import"),
}


@dataclass
class Finding:
    """One thing that is wrong; ``count`` is how many rows or files it concerns."""

    code: str
    severity: str
    file: str
    line: int
    message: str
    id: str = ""
    count: int = 1
    related: list[str] = field(default_factory=list)  # other places, file:line
    images: list[str] = field(default_factory=list)  # files worth looking at

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}: {self.message}"


@dataclass
class CheckReport:
    """What a check found. ``exit_code`` is 1 when there is any error.

    ``most`` findings of a kind are kept in ``findings``; ``totals`` counts all of them.
    """

    paths: list[str]
    most: int = 5000
    rows: dict[str, int] = field(default_factory=dict)
    images: int = 0
    findings: list[Finding] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    baselines: list[Baseline] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, code: str, file: str, line: int, message: str, **more: Any) -> None:
        """Count a finding, and keep it unless there are many of its kind."""
        self.totals[code] = self.totals.get(code, 0) + 1
        if self.totals[code] <= self.most:
            self.findings.append(Finding(code, FINDINGS[code][0], file, line, message, **more))

    def sort(self) -> None:
        """The worst kinds first, each in the order of its files."""
        order = {code: n for n, code in enumerate(FINDINGS)}
        self.findings.sort(key=lambda f: (order[f.code], f.file, f.line, f.message))
        self.totals = {code: self.totals[code] for code in FINDINGS if code in self.totals}

    def total(self, severity: str) -> int:
        return sum(n for code, n in self.totals.items() if FINDINGS[code][0] == severity)

    @property
    def errors(self) -> int:
        return self.total("error")

    @property
    def exit_code(self) -> int:
        return 1 if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"errors": self.errors, "exit_code": self.exit_code}
