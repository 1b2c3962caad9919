"""How well images find their own reports: recall@k, MRR, nDCG, chance, hubness.

Place in the picture: ``retriever eval`` and the validation of ``train retriever``. Layer A.
A query has one or more right references (its own text, and equal texts); its rank is that of
the best of them, with ties counted against it, so that a constant encoder is not rewarded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KS = (1, 5, 10)


def relevant(texts: Sequence[str], own: Sequence[int]) -> np.ndarray:
    """bool [q, n]: references that say exactly what each query's own one says."""
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(" ".join(t.split()), len(number)) for t in texts])
    return ids[np.asarray(own)][:, None] == ids[None]


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank (from 1) of each query's best right reference, int [q]."""
    best = np.where(right, scores, -np.inf).max(axis=1)
    return 1 + ((scores >= best[:, None]) & ~right).sum(axis=1)


def per_query(
    scores: np.ndarray, right: np.ndarray, ks: Sequence[int] = KS
) -> dict[str, np.ndarray]:
    """``recall@k``, ``mrr`` and ``ndcg@10`` of each query, float [q].

    nDCG@10 over all right references with gain 1 and discount log2(1 + rank) (Järvelin and
    Kekäläinen 2002).
    """
    rank = ranks(scores, right)
    found = {f"recall@{k}": (rank <= k).astype(float) for k in ks}
    top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    discount = 1 / np.log2(2 + np.arange(top.shape[1]))
    gained = (np.take_along_axis(right, top, axis=1) * discount).sum(axis=1)
    best = np.cumsum(discount)[np.minimum(right.sum(axis=1), len(discount)) - 1]
    return {**found, "mrr": 1 / rank, "ndcg@10": gained / best}


def chance(right: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Expected value of the same under a random order (hypergeometric), mean over queries."""
    q, n = right.shape
    out = {f"recall@{k}": 0.0 for k in ks} | {"mrr": 0.0, "ndcg@10": 0.0}
    discount = 1 / np.log2(2 + np.arange(min(10, n)))
    for m, queries in zip(*np.unique(right.sum(axis=1), return_counts=True), strict=True):
        # P(first right reference stands at rank r) for m right ones among n
        alive = np.cumprod(np.concatenate([[1.0], 1 - m / (n - np.arange(n - m))]))
        first = alive[:-1] * (m / (n - np.arange(n - m))) if n > m else np.array([1.0])
        first = np.append(first, alive[-1]) if n > m else first
        share = queries / q
        for k in ks:
            out[f"recall@{k}"] += share * float(first[:k].sum())
        out["mrr"] += share * float((first / (1 + np.arange(len(first)))).sum())
        best = discount[: min(m, len(discount))].sum()
        out["ndcg@10"] += share * float(discount.sum() * (m / n) / best)
    return out


def hubness(rows: np.ndarray, references: int) -> dict[str, float]:
    """How many distinct references the queries ever get. ``rows``: int [q, k], -1 for none.

    ``distinct``: at rank 1; ``distinct@k``: anywhere; ``top_share``: share of queries whose
    rank 1 is the single most returned reference; ``skewness`` of the k-occurrence counts
    (Radovanović et al. 2010).
    """
    first, every = rows[:, 0][rows[:, 0] >= 0], rows[rows >= 0]
    counts = np.bincount(every, minlength=references).astype(float)
    spread = counts.std()
    skew = float((((counts - counts.mean()) / spread) ** 3).mean()) if spread > 0 else 0.0
    return {
        "distinct": float(len(np.unique(first))),
        f"distinct@{rows.shape[1]}": float(len(np.unique(every))),
        "possible": float(min(references, len(first))),
        "top_share": float(np.bincount(first).max() / len(first)) if len(first) else 0.0,
        "skewness": round(skew, 4),
    }
