"""Uncertainty of a score: values under resampling by patient, intervals, paired differences.

Place in the picture: between per-row scores and every table. A :class:`Stat` is a metric in
the one form that makes resampling cheap: rows of additive statistics and a function that
finishes their sum (accuracy, F1, MCC, ECE and corpus BLEU are all of that form), so that
10,000 resamples are one matrix product. Ranks (AUROC) are the exception and have their own.
What is made of the resampled values stands in ``bounds``.

Rows of one patient are not independent, hence whole patients are drawn (cluster bootstrap:
Davison & Hinkley 1997, §3.8). A resample is a multinomial weight per patient; all statistics
of one table share the weights, so that differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from mmedrag.evaluation.metrics import bounds
from mmedrag.runtime import numpy_rng

RESAMPLES = 10_000
BLOCKS = 200  # of clusters that the jackknife leaves out one by one, at most
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
        finish: [..., k] -> [...], from summed statistics to the metric; with ``norm`` to the
            [..., m] that it is a norm of.
        values: float [n], the value shown per example (NaN where the row has none).
        counted: bool [n], rows in the metric's denominator (all by default).
        unit: the metric lies in [0, 1], so that a score of exactly 0 or 1 has exact bounds.
        norm: [..., m] -> [...] of a metric that is a norm, such as ECE, the sum of absolute gaps:
            sampling alone pushes it away from 0, so that its interval is found by test inversion
            (:func:`mmedrag.evaluation.metrics.bounds.inverted`) and its value corrected by it.
    """

    rows: np.ndarray
    finish: Finish
    values: np.ndarray
    counted: np.ndarray | None = None
    unit: bool = True
    norm: Finish | None = None

    @property
    def n(self) -> int:
        return len(self.rows) if self.counted is None else int(self.counted.sum())

    @property
    def vector(self) -> np.ndarray:
        """What the rows come to: [1], or with ``norm`` [1, m]."""
        return self.finish(self.rows.sum(axis=0)[None])

    def point(self) -> float:
        found = self.vector if self.norm is None else self.norm(self.vector)
        return float(found[0])

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

    It describes the queries that were asked and has no interval: with more queries the most used
    reference serves a smaller share and the distinct ones are fewer per query, so that there is no
    value of the population which a resampling of these queries would be around.

    Args:
        used: int [n, k], references of each query, -1 for none.
        finish: (uses [references], queries) -> the metric.
    """

    used: np.ndarray
    finish: Callable[[np.ndarray, int], float]
    unit: bool = True

    @property
    def n(self) -> int:
        return int((self.used >= 0).any(axis=1).sum())

    @property
    def values(self) -> np.ndarray:  # it is of all queries together
        return np.full(len(self.used), np.nan)

    def take(self, rows: np.ndarray, table: dict[int, np.ndarray] | None = None) -> UseStat:
        return replace(self, used=self.used[rows])

    def point(self) -> float:
        used = self.used[self.used >= 0]
        return float(self.finish(np.bincount(used), self.n)) if len(used) else float("nan")


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


@dataclass(frozen=True)
class Replicates:
    """A metric under resampling, from ``clusters`` of rows that it counts.

    bootstrap: [b], of a metric that is a norm [b, m]; undefined values left in as NaN, empty where
    a metric is not resampled. jackknife: [j], the metric without one of j blocks of clusters.
    """

    bootstrap: np.ndarray
    jackknife: np.ndarray
    clusters: int


def resample(
    stats: Sequence[AnyStat], groups: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> list[Replicates]:
    """Replicates of metrics over the same rows, paired by draw.

    Args:
        stats: metrics over the same n rows.
        groups: int [n], cluster number of each row (see :func:`clusters`).
    """
    count = int(groups.max()) + 1 if len(groups) else 0
    if not count:
        return [Replicates(np.empty(0), np.empty(0), 0) for _ in stats]
    member = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[member], np.arange(count))
    sums: list[np.ndarray] = []
    spans: dict[int, slice] = {}
    at = 0
    for stat in stats:
        if isinstance(stat, Stat) and id(stat.rows) not in spans:
            sums.append(np.add.reduceat(stat.rows[member].astype(float), starts, axis=0))
            spans[id(stat.rows)] = slice(at, at := at + stat.rows.shape[1])
    table = np.concatenate(sums, axis=1) if sums else np.empty((count, 0))
    blocks = min(count, BLOCKS)
    left_out = np.arange(count) % blocks == np.arange(blocks)[:, None]
    found: list[list[np.ndarray]] = [[] for _ in stats]
    with np.errstate(all="ignore"):
        for weights in (*draws(count, resamples, seed), ~left_out):
            real = weights.astype(float)
            totals = (table.T @ real.T).T  # column by column, as the metrics read it
            for values, stat in zip(found, stats, strict=True):
                if isinstance(stat, Stat):
                    values.append(stat.finish(totals[:, spans[id(stat.rows)]]))
                elif isinstance(stat, RankStat):
                    values.append(stat.weighted(real, groups))
    nothing = np.empty(0)
    return [
        Replicates(
            np.concatenate(values[:-1]) if values else nothing,
            values[-1] if values else nothing,
            _counted(stat, groups),
        )
        for values, stat in zip(found, stats, strict=True)
    ]


def _counted(stat: AnyStat, groups: np.ndarray) -> int:
    """Clusters of the rows that a metric counts."""
    counted = stat.counted if isinstance(stat, Stat) else None
    return len(np.unique(groups if counted is None else groups[counted]))


def interval(stat: AnyStat, found: Replicates) -> Interval:
    """Value and 95 % interval of one metric from its replicates.

    BCa bootstrap, widened for few clusters (``bounds.bca``); by test inversion for a norm
    (``bounds.inverted``), whose value is then the median-unbiased one. With fewer than two
    clusters there is no interval. A score of exactly 0 or 1 has no spread to resample: its bound
    is the exact binomial one for that many clusters (Clopper-Pearson), so that 5 right answers of
    5 do not print as certainty.
    """
    value, n = stat.point(), stat.n
    low: float | None
    high: float | None
    if not np.isfinite(value) or found.clusters < 2 or not len(found.bootstrap):
        return Interval(value, None, None, n)
    if isinstance(stat, Stat) and stat.norm is not None:
        value, low, high = bounds.inverted(
            stat.norm, stat.vector[0], found.bootstrap, found.clusters
        )
    else:
        low, high = bounds.bca(value, found.bootstrap, found.jackknife, found.clusters)
    if stat.unit and low == high and value in (0.0, 1.0):
        bound = bounds.ALPHA ** (1 / found.clusters)
        low, high = (bound, 1.0) if value == 1.0 else (0.0, 1.0 - bound)
    return Interval(value, low, high, n)


def intervals(
    stats: Mapping[str, AnyStat],
    patients: Sequence[str | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Value and 95 % interval of every metric over the same rows."""
    found = resample(list(stats.values()), clusters(patients), resamples, seed)
    return {
        name: interval(stat, own) for (name, stat), own in zip(stats.items(), found, strict=True)
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


def difference(value: float, a: Replicates, b: Replicates, n: int) -> Difference:
    """Paired difference a - b of two metrics resampled with the same weights: its BCa interval,
    and the p at which that interval would just reach 0.

    From fewer than 6 clusters there is neither, because even a sign test of 5 that all agree
    cannot reach p < 0.05; nor for metrics that are norms, whose differences no bootstrap holds.
    """
    count = min(a.clusters, b.clusters)
    if count < FEWEST or a.bootstrap.ndim > 1 or not len(a.bootstrap):
        return Difference(clean(value), None, None, None, n, BOOTSTRAP)
    drawn = (value, a.bootstrap - b.bootstrap, a.jackknife - b.jackknife, count)
    low, high = bounds.bca(*drawn)
    return Difference(
        clean(value), clean(low), clean(high), clean(bounds.bca_p(*drawn)), n, BOOTSTRAP
    )
