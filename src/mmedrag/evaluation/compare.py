"""Comparisons: with controls, and between arms (paired tests).

Place in the picture: between scored arms and the tables. All comparisons of one task are one
family; Holm's procedure keeps its chance of any false claim at 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mmedrag.evaluation.arms import Arm
from mmedrag.evaluation.metrics import questions
from mmedrag.evaluation.metrics.statistics import (
    RESAMPLES,
    clean,
    clusters,
    difference,
    holm,
    resample,
    sign_flip,
)

# one or two metrics per task carry the tests: every further one costs power
PRIMARY = {
    "vqa_closed": ("accuracy", "balanced_accuracy"),
    "vqa_open": ("exact_match", "token_f1"),
    "report": ("rouge_l", "finding_f1"),
}
MEANS = frozenset({"accuracy", "exact_match", "token_f1", "rouge_l"})  # means of row values
ALL_PAIRS = 6  # up to so many arms every pair is compared
# metrics that a control can meaningfully beat; parse_rate, ece and the like only describe
UNMARKED = frozenset(
    {"parse_rate", "ece", "unreadable_rate", "finding_precision", "finding_recall"}
)
DESCRIPTIVE = frozenset({"question_prior_loo"})  # reads test labels: shown, marks nothing


def rival(controls: Mapping[str, Mapping[str, Any]], metric: str) -> tuple[str, float] | None:
    """The best control of a metric, (name, value): the one that a score is held against."""
    sign = -1 if metric in questions.LOWER_IS_BETTER else 1
    found = [
        (sign * cell[metric]["value"], control)
        for control, cell in controls.items()
        if control not in DESCRIPTIVE and cell.get(metric, {}).get("value") is not None
    ]
    return (max(found)[1], sign * max(found)[0]) if found else None


def best_control(group: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """The control that a group's metric is held against: {name, value, low, high, n, ...}."""
    best = rival(group["controls"], metric)
    return {"name": best[0], **group["controls"][best[0]][metric]} if best else None


def marked(
    lows: Mapping[str, float | None], controls: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """metric -> best control, for every score that is not clearly above its best control.

    The best control is the one with the best value. AUROC is held against chance as well.
    """
    out: dict[str, str] = {}
    for name, low in lows.items():
        base = name.removesuffix("_released")
        if base in UNMARKED or base.startswith(("recall@", "mrr", "label_agreement_")):
            continue
        best = rival(controls, name)
        if best:
            bound = controls[best[0]][name]["difference"]["low"]
            if bound is None or bound <= 0:
                out[name] = best[0]
        if name == "auroc" and (low is None or low <= 0.5):
            out[name] = "chance"
    return out


def planned_comparisons(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Which arms are compared: up to 6 every pair; of more each one with the first, with its
    predecessor, and with the last one of the first's model, which is what a tuned model began
    from. The latter two have references if the arm has."""
    if len(arms) <= ALL_PAIRS:
        return list(combinations([a.name for a in arms], 2))
    chosen: dict[tuple[str, str], None] = {}
    for i, arm in enumerate(arms[1:], 1):
        alike = [a for a in arms[:i] if (a.references == "none") == (arm.references == "none")]
        untuned = [a for a in alike if a.model == arms[0].model]
        for other in (arms[0], *alike[-1:], *untuned[-1:]):
            chosen[other.name, arm.name] = None
    return list(chosen)


def compare_arms(
    kept: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[tuple[str, str]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Paired tests between arms on the rows that both answered.

    Args:
        kept: arm -> task -> :class:`mmedrag.evaluation.scoring.Scored`.
        pairs: names of the arms to compare (see :func:`steps`).

    Returns:
        Rows of task, metric, a, b, value (b - a) with interval, n, p and Holm-adjusted p.
        Metrics that are means use the sign-flip permutation test by patient, others the
        paired bootstrap.
    """
    out = []
    for task in PRIMARY:
        family = []
        for a, b in pairs:
            if task in kept[a] and task in kept[b]:
                family += _pair(task, a, b, kept[a][task], kept[b][task], resamples, seed)
        for row, adjusted in zip(family, holm([r["p"] for r in family]), strict=True):
            row["p_holm"] = clean(adjusted)
        out += family
    return out


def _pair(
    task: str, a: str, b: str, left: Any, right: Any, resamples: int, seed: int
) -> list[dict[str, Any]]:
    where = {t.example_id: i for i, t in enumerate(right.traces)}
    shared = [(i, where[t.example_id]) for i, t in enumerate(left.traces) if t.example_id in where]
    if not shared:
        return []
    ia, ib = (np.array(column) for column in zip(*shared, strict=True))
    patients = [left.traces[i].patient for i in ia]
    groups = clusters(patients)
    rows = []
    for metric in PRIMARY[task]:
        if metric not in left.stats["model"] or metric not in right.stats["model"]:
            continue
        mine, theirs = left.stats["model"][metric].take(ia), right.stats["model"][metric].take(ib)
        one, two = resample([mine, theirs], groups, resamples, seed)
        gap = difference(
            theirs.point() - mine.point(), two, one, len(ia), int(groups.max()) + 1
        ).as_dict()
        if metric in MEANS and gap["p"] is not None:
            p = sign_flip(theirs.values - mine.values, groups, resamples, seed)
            gap |= {"p": clean(p), "test": "sign-flip permutation by patient"}
        rows.append({"task": task, "metric": metric, "a": a, "b": b, **gap})
    return rows
