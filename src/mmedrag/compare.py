"""Comparisons: with controls, between arms (paired tests), and between subgroups.

Place in the picture: between scored arms and the tables. All comparisons of one task are one
family; Holm's procedure keeps its chance of any false claim at 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mmedrag import metrics
from mmedrag.metrics_stats import (
    RESAMPLES,
    AnyStat,
    RankStat,
    Stat,
    clean,
    clusters,
    difference,
    holm,
    interval,
    percentile,
    resample,
    sign_flip,
    unbias,
)
from mmedrag.types import Trace

# one or two metrics per task carry the tests: every further one costs power
PRIMARY = {
    "vqa_closed": ("accuracy", "balanced_accuracy"),
    "vqa_open": ("exact_match", "token_f1"),
    "report": ("rouge_l", "finding_f1"),
}
MEANS = frozenset({"accuracy", "exact_match", "token_f1", "rouge_l"})  # means of row values
ALL_PAIRS = 6  # up to so many arms every pair is compared, beyond it first and neighbours
SMALLEST = 10  # a subgroup with fewer rows is listed, but gives no gap
PERMUTATIONS = 1000
# metrics that a control can meaningfully beat; parse_rate, ece and the like only describe
UNMARKED = frozenset({"parse_rate", "ece", "unreadable_rate", "finding_precision",
                      "finding_recall"})  # fmt: skip
DESCRIPTIVE = frozenset({"question_prior_loo"})  # reads test labels: shown, marks nothing


def rival(controls: Mapping[str, Mapping[str, Any]], metric: str) -> tuple[str, float] | None:
    """The best control of a metric, (name, value): the one that a score is held against."""
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    found = [
        (sign * cell[metric]["value"], control)
        for control, cell in controls.items()
        if control not in DESCRIPTIVE and cell.get(metric, {}).get("value") is not None
    ]
    return (max(found)[1], sign * max(found)[0]) if found else None


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


def compare_arms(
    kept: Mapping[str, Mapping[str, Any]], resamples: int = RESAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Paired tests between arms on the rows that both answered.

    Args:
        kept: arm -> task -> :class:`mmedrag.evaluate.Scored`. Up to 6 arms every pair is
            compared; of more, each with the first and with its predecessor.

    Returns:
        Rows of task, metric, a, b, value (b - a) with interval, n, p and Holm-adjusted p.
        Metrics that are means use the sign-flip permutation test by patient, others the
        paired bootstrap.
    """
    out = []
    names = list(kept)
    pairs = list(combinations(names, 2))
    if len(names) > ALL_PAIRS:
        steps = {(names[0], other) for other in names[1:]} | set(
            zip(names, names[1:], strict=False)
        )
        pairs = [pair for pair in pairs if pair in steps]
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


def value_of(trace: Trace, path: str) -> str | None:
    """A field of a trace by dotted path (``source``, ``meta.sex``) as text; None if absent."""
    found: Any = trace
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
        if found is None:
            return None
    return str(found)


def subgroup_tables(
    scored: Any, fields: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Primary metrics per value of each field, with the fairness gap.

    The gap is the best minus the worst value over subgroups of at least 10 rows. It is never
    negative, so its interval cannot show that it is real; ``p`` does: how often a random
    relabelling of the patients gives as large a gap.
    """
    out: dict[str, Any] = {}
    for path in fields:
        values = [value_of(t, path) for t in scored.traces]
        if all(v is None for v in values):
            out[path] = {"not_computed": f"no row has {path}"}
            continue
        names = sorted({v for v in values if v is not None})
        groups = clusters([t.patient for t in scored.traces])
        member = np.array([names.index(v) if v is not None else -1 for v in values])
        primary = [m for m in PRIMARY[scored.task] if m in scored.stats["model"]]
        out[path] = {
            metric: _subgroups(scored.stats["model"][metric], names, member, groups, resamples,
                               seed)
            for metric in primary
        }  # fmt: skip
    return out


def _subgroups(
    stat: AnyStat, names: Sequence[str], member: np.ndarray, groups: np.ndarray,
    resamples: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    parts = {name: np.flatnonzero(member == i) for i, name in enumerate(names)}
    values = {}
    for name, rows in parts.items():
        own = clusters(list(map(str, groups[rows])))
        part = stat.take(rows)
        found = interval(part, resample([part], own, resamples, seed)[0], own)
        values[name] = found.as_dict()
    large = [i for i, name in enumerate(names) if len(parts[name]) >= SMALLEST]
    if len(large) < 2:
        return {"values": values, "gap": None, "note": f"fewer than two groups of {SMALLEST} rows"}
    masked = [_masked(stat, member == i) for i in large]
    draws = resample(masked, groups, resamples, seed)
    spread = draws.max(axis=0) - draws.min(axis=0)
    gap = _gap(stat, member, large)
    low, high = percentile(unbias(spread, gap))
    return {
        "values": values,
        "gap": {"value": clean(gap), "low": clean(low), "high": clean(high),
                "p": clean(_gap_p(stat, member, groups, large, gap, seed))},
    }  # fmt: skip


def _masked(stat: AnyStat, keep: np.ndarray) -> AnyStat:
    """The metric over some rows, still as one statistic over all rows (paired draws)."""
    if isinstance(stat, RankStat):
        return RankStat(np.where(keep, stat.scores, np.nan), stat.positive, stat.values)
    return Stat(stat.rows * keep[:, None], stat.finish, stat.values)


def _gap(stat: AnyStat, member: np.ndarray, large: Sequence[int]) -> float:
    points = [stat.take(np.flatnonzero(member == i)).point() for i in large]
    return float(np.max(points) - np.min(points))


def _gap_p(
    stat: AnyStat, member: np.ndarray, groups: np.ndarray, large: Sequence[int], gap: float,
    seed: int,
) -> float:  # fmt: skip
    """Permutation p of the gap: whole patients exchange their subgroup."""
    rng = np.random.default_rng([seed, 4])
    first = np.unique(groups, return_index=True)[1]
    hits = 0
    for _ in range(PERMUTATIONS):
        relabelled = rng.permutation(member[first])[groups]
        hits += _gap(stat, relabelled, large) >= gap - 1e-12
    return (hits + 1) / (PERMUTATIONS + 1)
