"""Confusion, routing and reliability of a run, as shares with intervals.

Place in the picture: one section of ``metrics.json``; the report draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmedrag.evaluation.arms import OVERALL, Arm
from mmedrag.evaluation.metrics import questions
from mmedrag.evaluation.metrics.statistics import intervals
from mmedrag.evaluation.of_retrieval import one_per_image
from mmedrag.evaluation.reliance import label, truth
from mmedrag.records import Trace, group_of


def classification(arm: Arm, resamples: int, seed: int) -> dict[str, Any]:
    """Which class each thing was put into, as shares with intervals.

    ``confusion``: overall or domain -> truth -> answer -> share, of the closed questions (strict
    parser); ``routing``: domain -> identified domain -> share of images; ``reliability``: points
    of the reliability diagram, {p_yes, share_yes}.
    """
    closed = arm.of_task("vqa_closed")
    groups = {OVERALL: closed} | {d: [] for d in sorted({group_of(t) for t in closed})}
    for trace in closed:
        groups[group_of(trace)].append(trace)
    routed = [t for t in one_per_image(arm.traces) if t.target_domain and t.domain]
    said = sorted({t.domain.label for t in routed if t.domain})
    patients = [t.patient for t in closed]
    points = questions.reliability(
        [t.answer.p_yes if t.answer else None for t in closed], [truth(t) for t in closed]
    )
    return {
        "confusion": {
            group: {
                side: _shares(
                    [t for t in own if truth(t) == side], label, questions.LABELS, resamples, seed
                )
                for side in questions.LABELS[:2]
            }
            for group, own in groups.items()
            if own
        },
        "routing": {
            domain: _shares(
                [t for t in routed if t.target_domain == domain],
                lambda t: t.domain.label if t.domain else "",
                said,
                resamples,
                seed,
            )
            for domain in sorted({str(t.target_domain) for t in routed})
        },
        "reliability": [
            {
                name: cell.as_dict()
                for name, cell in intervals(point, patients, resamples, seed).items()
            }
            for point in points
        ],
    }


def _shares(
    traces: Sequence[Trace],
    of: Callable[[Trace], str],
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Share of the traces in each of the named classes."""
    found = [of(t) for t in traces]
    stats = {name: questions.proportion([f == name for f in found]) for name in names}
    made = intervals(stats, [t.patient for t in traces], resamples, seed)
    return {name: cell.as_dict() for name, cell in made.items()}
