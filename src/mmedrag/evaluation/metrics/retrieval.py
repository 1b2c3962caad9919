"""How well images find their own reports, and which references are used.

recall@k, MRR, nDCG and chance; hubness, selection, similarity.
Place in the picture: ``retriever eval``, ``eval`` and the validation of ``train retriever``.
A query has one or more right references (its own text, and equal texts); its rank is that of
the best of them, with ties counted against it, so that a constant encoder is not rewarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from scipy.stats import skew

from mmedrag.evaluation.metrics.questions import average, proportion
from mmedrag.evaluation.metrics.statistics import AnyStat, UseStat
from mmedrag.records import Trace
from mmedrag.retrieval import DEEPEST, KS


def chance(right: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Expected value of the same under a random order (hypergeometric), of each query."""
    q, n = right.shape
    out = {name: np.zeros(q) for name in (*(f"recall@{k}" for k in ks), "mrr", "ndcg@10")}
    discount = 1 / np.log2(2 + np.arange(min(10, n)))
    many = right.sum(axis=1)
    for m in np.unique(many):
        # P(first right reference stands at rank r) for m right ones among n
        alive = np.cumprod(np.concatenate([[1.0], 1 - m / (n - np.arange(n - m))]))
        first = alive[:-1] * (m / (n - np.arange(n - m))) if n > m else np.array([1.0])
        first = np.append(first, alive[-1]) if n > m else first
        for k in ks:
            out[f"recall@{k}"][many == m] = first[:k].sum()
        out["mrr"][many == m] = (first / (1 + np.arange(len(first)))).sum()
        best = discount[: min(m, len(discount))].sum()
        out["ndcg@10"][many == m] = discount.sum() * (m / n) / best
    return out


def _distinct(uses: np.ndarray, queries: int) -> float:
    return float(np.count_nonzero(uses) / queries)


def _coverage(uses: np.ndarray, queries: int, references: int) -> float:
    return float(np.count_nonzero(uses) / references)


def _top(uses: np.ndarray, queries: int, most: int) -> float:
    return float(np.sort(uses)[-most:].sum() / queries)


def _skewness(uses: np.ndarray, queries: int, references: int) -> float:
    """Third standardised moment of the uses of all references, those never used included."""
    return float(skew(np.pad(uses, (0, references - len(uses)))))


def hubs(first: Sequence[int] | np.ndarray) -> dict[str, AnyStat]:
    """Do a few references come up for every query? From the reference at rank 1, -1 for none.

    ``distinct_share``: distinct references per query; ``top_share``, ``top_ten_share``: share
    of queries that the most used one and the ten most used ones serve.
    """
    used = np.asarray(first, dtype=int).reshape(-1, 1)
    return {
        "distinct_share": UseStat(used, _distinct),
        "top_share": UseStat(used, partial(_top, most=1)),
        "top_ten_share": UseStat(used, partial(_top, most=10)),
    }


def hubness(rows: np.ndarray, references: int) -> dict[str, AnyStat]:
    """:func:`hubs` of whole result lists. ``rows``: int [q, k] references, -1 for none.

    ``coverage@k``: share of all references that anyone gets within rank k; ``skewness`` of the
    k-occurrence counts (Radovanović et al. 2010).
    """
    return hubs(rows[:, 0]) | {
        f"coverage@{rows.shape[1]}": UseStat(rows, partial(_coverage, references=references)),
        "skewness": UseStat(rows, partial(_skewness, references=references), unit=False),
    }


def usage(traces: Sequence[Trace]) -> dict[str, AnyStat]:
    """What becomes of the retrieved references, per image.

    Args:
        traces: one of each image, all with hits.

    Returns:
        ``kept`` (mean number), ``kept_all``, ``kept_none`` (shares of images), ``excluded``
        (mean number of the patient's own and near-identical ones), the shares of :func:`hubs`,
        and ``similarity@r`` (mean at rank r, from 1).
    """
    known = [t.selection is not None for t in traces]
    kept = [len(t.selection.kept) if t.selection else np.nan for t in traces]
    number: dict[str, int] = {}
    out: dict[str, AnyStat] = {}
    if any(known):
        out = {
            "kept": average(kept, unit=False),
            "kept_all": proportion(
                [k == len(t.hits) for k, t in zip(kept, traces, strict=True)], known
            ),
            "kept_none": proportion([k == 0 for k in kept], known),
        }
    out["excluded"] = average([t.excluded for t in traces], unit=False)
    out |= hubs([number.setdefault(t.hits[0].id, len(number)) for t in traces])
    for rank in range(min(DEEPEST, max(len(t.hits) for t in traces))):
        scores = [t.hits[rank].score if len(t.hits) > rank else np.nan for t in traces]
        out[f"similarity@{rank + 1}"] = average(scores, unit=False)
    return out
