"""Paired tests between runs.

Place in the picture: scored runs -> ``comparisons`` of ``metrics.json``. All comparisons of one
task are one family; Holm's procedure keeps its chance of any false claim at 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np

from mmedrag.evaluation.metrics.statistics import RESAMPLES, clean, clusters, difference, resample
from mmedrag.evaluation.result import Comparison
from mmedrag.evaluation.runs import SystemRun
from mmedrag.evaluation.scoring import Common, Scored

# one or two metrics per task carry the tests: every further one costs power
PRIMARY = {
    "vqa_closed": ("accuracy", "balanced_accuracy"),
    "vqa_open": ("exact_match", "token_f1"),
    "report": ("rouge_l", "finding_f1"),
}
MEANS = frozenset({"accuracy", "exact_match", "token_f1", "rouge_l"})  # means of row values
ALL_PAIRS = 6  # up to so many runs every pair is compared


def planned_comparisons(runs: Sequence[SystemRun]) -> list[tuple[str, str]]:
    """Which runs are compared: up to 6 every pair; of more each one with the first, with its
    predecessor, and with the last one of the first's model, which is what a tuned model began
    from. The latter two have references if the run has."""
    if len(runs) <= ALL_PAIRS:
        return list(combinations([run.name for run in runs], 2))
    chosen: dict[tuple[str, str], None] = {}
    for i, run in enumerate(runs[1:], 1):
        alike = [r for r in runs[:i] if (r.references == "none") == (run.references == "none")]
        untuned = [r for r in alike if r.model == runs[0].model]
        for other in (runs[0], *alike[-1:], *untuned[-1:]):
            chosen[other.name, run.name] = None
    return list(chosen)


def compare_runs(
    scored: Mapping[str, Mapping[str, Scored]], pairs: Sequence[tuple[str, str]], common: Common
) -> list[Comparison]:
    """Paired tests between runs on the rows that both answered.

    Args:
        scored: run -> task -> its metrics.
        pairs: names of the runs to compare (see :func:`planned_comparisons`).

    Returns:
        Metrics that are means use the sign-flip permutation test by patient, others the
        paired bootstrap; p is adjusted within each task (Holm).
    """
    out: list[Comparison] = []
    for task in PRIMARY:
        family: list[Comparison] = []
        for a, b in pairs:
            if task in scored[a] and task in scored[b]:
                family += _pair(a, b, scored[a][task], scored[b][task], common)
        adjusted = holm([row.p for row in family])
        out += [replace(row, p_holm=clean(p)) for row, p in zip(family, adjusted, strict=True)]
    return out


def _pair(a: str, b: str, left: Scored, right: Scored, common: Common) -> list[Comparison]:
    where = {t.example_id: i for i, t in enumerate(right.traces)}
    shared = [(i, where[t.example_id]) for i, t in enumerate(left.traces) if t.example_id in where]
    if not shared:
        return []
    ia, ib = (np.array(column) for column in zip(*shared, strict=True))
    groups = clusters([left.traces[i].patient for i in ia])
    rows = []
    for metric in PRIMARY[left.task]:
        if metric not in left.model or metric not in right.model:
            continue
        mine, theirs = left.model[metric].take(ia), right.model[metric].take(ib)
        one, two = resample([mine, theirs], groups, common.resamples, common.seed)
        gap = difference(theirs.point() - mine.point(), two, one, len(ia))
        if metric in MEANS and gap.p is not None:
            p = sign_flip(theirs.values - mine.values, groups, common.resamples, common.seed)
            gap = replace(gap, p=clean(p), test="sign-flip permutation by patient")
        rows.append(Comparison(left.task, metric, a, b, **asdict(gap), p_holm=None))
    return rows


def sign_flip(
    differences: np.ndarray, groups: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """Two-sided p of a paired permutation test of mean difference 0, flipping whole patients.

    Under the null hypothesis the two systems can be exchanged within a patient (Fisher's
    randomisation test). Exact where there are no more than ``resamples`` sign patterns, otherwise
    sampled with the seed.
    """
    from scipy.stats import permutation_test

    sums = np.bincount(groups, weights=differences)
    sums = sums[sums != 0]
    if len(sums) < 2:  # one patient's sign says nothing: the test is two-sided
        return 1.0
    found = permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,  # patterns at a time: memory does not grow with the resamples
        rng=seed,
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p-values (Holm 1979); None stays None and is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(known):
        running = max(running, min(1.0, p * (len(known) - rank)))
        adjusted[i] = running
    return adjusted
