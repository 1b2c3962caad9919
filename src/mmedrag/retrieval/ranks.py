"""Ranks of the right references, and what follows from them: recall@k, MRR, nDCG.

Place in the picture: validation while a retriever is trained, and ``retriever eval``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KS = (1, 5, 10)


DEEPEST = 10  # ranks whose similarity is told


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
