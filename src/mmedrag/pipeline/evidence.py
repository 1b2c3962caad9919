"""From traces to what a reader needs: the answer, and everything it rests on.

Place in the picture: Trace → **JSON of the API and the page**. Nothing is computed here that is
not in the trace; abstention and the reason why each reference was kept or dropped are put in
words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmedrag.records import UNKNOWN, AnswerType, Hit, Trace

NOTICE = "Research software, not a medical device. Not for diagnosis or treatment."
_CLOSED = re.compile(
    r"(is|are|was|were|am|do|does|did|has|have|had|can|could|will|would|should|may|might|must)"
    r"(n't|n’t)?\b",
    re.IGNORECASE,
)


def guess_answer_type(question: str) -> AnswerType:
    """``closed`` where yes or no answers it: it begins with an auxiliary verb and offers no
    alternatives ("left or right?")."""
    last = re.split(r"(?<=[.!?:])\s+", question.strip())[-1]
    if _CLOSED.match(last) and not re.search(r"\bor\b(?!\s+not\b)", last, re.IGNORECASE):
        return "closed"
    return "open"


def abstention(
    trace: Trace, min_confidence: float = 0.0, benchmark_only: str | None = None
) -> str | None:
    """Why no answer should be given, or None.

    The domain is unknown; the picture came with no word of the user or of the benchmark's own
    domain model to a model that is good for the benchmark only; a closed question's answer is
    neither yes nor no; or max(p_yes, 1 - p_yes) is under ``min_confidence``.
    """
    if trace.domain is not None and trace.domain.label == UNKNOWN:
        more = trace.domain.reason
        return "the image's domain is unknown" + (f": {more}" if more else "")
    if benchmark_only and trace.domain is not None and trace.domain.by in ("index", "shipped"):
        return benchmark_only
    answer = trace.answer
    if answer is None or trace.answer_type != "closed":
        return None
    if answer.label not in ("yes", "no"):
        return "the answer is neither yes nor no"
    if answer.p_yes is not None and max(answer.p_yes, 1 - answer.p_yes) < min_confidence:
        sure = max(answer.p_yes, 1 - answer.p_yes)
        return f"confidence {sure:.2f} is under the threshold {min_confidence:.2f}"
    return None


def why(hit: Hit, trace: Trace) -> tuple[bool, str]:
    """Whether a reference stands in the prompt, and why (not)."""
    selection, prompt = trace.selection, trace.prompt
    rule = f"{selection.rule}: {selection.reason}" if selection else "no rule"
    if selection is None or hit.id not in selection.kept:
        return False, f"dropped by the rule {rule}"
    if prompt is not None and hit.id in prompt.dropped:
        reason = "it does not fit the model's context" if hit.text.strip() else "it has no text"
        return False, f"kept by the rule {rule}, but {reason}"
    return True, f"kept by the rule {rule}"


def references(trace: Trace) -> list[dict[str, Any]]:
    """Every reference that was retrieved, best first."""
    rows = []
    for hit in trace.hits:
        used, reason = why(hit, trace)
        rows.append({**hit.model_dump(mode="json"), "used": used, "why": reason})
    return rows


def answered(
    trace: Trace, min_confidence: float = 0.0, benchmark_only: str | None = None
) -> dict[str, Any]:
    """One condition's answer with its evidence."""
    reason = abstention(trace, min_confidence, benchmark_only)
    return {
        "condition": _plain(trace.condition),
        "answer": _plain(trace.answer),
        "abstained": reason is not None,
        "abstain_reason": reason,
        "references": references(trace),
        "excluded": trace.excluded,
        "selection": _plain(trace.selection),
        "prompt": _plain(trace.prompt),
    }


def result(
    traces: Mapping[str, Trace],
    notices: tuple[str, ...] = (),
    min_confidence: float = 0.0,
    benchmark_only: str | None = None,
) -> dict[str, Any]:
    """The response body for one image and question.

    Args:
        traces: the same example under each asked condition; the first one is the answer.
        notices: what readers of these answers have to know.
        min_confidence, benchmark_only: as of :class:`mmedrag.pipeline.Pipeline`.
    """
    first = next(iter(traces.values()))
    made = {name: answered(trace, min_confidence, benchmark_only) for name, trace in traces.items()}
    main = next(iter(made.values()))
    body = {
        "task": first.task,
        "question": first.question,
        "answer_type": first.answer_type,
        "domain": _plain(first.domain),
        **main,
    }
    if len(made) > 1:
        body["conditions"] = made
    return {**body, "notices": [NOTICE, *notices]}


def _plain(record: Any) -> Any:
    return None if record is None else record.model_dump(mode="json", exclude_none=True)
