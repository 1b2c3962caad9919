"""Uncertainty of a score: bootstrap intervals clustered by patient, and paired tests.

Place in the picture: between per-row scores and every table. A :class:`Stat` is a metric in
the one form that makes resampling cheap: rows of additive statistics and a function that
finishes their sum (accuracy, F1, MCC, ECE and corpus BLEU are all of that form), so that
10,000 resamples are one matrix product. Ranks (AUROC) and counts of references (hubness) are
the exceptions and have their own.

Rows of one patient are not independent, hence whole patients are drawn (cluster bootstrap:
Davison & Hinkley 1997, §3.8). A resample is a multinomial weight per patient; all statistics
of one table share the weights, so that differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Self

import numpy as np
from scipy.sparse import csr_array

from mmedrag.runtime import numpy_rng

RESAMPLES = 10_000
LEVEL = 0.95
NORMAL = np.array([NormalDist().inv_cdf(q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)])
FEWEST = 6  # patients below which a difference is not claimed
BOOTSTRAP = "paired bootstrap"
Finish = Callable[[np.ndarray], np.ndarray]


def mean_of(sums: np.ndarray) -> np.ndarray:
    """Finish of a plain mean: columns (sum, count)."""
    return ratio(sums[..., 0], sums[..., 1])


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where bottom is 0: an undefined score is not a zero."""
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    return np.divide(
        top, bottom, out=np.full(np.broadcast(top, bottom).shape, np.nan), where=bottom != 0
    )


@dataclass(frozen=True)
class Stat:
    """A metric over n rows.

    Args:
        rows: float [n, k], statistics that add up over rows.
        finish: [..., k] -> [...], from summed statistics to the metric.
        values: float [n], the value shown per example (NaN where the row has none).
        counted: bool [n], rows in the metric's denominator (all by default).
        unit: the metric lies in [0, 1], so that a score of exactly 0 or 1 has exact bounds.
        biased: resampling pushes the metric to one side (a sum of absolute gaps, such as ECE,
            away from 0): its interval is shifted back by the bootstrap's estimate of that bias.
    """

    rows: np.ndarray
    finish: Finish
    values: np.ndarray
    counted: np.ndarray | None = None
    unit: bool = True
    biased: bool = False

    @property
    def n(self) -> int:
        return len(self.rows) if self.counted is None else int(self.counted.sum())

    def point(self) -> float:
        return float(self.finish(self.rows.sum(axis=0)[None])[0])

    def take(self, rows: np.ndarray, table: dict[int, np.ndarray] | None = None) -> Stat:
        """The same metric over some of the rows. Pass one dict as ``table`` for many metrics:
        those that share statistics keep sharing them, which is what makes resampling cheap."""
        shared = {} if table is None else table
        part = shared.setdefault(id(self.rows), self.rows[rows])
        counted = None if self.counted is None else self.counted[rows]
        return replace(self, rows=part, values=self.values[rows], counted=counted)


