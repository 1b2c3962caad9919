"""One image and one question: the answer with everything it rests on, or why there is none.

Place in the picture: the whole pipeline for a single example. The system abstains when the
domain is unknown, when the answer is neither yes nor no, and when its confidence is below a
threshold that was fitted on validation traces (:func:`fit`) and lies beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmedrag.pipeline import evidence
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.pipeline.run import TRACES
from mmedrag.pipeline.worker import Worker
from mmedrag.records import Cautioned, ConditionSpec, Example, Trace, UserError, read_text, verdict
from mmedrag.retrieval import select
from mmedrag.runtime import read_json, read_jsonl

SIDECAR = "mmedrag.json"  # beside a model's config.json: {"min_confidence": ...}


def ask(
    pipeline: Pipeline,
    images: Sequence[Path],
    question: str | None,
    patient: str | None = None,
    references: str = "selected",
    min_confidence: float = 0.0,
) -> dict[str, Any]:
    """Ask about one study; no question means: write the report.

    Args:
        images: the views. patient: whose references are then left out.
        references: a mode of ``ConditionSpec`` that needs no data folder.

    Raises:
        UserError: an unreadable image or an empty question.
    """
    for image in images:
        if not image.is_file():
            raise UserError(f"{image}: no such image")
    if question is not None and not question.strip():
        raise UserError("the question is empty; for a report give --report instead")
    folder = Path(os.path.commonpath([image.resolve().parent for image in images]))
    example = Example(
        id="asked",
        task="report" if question is None else "vqa",
        question=question,
        answer_type=evidence.guess_answer_type(question) if question else None,
        image=[image.resolve().relative_to(folder).as_posix() for image in images],
        patient=patient,
    )
    example.root = folder
    (trace,) = Worker(pipeline, {"": ConditionSpec(references)}, 1)([example])[""]
    if trace.error:
        raise UserError(trace.error)
    return evidence.result({"": trace}, notices(pipeline), min_confidence)


def notices(pipeline: Pipeline) -> tuple[str, ...]:
    """What readers of this system's answers have to know."""
    notice = pipeline.domain.notice if isinstance(pipeline.domain, Cautioned) else None
    return (notice,) if notice else ()


def min_confidence(model: Path) -> float:
    """The fitted threshold beside a model; 0 where none was fitted."""
    path = model / SIDECAR
    return float(read_json(path).get("min_confidence") or 0) if path.is_file() else 0.0


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
