"""What only plain runs have: the worth of their references, and which class each thing went into.

Place in the picture: system run -> ``retrieval``, ``confusion``, ``routing`` and ``reliability``
of its :class:`mmedrag.evaluation.result.RunResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mmedrag.evaluation.controls import shuffled
from mmedrag.evaluation.metrics import questions
from mmedrag.evaluation.metrics.retrieval import usage
from mmedrag.evaluation.metrics.statistics import AnyStat, estimates
from mmedrag.evaluation.result import ReliabilityPoint, Scores, Shares
from mmedrag.evaluation.runs import OVERALL, SystemRun, by_domain, one_per_image
from mmedrag.evaluation.scoring import Common, GroundTruth, Scored, tables
from mmedrag.records import Trace, label_of, target_of


def retrieval(run: SystemRun, common: Common) -> dict[str, Scores]:
    """What the references of a run are worth and which are used, per domain, one row per
    distinct image.

    ``label_agreement``: share of findings that the top-1 reference's study has in common with
    the image's (present in both or absent in both); ``label_agreement_kept``: mean over the
    kept references; both on the benchmark, beside shuffled references. ``recall@k``, ``mrr``:
    of the image's own report, where that may be retrieved at all. Selection, hubness and
    similarity: see :func:`mmedrag.evaluation.metrics.retrieval.usage`. ``rules``: that selected.
    """
    traces, known = [t for t in one_per_image(run.traces) if t.hits], common.known
    if not traces:
        return {}
    stats: dict[str, dict[str, AnyStat]] = {"model": {}, "shuffled_references": {}}
    agree = [[_agreement(t, h.id, known) for h in t.hits] for t in traces]
    if any(np.isfinite(row).any() for row in map(np.array, agree)):
        kept = [set(t.selection.kept) if t.selection else set() for t in traces]
        chosen = [
            [v for h, v in zip(t.hits, row, strict=True) if h.id in ids]
            for t, row, ids in zip(traces, agree, kept, strict=True)
        ]
        stats["model"] = {
            "label_agreement": questions.average([row[0] for row in agree]),
            "label_agreement_kept": questions.average(
                [float(np.mean(row)) if row else np.nan for row in chosen]
            ),
        }
        others = shuffled(traces, [t.hits[0].id for t in traces], common.seed)
        stats["shuffled_references"]["label_agreement"] = questions.average(
            [_agreement(t, other, known) for t, other in zip(traces, others, strict=True)]
        )
    ranks = [next((h.rank for h in t.hits if _own(t, h.id, known)), None) for t in traces]
    if any(rank is not None for rank in ranks):
        stats["model"] |= questions.retrieval(ranks)
    stats["model"] |= usage(traces)
    scored = Scored("retrieval", traces, stats, {})
    return {
        group: replace(found, rules=sorted({_rule(traces[i]) for i in scored.rows(group)} - {""}))
        for group, found in tables(scored, common).items()
    }


def _rule(trace: Trace) -> str:
    if trace.selection is None:
        return ""
    params = ", ".join(f"{k} {v}" for k, v in sorted(trace.selection.params.items()))
    return f"{trace.selection.rule} {params}".strip()


def _own(trace: Trace, reference: str, known: GroundTruth) -> bool:
    study = trace.meta.get("study")
    return study is not None and known.study.get(reference) == study


def _agreement(trace: Trace, reference: str, known: GroundTruth) -> float:
    """Share of findings in common; NaN where the truth of either study is not known."""
    mine = known.truth.get(str(trace.meta.get("study")))
    theirs = known.truth.get(str(known.study.get(reference)))
    if mine is None or theirs is None or mine.findings.keys() != theirs.findings.keys():
        return float("nan")
    same = [f.present == theirs.findings[n].present for n, f in mine.findings.items()]
    return sum(same) / len(same)


def confusion(run: SystemRun, common: Common) -> dict[str, dict[str, Shares]]:
    """overall or domain -> truth -> answer -> share, of the closed questions (strict parser)."""
    closed = run.of_task("vqa_closed")
    return {
        group: {
            side: _shares(
                [t for t in own if target_of(t) == side], label_of, questions.LABELS, common
            )
            for side in questions.LABELS[:2]
        }
        for group, own in {OVERALL: closed, **by_domain(closed)}.items()
        if own
    }


def routing(run: SystemRun, common: Common) -> dict[str, Shares]:
    """domain -> identified domain -> share of images; not of those whose domain was stated."""
    routed = [
        t
        for t in one_per_image(run.traces)
        if t.target_domain and t.domain and t.domain.by not in ("option", "row", "index")
    ]

    def identified(trace: Trace) -> str:
        return trace.domain.label if trace.domain else ""

    names = sorted({identified(t) for t in routed})
    return {
        domain: _shares([t for t in routed if t.target_domain == domain], identified, names, common)
        for domain in sorted({str(t.target_domain) for t in routed})
    }


def reliability(run: SystemRun, common: Common) -> list[ReliabilityPoint]:
    """Points of the reliability diagram of the closed questions."""
    closed = run.of_task("vqa_closed")
    patients = [t.patient for t in closed]
    points = questions.reliability(
        [t.answer.p_yes if t.answer else None for t in closed], [target_of(t) for t in closed]
    )
    return [
        ReliabilityPoint(**estimates(p, patients, common.resamples, common.seed)) for p in points
    ]


def _shares(
    traces: Sequence[Trace], of: Callable[[Trace], str], names: Sequence[str], common: Common
) -> Shares:
    """Share of the traces in each of the named classes."""
    found = [of(t) for t in traces]
    stats = {name: questions.proportion([f == name for f in found]) for name in names}
    return estimates(stats, [t.patient for t in traces], common.resamples, common.seed)