@dataclass(frozen=True)
class RankStat:
    """AUROC = P(score of a positive > score of a negative), ties one half (Mann-Whitney)."""

    scores: np.ndarray  # [n], NaN where the row has no score
    positive: np.ndarray  # bool [n]
    values: np.ndarray
    unit: bool = True

    @property
    def n(self) -> int:
        return int((~np.isnan(self.scores)).sum())

    def take(self, rows: np.ndarray, table: dict[int, np.ndarray] | None = None) -> RankStat:
        return RankStat(self.scores[rows], self.positive[rows], self.values[rows])

    def point(self) -> float:
        return float(self.weighted(np.ones((1, len(self.scores))))[0])

    def weighted(self, weights: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """AUROC under weights [b, n], or under weights [b, clusters] of the rows' ``groups``,
        computed for all b at once."""
        keep = np.flatnonzero(~np.isnan(self.scores))
        order = keep[np.argsort(self.scores[keep], kind="stable")]
        if not len(order):
            return np.full(len(weights), np.nan)
        sorted_scores, positive = self.scores[order], self.positive[order]
        starts = np.flatnonzero(np.r_[True, sorted_scores[1:] != sorted_scores[:-1]])
        neg = weights[:, order if groups is None else groups[order]]
        pos = neg * positive
        neg -= pos
        if len(starts) < len(order):  # ties stand together
            pos = np.add.reduceat(pos, starts, axis=1)
            neg = np.add.reduceat(neg, starts, axis=1)
        below = np.cumsum(neg, axis=1)
        ends = below[:, -1].copy()
        neg *= 0.5
        below -= neg
        wins = np.einsum("bi,bi->b", pos, below)
        return ratio(wins, pos.sum(axis=1) * ends)


@dataclass(frozen=True)
class UseStat:
    """A metric of how often each reference comes up, such as the share of the most used one.

    Args:
        used: int [n, k], references of each query, -1 for none.
        finish: (uses [references, b], queries [b]) -> [b].
        biased: always, because in a resample the same queries come up twice: larger hubs.
        jackknife: the metric counts references, of which repeated queries show no new ones, so
            that a bootstrap interval is too narrow: its interval is the jackknife's.
    """

    used: np.ndarray
    finish: Callable[[np.ndarray, np.ndarray], np.ndarray]
    unit: bool = True
    biased: bool = True
    jackknife: bool = False

    @property
    def n(self) -> int:
        return int((self.used >= 0).any(axis=1).sum())

    @property
    def values(self) -> np.ndarray:  # it is of all queries together
        return np.full(len(self.used), np.nan)

    def take(self, rows: np.ndarray, table: dict[int, np.ndarray] | None = None) -> UseStat:
        return replace(self, used=self.used[rows])

    def point(self) -> float:
        return float(self.weighted(np.ones((1, len(self.used))))[0])

    def weighted(self, weights: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
        """The metric under weights [b, n], or under weights [b, clusters] of ``groups``."""
        query, place = np.nonzero(self.used >= 0)
        if not len(query):
            return np.full(len(weights), np.nan)
        own = np.arange(len(self.used)) if groups is None else groups
        asked = np.bincount(own[np.unique(query)], minlength=weights.shape[1])
        ones = np.ones(len(query))
        table = csr_array(
            (ones, (self.used[query, place], own[query])),
            shape=(int(self.used.max()) + 1, weights.shape[1]),
        )
        return self.finish(table @ weights.T, weights @ asked)

    def normal(self, groups: np.ndarray) -> tuple[float, float]:
        """Normal interval around the value, with the standard error of the delete-one-cluster
        jackknife (Efron & Stein 1981)."""
        count = int(groups.max()) + 1
        without = self.weighted(1.0 - np.eye(count), groups)
        bounds = np.round(self.point() + NORMAL * np.sqrt((count - 1) * without.var()), 12)
        low, high = np.clip(bounds, 0.0, 1.0) if self.unit else bounds
        return float(low), float(high)


AnyStat = Stat | RankStat | UseStat


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; bounds are None where they cannot be known."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """An :class:`Interval` as results hold it: six decimals, None where it is not defined.

    ``n``: rows in the denominator.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, found: Interval | Estimate, **more: Any) -> Self:
        return cls(clean(found.value), clean(found.low), clean(found.high), found.n, **more)


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference a - b with its 95 % interval and two-sided p-value."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    test: str


def clean(value: float | None) -> float | None:
    """Six decimals, NaN as None: stable bytes and valid JSON."""
    return None if value is None or not np.isfinite(value) else round(float(value), 6) + 0.0


def clusters(patients: Sequence[str | None]) -> np.ndarray:
    """Cluster number of each row: one per patient; a row without a patient is its own."""
    numbers: dict[object, int] = {}
    keys = [p if p is not None else ("row", i) for i, p in enumerate(patients)]
    return np.array([numbers.setdefault(k, len(numbers)) for k in keys], dtype=np.intp)


def draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Multinomial weights [b, count] of bootstrap resamples, each row summing to count, in
    chunks of about a million weights."""
    rng = numpy_rng(seed)
    chunk = max(1, 1_000_000 // count)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        picked = rng.integers(0, count, size=(size, count), dtype=np.int32)
        picked += np.arange(size, dtype=np.int32)[:, None] * count
        yield np.bincount(picked.ravel(), minlength=size * count).reshape(size, count)


def resample(
    stats: Sequence[AnyStat], groups: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Bootstrap values [len(stats), resamples] of metrics over the same rows, paired by draw.

    Args:
        stats: metrics over the same n rows.
        groups: int [n], cluster number of each row (see :func:`clusters`).
    """
    count = int(groups.max()) + 1 if len(groups) else 0
    out = np.full((len(stats), resamples), np.nan)
    if not count or not stats:
        return out
    member = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[member], np.arange(count))
    sums: list[np.ndarray] = []
    spans: dict[int, tuple[int, int]] = {}
    at = 0
    for stat in stats:
        if isinstance(stat, Stat) and id(stat.rows) not in spans:
            sums.append(np.add.reduceat(stat.rows[member].astype(float), starts, axis=0))
            spans[id(stat.rows)] = (at, at + stat.rows.shape[1])
            at += stat.rows.shape[1]
    table = np.concatenate(sums, axis=1) if sums else np.empty((count, 0))
    done = 0
    with np.errstate(all="ignore"):
        for weights in draws(count, resamples, seed):
            here = slice(done, done + len(weights))
            done = here.stop
            real = weights.astype(float)
            totals = (table.T @ real.T).T  # column by column, as the metrics read it
            for i, stat in enumerate(stats):
                if isinstance(stat, Stat):
                    a, b = spans[id(stat.rows)]
                    out[i, here] = stat.finish(totals[:, a:b])
                else:
                    out[i, here] = stat.weighted(real, groups)
    return out


