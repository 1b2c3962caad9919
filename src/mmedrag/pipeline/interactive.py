"""One image and one question: the answer with everything it rests on, or why there is none.

Place in the picture: the whole pipeline for a single example. The system abstains when the
domain is unknown, when the answer is neither yes nor no, and when its confidence is below a
threshold that was fitted on validation traces (:func:`fit_abstention`) and lies beside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.pipeline import evidence
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.run import TRACES
from mmedrag.pipeline.system import load_system
from mmedrag.pipeline.worker import Worker
from mmedrag.records import (
    Answer,
    Cautioned,
    ConditionSpec,
    Example,
    Hit,
    Trace,
    UserError,
    read_text,
    verdict,
)
from mmedrag.retrieval import select
from mmedrag.runtime import read_jsonl


class Evidence(Hit):
    """A reference that was retrieved: does it stand in the prompt, and why (not)?"""

    used: bool
    why: str


@dataclass(frozen=True)
class Reply:
    """An answer with everything it rests on; ``print`` shows it in a few lines.

    Attributes:
        trace: what every stage of the pipeline made of the question.
        notices: what readers have to know.
        min_confidence: under it a closed question counts as not answered.
        benchmark_only: why the model's answers mean nothing on other pictures, if so.
    """

    trace: Trace
    notices: tuple[str, ...] = ()
    min_confidence: float = 0.0
    benchmark_only: str | None = None

    @property
    def answer(self) -> Answer | None:
        """What the model said: ``text``, and of a closed question ``label`` and ``p_yes``."""
        return self.trace.answer

    @property
    def abstained(self) -> str | None:
        """Why the answer should not be given, or None."""
        return evidence.abstention(self.trace, self.min_confidence, self.benchmark_only)

    @property
    def references(self) -> list[Evidence]:
        """Every reference that was retrieved, best first."""
        return [Evidence(**row) for row in evidence.references(self.trace)]

    def to_dict(self) -> dict[str, Any]:
        """As ``mmedrag ask --json`` and the service give it."""
        least, only = self.min_confidence, self.benchmark_only
        return evidence.result({"": self.trace}, self.notices, least, only)

    def __str__(self) -> str:
        return as_text(self.to_dict())


def ask(
    image: str | Path | Sequence[str | Path],
    question: str | None = None,
    system: Pipeline | str | Path | None = None,
    *,
    patient: str | None = None,
    references: str = "selected",
    min_confidence: float | None = None,
) -> Reply:
    """Ask about one study; no question means: write the report.

    Args:
        image: a picture, or the views of a study.
        system: a pipeline (to load once and ask often), or a system file; by default the
            embedded system.
        patient: whose references are then left out.
        references: a mode of :class:`ConditionSpec` that needs no data folder.
        min_confidence: by default the pipeline's own.

    Raises:
        UserError: an unreadable image or an empty question.

    Example::

        reply = ask("chest.png", "Is there a nodule?", pipeline)
        print(reply.answer.text, reply.answer.p_yes, [hit.why for hit in reply.references])
    """
    images = [Path(image)] if isinstance(image, (str, Path)) else [Path(view) for view in image]
    for path in images:
        if not path.is_file():
            raise UserError(f"{path}: no such image")
    if question is not None and not question.strip():
        raise UserError("the question is empty; for a report give --report instead")
    if isinstance(system, Pipeline):
        pipeline = system
    else:
        pipeline = load_system(system, references=references != "none", interactive=True)
    kind = evidence.guess_answer_type(question) if question else None
    example = Example.of(images, question, answer_type=kind, patient=patient)
    (trace,) = Worker(pipeline, {"": ConditionSpec(references)}, 1)([example])[""]
    if trace.error:
        raise UserError(trace.error)
    least = pipeline.min_confidence if min_confidence is None else min_confidence
    return Reply(trace, notices(pipeline), least, pipeline.benchmark_only)


def notices(pipeline: Pipeline) -> tuple[str, ...]:
    """What readers of this system's answers have to know."""
    notice = pipeline.domain.notice if isinstance(pipeline.domain, Cautioned) else None
    embedded = getattr(pipeline.domain, "by", None) == "embedded"
    found = [notice, None if embedded else pipeline.benchmark_only]
    return tuple(one for one in found if one)


def fit_abstention(run_folders: Iterable[Path], accuracy: float) -> dict[str, Any]:
    """The lowest confidence above which closed answers reach ``accuracy``.

    Confidence is max(p_yes, 1 - p_yes); the bound is that of :func:`select.fit_threshold`.

    Returns:
        ``min_confidence`` (None when nothing reaches it), ``n``, ``answered`` (share above it),
        ``accuracy`` over all and ``accuracy_answered``.
    """
    traces: list[Trace] = []
    for folder in run_folders:
        traces += read_jsonl(Path(folder) / TRACES, Trace)
    scored = [found for trace in traces if (found := _confidence(trace)) is not None]
    if not scored:
        raise UserError("no closed answers with p_yes and a yes/no target in these runs")
    fitted = select.fit_threshold([s for s, _ in scored], [r for _, r in scored], accuracy)
    threshold = fitted["threshold"]
    above = [right for score, right in scored if threshold is not None and score >= threshold]
    return {
        "min_confidence": threshold,
        "wanted": accuracy,
        "n": len(scored),
        "accuracy": sum(right for _, right in scored) / len(scored),
        "answered": len(above) / len(scored),
        "accuracy_answered": sum(above) / len(above) if above else None,
    }


def _confidence(trace: Trace) -> tuple[float, bool] | None:
    """(confidence, was the more probable side right?) of a closed answer."""
    answer = trace.answer
    if trace.answer_type != "closed" or answer is None or answer.p_yes is None:
        return None
    if read_text(trace.target, trace.question) == "unclear":  # the truth itself says neither
        return None
    return max(answer.p_yes, 1 - answer.p_yes), verdict(trace) == "right"


def as_text(result: dict[str, Any]) -> str:
    """The result for people, a few lines."""
    domain, answer = result["domain"] or {}, result["answer"] or {}
    lines = []
    if result["abstained"]:
        lines.append(f"No answer: {result['abstain_reason']}")
    else:
        sure = answer.get("p_yes")
        lines.append(answer.get("text", "") + (f"  (p_yes {sure:.3f})" if sure is not None else ""))
    confidence = domain.get("confidence")
    lines.append(
        f"Domain: {domain.get('label')}"
        + (f", confidence {confidence:.3f}" if confidence is not None else "")
        + (f" ({domain['reason']})" if domain.get("reason") else "")
    )
    for number, row in enumerate(result["references"], 1):
        mark = "+" if row["used"] else "-"
        text = " ".join(row["text"].split())
        shown = text if len(text) <= 100 else text[:97] + "..."
        lines.append(f"{mark} {number}. {row['score']:.3f} {row['id']}: {shown}")
        lines.append(f"     {row['why']}")
    if not result["references"]:
        lines.append("References: none")
    if result["excluded"]:
        lines.append(f"Excluded as the patient's own or the same image: {result['excluded']}")
    return "\n".join([*lines, *result["notices"]])
