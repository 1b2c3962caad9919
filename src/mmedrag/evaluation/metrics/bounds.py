"""From values under resampling to bounds: BCa intervals, and test inversion for norms.

Place in the picture: below ``statistics``; arrays in, numbers out. Both kinds of interval are
widened where clusters (patients) are few. How often they hold the truth is measured by
``bench/coverage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

ALPHA = 0.025  # beyond each end of a 95 % interval
INVERTED = 2000  # draws that an inversion works with: it sorts them some 60 times
STEPS = 20  # halvings of an inversion: a millionth of the value

Pair = tuple[float, float] | tuple[None, None]


def reach(clusters: int) -> float:
    """Half the width of the interval in bootstrap standard errors: for many clusters 1.96.

    The bootstrap draws from a variance that divides by the clusters instead of one less, and
    quantiles of the normal are too near for a variance that is estimated: the "expanded
    percentile" of Hesterberg (2015, The American Statistician 69:371) corrects both.
    """
    return math.sqrt(clusters / (clusters - 1)) * float(stdtrit(clusters - 1, 1 - ALPHA))


def bca(value: float, bootstrap: np.ndarray, jackknife: np.ndarray, clusters: int) -> Pair:
    """The bias-corrected and accelerated bootstrap interval (BCa; Efron 1987, JASA 82:171), its
    levels moved outwards by :func:`reach`; (None, None) when no draw is defined.

    Args:
        value: the metric of the rows themselves.
        bootstrap: [b], its values of resamples; NaN where it is not defined.
        jackknife: [j], its values with one block of clusters left out.
        clusters: how many there are.
    """
    drawn = bootstrap[np.isfinite(bootstrap)]
    if not len(drawn):
        return None, None
    bias, skew = _bias(value, drawn), _acceleration(jackknife)
    levels = [_level(bias + z, bias, skew) for z in (-reach(clusters), reach(clusters))]
    low, high = quantiles(drawn, np.array(levels))
    return float(low), float(high)


def bca_p(
    value: float, bootstrap: np.ndarray, jackknife: np.ndarray, clusters: int
) -> float | None:
    """Two-sided p of the value being 0: one less the level of the :func:`bca` interval that ends
    there; no less than what the number of draws can show."""
    drawn = bootstrap[np.isfinite(bootstrap)]
    if not len(drawn):
        return None
    bias, skew = _bias(value, drawn), _acceleration(jackknife)
    at = _normal(drawn, 0.0) - bias
    z = at / (1 + skew * at) - bias if 1 + skew * at > 0 else math.copysign(math.inf, at)
    t = abs(z) * math.sqrt((clusters - 1) / clusters)
    return max(2 * float(stdtr(clusters - 1, -t)), 2 / (len(drawn) + 1))


def _normal(drawn: np.ndarray, value: float) -> float:
    """The normal quantile of the share of draws below a value; ties count half."""
    below = np.count_nonzero(drawn < value) + np.count_nonzero(drawn == value) / 2
    most = len(drawn) / (len(drawn) + 1)
    return float(ndtri(min(max(below / len(drawn), 1 - most), most)))


def _bias(value: float, drawn: np.ndarray) -> float:
    return _normal(drawn, value)


def _acceleration(jackknife: np.ndarray) -> float:
    """How the standard error grows with the metric: the skewness of its influence, over 6."""
    known = jackknife[np.isfinite(jackknife)]
    influence = known.mean() - known if len(known) else known
    spread = float((influence**2).sum())
    return float((influence**3).sum()) / (6 * spread**1.5) if spread > 1e-24 else 0.0


def _level(w: float, bias: float, skew: float) -> float:
    """The level of the bootstrap distribution for a normal quantile, moved by ``bias``."""
    room = 1 - skew * w
    return float(ndtr(bias + w / room)) if room > 0 else float(w > 0)


def quantiles(drawn: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """numpy's linear interpolation, without its generality: it is called for every cell."""
    at = (len(drawn) - 1) * levels
    below = at.astype(int)
    above = np.minimum(below + 1, len(drawn) - 1)
    ordered = np.partition(drawn, np.concatenate([below, above]))
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def inverted(
    norm: Callable[[np.ndarray], np.ndarray],
    vector: np.ndarray,
    bootstrap: np.ndarray,
    clusters: int,
) -> tuple[float, float, float]:
    """A norm of a vector, corrected for what sampling adds to it, with its interval.

    The norm of what is measured, truth and sampling error, is larger than the norm of the truth;
    where the truth is 0 a bootstrap interval never holds it. So for each truth along the measured
    direction, t times the vector, the bootstrap's errors say how large a norm would be measured;
    the interval holds those truths under which the measured one lies in the middle 95 %, and the
    value is the one under which it is the median (test inversion: Carpenter 1999, JRSS B 61:159;
    median-unbiased estimation: Stock & Watson 1998, JASA 93:349). An interval that begins above 0
    is a test at 2.5 % that the truth is not 0.

    Args:
        norm: [..., m] -> [...], also a seminorm.
        vector: [m], what is measured.
        bootstrap: [b, m], the same of resamples; draws that are not defined are left out.

    Returns:
        value, low, high.
    """
    drawn = bootstrap[np.isfinite(bootstrap).all(axis=-1)][:INVERTED]
    seen = float(norm(vector))
    if not len(drawn):
        return seen, seen, seen
    errors = (drawn - drawn.mean(axis=0)) * math.sqrt(clusters / (clusters - 1))
    if seen == 0.0:  # no direction: whatever could have given it
        return 0.0, 0.0, float(quantiles(norm(errors), np.array([1 - ALPHA]))[0])

    def truth(level: float) -> float:
        """The norm of the truth under which the measured one stands at this level."""

        def measured(t: float) -> float:
            return float(quantiles(norm(t * vector + errors), np.array([level]))[0])

        low, high = 0.0, 1.0
        if measured(low) >= seen:
            return 0.0
        while measured(high) < seen and high < 1e6:
            low, high = high, 2 * high
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if measured(middle) < seen else (low, middle)
        return high * seen

    return truth(0.5), truth(1 - ALPHA), truth(ALPHA)