def interval(stat: AnyStat, samples: np.ndarray, groups: np.ndarray) -> Interval:
    """Percentile interval of one metric from its bootstrap values.

    With fewer than two clusters there is no interval. A score of exactly 0 or 1 has no spread
    to resample: its bound is the exact binomial one for that many clusters (Clopper-Pearson),
    so that 5 right answers of 5 do not print as certainty. The same bound holds what queries
    could show of references that none has shown yet, where each has come up more than once.
    """
    value, n = stat.point(), stat.n
    kept = np.unique(groups if getattr(stat, "counted", None) is None else groups[stat.counted])  # type: ignore[union-attr]
    count = len(kept)
    if count < 2 or not np.isfinite(value):
        return Interval(value, None, None, n)
    if getattr(stat, "biased", False):
        samples = unbias(samples, value, stat.unit)
    own = isinstance(stat, UseStat) and stat.jackknife
    low_, high_ = stat.normal(groups) if own else percentile(samples)  # type: ignore[union-attr]
    if stat.unit and (own or value in (0.0, 1.0)) and low_ == high_:
        bound = ((1 - LEVEL) / 2) ** (1 / count)
        low, high = (bound, 1.0) if value == 1.0 else (value, min(value + 1.0 - bound, 1.0))
        return Interval(value, low, high, n)
    return Interval(value, low_, high_, n)


def unbias(samples: np.ndarray, value: float, unit: bool = True) -> np.ndarray:
    """Bootstrap values shifted so that their mean is the value, those of a ``unit`` metric cut
    off at 0 and 1 (additive bias correction: Davison & Hinkley 1997, §2.1)."""
    defined = samples[np.isfinite(samples)]
    shifted = defined + (value - defined.mean() if len(defined) else 0.0)
    return np.clip(shifted, 0.0, 1.0) if unit else shifted


def percentile(samples: np.ndarray, level: float = LEVEL) -> tuple[float | None, float | None]:
    """The central ``level`` of the defined samples; (None, None) when none is defined."""
    defined = samples[np.isfinite(samples)]
    if not len(defined):
        return None, None
    # np.percentile's linear interpolation, without its generality: it is called for every cell
    at = (len(defined) - 1) * np.array([(1 - level) / 2, (1 + level) / 2])
    below = at.astype(int)
    above = np.minimum(below + 1, len(defined) - 1)
    ordered = np.partition(defined, np.concatenate([below, above]))
    low, high = ordered[below] + (at - below) * (ordered[above] - ordered[below])
    return float(low), float(high)


def intervals(
    stats: Mapping[str, AnyStat],
    patients: Sequence[str | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Value and 95 % interval of every metric over the same rows."""
    groups = clusters(patients)
    samples = resample(list(stats.values()), groups, resamples, seed)
    return {
        name: interval(stat, row, groups)
        for (name, stat), row in zip(stats.items(), samples, strict=True)
    }


def estimates(
    stats: Mapping[str, AnyStat],
    patients: Sequence[str | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """:func:`intervals` as results hold them."""
    found = intervals(stats, patients, resamples, seed)
    return {name: Estimate.of(cell) for name, cell in found.items()}


def cells(
    stats: Mapping[str, AnyStat],
    patients: Sequence[str | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """:func:`estimates` as plain data {value, low, high, n}."""
    found = estimates(stats, patients, resamples, seed)
    return {name: asdict(cell) for name, cell in found.items()}


def difference(
    value: float, a: np.ndarray, b: np.ndarray, n: int, count: int | None = None
) -> Difference:
    """Paired bootstrap difference of two metrics resampled with the same weights.

    p = 2 min(P(d* <= 0), P(d* >= 0)), each with the +1 correction (Davison & Hinkley 1997,
    §4.2), so that it is never 0. ``count`` is the number of clusters (None: enough): from fewer
    than 6 there is no interval and no p, because even a sign test of 5 that all agree cannot
    reach p < 0.05.
    """
    samples = a - b
    samples = samples[np.isfinite(samples)]
    if not len(samples) or (count is not None and count < FEWEST):
        return Difference(clean(value), None, None, None, n, BOOTSTRAP)
    low, high = percentile(samples)
    tails = [(np.sum(samples <= 0) + 1), (np.sum(samples >= 0) + 1)]
    p = min(1.0, 2 * min(tails) / (len(samples) + 1))
    return Difference(clean(value), clean(low), clean(high), clean(p), n, BOOTSTRAP)


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
