"""What a run did not find: rows without a hit, a picture or an answer, and the commonest reason.

Place in the picture: after a batch command. A run in which nothing was found for any row looks
like one that worked, file by file; here it is told apart.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)
MANY = 0.1  # share of rows from which on a warning is due
CUT_OFF = "cut off while the model was still reasoning (--set generator.reasoning_tokens=N)"
WHAT = {"image": "no picture", "reference": "no reference was found", "answer": "no answer"}


@dataclass
class Found:
    """Counts over traces (as their JSON objects).

    Attributes:
        index: an index was given, so that a row without a hit counts as one without a reference.
        model: a model was given, so that a row without an answer counts.
        lacks: what is missing → reason → rows; reasons differ in their wording, not in ids.
    """

    index: bool = True
    model: bool = False
    asked: Counter[str] = field(default_factory=Counter)  # what → rows that should have it
    kept: int = 0  # rows of which the rule kept a reference
    dropped: Counter[str] = field(default_factory=Counter)  # why it kept none of the others
    lacks: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, traces: Iterable[Mapping[str, Any]]) -> Found:
        for trace in traces:
            wanted = self.index and trace["condition"]["references"] != "none"
            self.asked.update({"image": 1, "reference": wanted, "answer": self.model})
            if not trace.get("image"):
                self._lacks("image", "their rows name no image")
            if wanted:
                if not trace["hits"]:
                    self._lacks("reference", _why_no_hit(trace))
                elif selection := trace.get("selection"):
                    self.kept += bool(selection["kept"])
                    if not selection["kept"]:
                        self.dropped[f"{selection['rule']}: {_kind(selection['reason'])}"] += 1
            answer = trace.get("answer") or {}
            if self.model and not (answer.get("text") or "").strip():
                self._lacks("answer", _kind(trace.get("error") or _why_no_text(answer)))
        return self

    def _lacks(self, what: str, reason: str) -> None:
        self.lacks.setdefault(what, Counter())[reason] += 1

    @property
    def nothing(self) -> bool:
        """Something was found for no row at all."""
        return any(reasons.total() == self.asked[what] for what, reasons in self.lacks.items())

    def tell(self) -> dict[str, int]:
        """Log one line for each thing that all rows, or many, lack; how many lack what."""
        for what, reasons in self.lacks.items():
            count, rows, (reason, _) = reasons.total(), self.asked[what], reasons.most_common(1)[0]
            words = f"{WHAT[what]} in {count} of {rows} rows"
            if count == rows:
                log.error("error: %s: %s", words, reason)
            elif count > MANY * rows:
                log.warning("%s, most often: %s", words, reason)
        cut = self.lacks.get("answer", Counter())[CUT_OFF]
        if 0 < cut <= MANY * self.asked["answer"]:
            log.warning("no answer in %d of %d rows: %s", cut, self.asked["answer"], CUT_OFF)
        if self.dropped and not self.kept:
            count, (reason, _) = self.dropped.total(), self.dropped.most_common(1)[0]
            log.warning("the selection rule kept nothing in any of %d rows: %s", count, reason)
        return {what: reasons.total() for what, reasons in self.lacks.items()}


def _why_no_text(answer: Mapping[str, Any]) -> str:
    if answer.get("refusal"):
        return "the server refused to answer"
    if answer.get("finish_reason") == "length":
        return CUT_OFF
    return "the model wrote nothing"


def _why_no_hit(trace: Mapping[str, Any]) -> str:
    domain = trace.get("domain") or {}
    if trace.get("error"):
        return _kind(trace["error"])
    if not trace.get("image"):
        return "there is no picture to search with"
    if domain.get("label") == "unknown" and domain.get("reason"):
        hint = "; --domain or --domain-model names another" if domain.get("by") == "shipped" else ""
        return f"the domain is unknown: {_kind(domain['reason'])}{hint}"
    if domain.get("reason"):
        return str(domain["reason"])
    if trace.get("excluded"):
        return "every reference is of the own patient or shows the same picture (--keep-own)"
    return "the index holds no reference that may be found (--where, or an empty index)"


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: a path before it, numbers in brackets."""
    reason = re.sub(r"\s*\([^()]*\d[^()]*\)", "", reason)
    return re.sub(r"^\S*[/\\]\S*: ", "", reason)
