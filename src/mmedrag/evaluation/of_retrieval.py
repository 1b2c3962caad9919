"""What the retrieved references of a run are worth, and which of them were used.

Place in the picture: one section of ``metrics.json``, per domain, beside shuffled references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmedrag.evaluation import controls as ctrl
from mmedrag.evaluation.arms import Arm
from mmedrag.evaluation.metrics import questions
from mmedrag.evaluation.metrics.retrieval import usage
from mmedrag.evaluation.metrics.statistics import AnyStat
from mmedrag.evaluation.scoring import Facts, Scored, tables
from mmedrag.records import Trace


def retrieval(arm: Arm, facts: Facts, resamples: int, seed: int) -> dict[str, Any]:
    """What the references of an arm are worth and which are used, per domain, one row per
    distinct image.

    ``label_agreement``: share of findings that the top-1 reference's study has in common with
    the image's (present in both or absent in both); ``label_agreement_kept``: mean over the
    kept references; both on the benchmark, beside shuffled references. ``recall@k``, ``mrr``:
    of the image's own report, where that may be retrieved at all. Selection, hubness and
    similarity: see :func:`mmedrag.evaluation.metrics.retrieval.usage`. ``rules``: that selected.
    """
    traces = [t for t in one_per_image(arm.traces) if t.hits]
    if not traces:
        return {}
    agree = [[_agreement(t, h.id, facts) for h in t.hits] for t in traces]
    kept = [{i for i in t.selection.kept} if t.selection else set() for t in traces]
    first = ctrl.shuffled(traces, [t.hits[0].id for t in traces], seed)
    stats: dict[str, dict[str, AnyStat]] = {"model": {}, "shuffled_references": {}}
    if any(np.isfinite(row).any() for row in map(np.array, agree)):
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
        others = [_agreement(t, other, facts) for t, other in zip(traces, first, strict=True)]
        stats["shuffled_references"]["label_agreement"] = questions.average(others)
    ranks = [next((h.rank for h in t.hits if _own(t, h.id, facts)), None) for t in traces]
    if any(rank is not None for rank in ranks):
        stats["model"] |= questions.retrieval(ranks)
    stats["model"] |= usage(traces)
    scored = Scored("retrieval", traces, stats, {})
    return {
        group: {**found, "rules": sorted({_rule(traces[i]) for i in scored.rows(group)} - {""})}
        for group, found in tables(scored, resamples, seed).items()
    }


def one_per_image(traces: Sequence[Trace]) -> list[Trace]:
    """The first trace of each image, twins aside: retrieval sees images, not questions."""
    seen: dict[str, Trace] = {}
    for trace in traces:
        if not trace.meta.get("twin_of"):
            seen.setdefault(str(trace.image or trace.example_id), trace)
    return list(seen.values())


def _rule(trace: Trace) -> str:
    if trace.selection is None:
        return ""
    params = ", ".join(f"{k} {v}" for k, v in sorted(trace.selection.params.items()))
    return f"{trace.selection.rule} {params}".strip()


def _own(trace: Trace, reference: str, facts: Facts) -> bool:
    study = trace.meta.get("study")
    return study is not None and facts.study.get(reference) == study


def _agreement(trace: Trace, reference: str, facts: Facts) -> float:
    """Share of findings in common; NaN where the truth of either study is not known."""
    mine = facts.truth.get(str(trace.meta.get("study")))
    theirs = facts.truth.get(str(facts.study.get(reference)))
    if mine is None or theirs is None or mine.findings.keys() != theirs.findings.keys():
        return float("nan")
    same = [f.present == theirs.findings[n].present for n, f in mine.findings.items()]
    return sum(same) / len(same)
