"""The gallery: cases with image, question, references and every row's answer.

Place in the picture: joined traces -> cards of the page. Cases are drawn evenly from the
combinations of domain, task and outcome, with a seed, so that nobody chose the pretty ones.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmedrag.evaluation import SystemRun, task_of
from mmedrag.evaluation.metrics import text as metrics_text
from mmedrag.records import Hit, Trace, UserError, group_of, is_right, label_of, normalise, verdict
from mmedrag.report import svg
from mmedrag.report.tables import TASK_NAMES
from mmedrag.runtime import DataFolder, numpy_rng

log = logging.getLogger(__name__)
THUMBNAIL = 192  # pixels, longest side


@dataclass
class RowAnswer:
    """One row's answer to a case."""

    row: str
    text: str
    verdict: str  # right | wrong | unclear | failed, or a score of a report
    good: bool | None
    p_yes: float | None = None


@dataclass
class Shown:
    """One retrieved reference of a case."""

    text: str
    score: float
    kept: bool
    why: str


@dataclass
class Case:
    """One card."""

    id: str
    domain: str
    task: str
    question: str
    target: str
    answers: list[RowAnswer]
    outcomes: list[str]
    references: list[Shown] = field(default_factory=list)
    routed: str = ""
    reason: str = ""
    spark: str = ""
    image: str = ""  # data URL
    views: int = 0
    patient: str = ""


def cases(
    runs: Sequence[SystemRun], data: DataFolder | None, most: int = 60, seed: int = 0
) -> list[Case]:
    """At most ``most`` cases, spread evenly over domain, task and outcome.

    Args:
        runs: the table's plain rows, in order; references are shown of the last one that
            retrieved.
        data: where images are; without it cards have none.
    """
    table: dict[str, list[tuple[SystemRun, Trace]]] = {}
    for run in runs:
        for trace in run.traces:
            if task_of(trace) and not trace.meta.get("twin_of"):
                table.setdefault(trace.example_id, []).append((run, trace))
    strata: dict[tuple[str, ...], list[str]] = {}
    for key, rows in sorted(table.items()):
        first = rows[0][1]
        stratum = (group_of(first), task_of(first) or "", *outcomes(rows))
        strata.setdefault(stratum, []).append(key)
    rng = numpy_rng(seed, 5)
    queues = [[keys[i] for i in rng.permutation(len(keys))] for _, keys in sorted(strata.items())]
    chosen: list[str] = []
    while len(chosen) < most and any(queues):
        for queue in queues:
            if queue and len(chosen) < most:
                chosen.append(queue.pop())
    thumbnails: dict[Path, str] = {}
    return [_case(table[key], data, thumbnails) for key in sorted(chosen)]


def outcomes(rows: Sequence[tuple[SystemRun, Trace]]) -> list[str]:
    """Filter words of a case, from the last row's answer and from what references changed."""
    last = rows[-1][1]
    words = ["failed"] if last.error else []
    if task_of(last) == "vqa_closed":
        words.append(verdict(last))
        alone = [t for run, t in rows if run.references == "none"]
        with_ = [t for run, t in rows if run.references != "none"]
        if alone and with_:
            before, after = is_right(alone[-1]), is_right(with_[-1])
            words += ["references helped"] if after > before else []
            words += ["references harmed"] if before > after else []
        if len({label_of(t) for _, t in rows}) > 1:
            words.append("rows disagree")
    elif task_of(last) == "vqa_open":
        words.append("right" if shown_verdict(last)[1] else "wrong")
    return words


def shown_verdict(trace: Trace) -> tuple[str, bool | None]:
    """What to print beside an answer, and whether it is right (None: a matter of degree)."""
    if trace.error or trace.answer is None:
        return f"failed: {trace.error or 'no answer'}", False
    task = task_of(trace)
    if task == "vqa_closed":
        return verdict(trace), is_right(trace)
    if task == "vqa_open":
        same = normalise(trace.answer.text) == normalise(trace.target or "")
        return ("right", True) if same else ("wrong", False)
    score = metrics_text.rouge([trace.answer.text], [trace.target or ""])["rouge_l"].point()
    return f"ROUGE-L {score:.2f}", None


def _case(
    rows: Sequence[tuple[SystemRun, Trace]], data: DataFolder | None, thumbnails: dict[Path, str]
) -> Case:
    first = rows[0][1]
    task = task_of(first) or ""
    case = Case(
        id=first.example_id,
        domain=group_of(first),
        task=TASK_NAMES[task],
        question=first.question or "Write the report.",
        target=first.target or "",
        answers=[_answer(run, trace) for run, trace in rows],
        outcomes=outcomes(rows),
        patient=first.patient or "",
    )
    routed = [t.domain for _, t in rows if t.domain]
    if routed:
        sure = f" ({routed[-1].confidence:.2f})" if routed[-1].confidence is not None else ""
        case.routed = routed[-1].label + sure
    retrieved = [t for _, t in rows if t.hits and t.selection and t.selection.rule != "none"]
    if retrieved:
        _references(case, retrieved[-1])
    names = [first.image] if isinstance(first.image, str) else first.image or []
    if data and names:
        case.image, case.views = thumbnail(data.path / names[0], thumbnails), len(names)
    return case


def _answer(run: SystemRun, trace: Trace) -> RowAnswer:
    text, good = shown_verdict(trace)
    answer = trace.answer
    return RowAnswer(
        run.title, answer.text if answer else "", text, good, answer.p_yes if answer else None
    )


def _references(case: Case, trace: Trace) -> None:
    selection = trace.selection
    assert selection is not None
    kept = set(selection.kept)
    unfit = set(trace.prompt.dropped) if trace.prompt else set()
    case.reason = f"{selection.rule}: {selection.reason}" if selection.reason else selection.rule
    case.spark = svg.spark([h.score for h in trace.hits], len(kept))
    case.references = [
        Shown(hit.text, hit.score, hit.id in kept and hit.id not in unfit, _why(hit, kept, unfit))
        for hit in trace.hits
    ]


def _why(hit: Hit, kept: set[str], unfit: set[str]) -> str:
    if hit.id in unfit:
        return "dropped: does not fit the context"
    return "kept" if hit.id in kept else "dropped by the rule"


def thumbnail(path: Path, done: dict[Path, str]) -> str:
    """A small JPEG as data URL; "" with a warning where the image cannot be read."""
    if path not in done:
        from mmedrag.images import load_image

        try:
            picture = load_image(path)
        except UserError as error:
            log.warning("gallery: %s", error)
            done[path] = ""
        else:
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=78, optimize=True)
            done[path] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return done[path]
