"""Subgroups: the leading metrics by a field of the rows, their controls, and the fairness gap.

Place in the picture: scored runs -> ``subgroups`` of ``metrics.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmedrag.evaluation.compare import PRIMARY
from mmedrag.evaluation.metrics.bounds import inverted
from mmedrag.evaluation.metrics.statistics import (
    AnyStat,
    Interval,
    RankStat,
    Stat,
    clean,
    clusters,
    resample,
)
from mmedrag.evaluation.result import Breakdown, Gap, NotComputed, Scores, Subgroups, SubgroupScore
from mmedrag.evaluation.scoring import Common, Scored, best_control, table
from mmedrag.records import Trace
from mmedrag.runtime import numpy_rng

SMALLEST = 10  # a subgroup with fewer rows is listed, but gives no gap
PERMUTATIONS = 1000


def value_of(trace: Trace, path: str) -> str | None:
    """A field of a trace by dotted path (``source``, ``meta.sex``) as text; None if absent."""
    found: Any = trace
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
        if found is None:
            return None
    return str(found)


def subgroup_tables(scored: Scored, fields: Sequence[str], common: Common) -> Subgroups:
    """Primary metrics per value of each field, with the fairness gap.

    The gap is the best minus the worst value over subgroups of at least 10 rows. It is never
    negative, so its interval cannot show that it is real; ``p`` does: how often a random
    relabelling of the patients gives as large a gap.
    """
    out: Subgroups = {}
    primary = [m for m in PRIMARY[scored.task] if m in scored.model]
    stats = {who: {m: own[m] for m in primary if m in own} for who, own in scored.stats.items()}
    part = Scored(scored.task, scored.traces, stats, {})
    for path in fields:
        values = [value_of(t, path) for t in scored.traces]
        if all(v is None for v in values):
            out[path] = NotComputed(f"no row has {path}")
            continue
        names = sorted({v for v in values if v is not None})
        member = np.array([names.index(v) if v is not None else -1 for v in values])
        found = [table(part, np.flatnonzero(member == i), common) for i in range(len(names))]
        large = [i for i in range(len(names)) if np.sum(member == i) >= SMALLEST]
        out[path] = {
            metric: Breakdown(
                {name: _score(own, metric) for name, own in zip(names, found, strict=True)},
                _fairness(part, metric, member, large, common) if large[1:] else None,
                None if large[1:] else f"fewer than two groups of {SMALLEST} rows",
            )
            for metric in primary
        }
    return out


def _score(group: Scores, metric: str) -> SubgroupScore:
    """A value with the control that it is held against, as in every other table."""
    return SubgroupScore.of(
        group.metrics[metric],
        control=best_control(group.controls, metric),
        marked=metric in group.marked,
    )


def _fairness(
    scored: Scored, metric: str, member: np.ndarray, large: Sequence[int], common: Common
) -> Gap:
    """The gap between the ``large`` subgroups, with its p."""
    stat = scored.model[metric]
    groups = clusters([t.patient for t in scored.traces])
    found = gap_interval(stat, member, large, groups, common)
    return Gap.of(found, p=clean(_gap_p(stat, member, groups, large, found.value, common.seed)))


def gap_interval(
    stat: AnyStat, member: np.ndarray, large: Sequence[int], groups: np.ndarray, common: Common
) -> Interval:
    """The best minus the worst value of a metric over the ``large`` of the subgroups.

    A range is a seminorm that sampling pushes away from 0, so the interval is found by test
    inversion; the value stays the difference that the table shows.

    Args:
        member: int [n], subgroup of each row, negative for none.
        groups: int [n], cluster number of each row.
    """
    gap, n = _gap(stat, member, large), int(np.isin(member, large).sum())
    masked = [_masked(stat, member == i) for i in large]
    drawn = resample(masked, groups, common.resamples, common.seed)
    values = np.array([own.point() for own in masked])
    several = np.stack([own.bootstrap for own in drawn], axis=-1)
    fewest = min(len(np.unique(groups[member == i])) for i in large)
    if fewest < 2:  # a group of one patient has no spread
        return Interval(gap, None, None, n)
    _, low, high = inverted(_range, values - values.mean(), several, fewest)
    return Interval(gap, low, max(high, gap), n)


def _masked(stat: AnyStat, keep: np.ndarray) -> AnyStat:
    """The metric over some rows, still as one statistic over all rows (paired draws)."""
    if isinstance(stat, RankStat):
        return RankStat(np.where(keep, stat.scores, np.nan), stat.positive, stat.values)
    assert isinstance(stat, Stat)  # references are counted over whole runs, not over subgroups
    return Stat(stat.rows * keep[:, None], stat.finish, stat.values)


def _range(values: np.ndarray) -> np.ndarray:
    return np.ptp(values, axis=-1)


def _gap(stat: AnyStat, member: np.ndarray, large: Sequence[int]) -> float:
    points = [stat.take(np.flatnonzero(member == i)).point() for i in large]
    return float(_range(np.array(points)))


def _gap_p(
    stat: AnyStat,
    member: np.ndarray,
    groups: np.ndarray,
    large: Sequence[int],
    gap: float,
    seed: int,
) -> float:
    """Permutation p of the gap: whole patients exchange their subgroup."""
    rng = numpy_rng(seed, 4)
    first = np.unique(groups, return_index=True)[1]
    hits = 0
    for _ in range(PERMUTATIONS):
        relabelled = rng.permutation(member[first])[groups]
        hits += _gap(stat, relabelled, large) >= gap - 1e-12
    return (hits + 1) / (PERMUTATIONS + 1)
