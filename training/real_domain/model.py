"""One fit of the real domain model on the features of some rows, and what it is judged by.

Every function sees features only (``Blocks``), so that a fit with a source left out costs seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedrag.domain import DomainModel, DomainTraining, fit_head, fit_trees, standardise
from mmedrag.domain.features import VERSION
from mmedrag.records import Row
from training.real_domain.pictures import COPIES

SETTINGS = DomainTraining(variants=COPIES, swaps=0, outliers=2500, trees=120, depth=3)
LEAF = 30  # pictures: trees on fewer tell the clinics apart
FLAGGED = 0.98  # of the first half of the fresh drawn outliers, below the threshold
Arrays = dict[str, np.ndarray]


@dataclass
class Blocks:
    """Features [n, d] of: the rows' pictures, ``COPIES`` of each, drawn outliers of the fit, others
    for threshold (first half) and judgement (second), copies of everyday pictures."""

    own: np.ndarray
    copies: np.ndarray
    drawn: np.ndarray
    fresh: np.ndarray
    photos: np.ndarray


def fit(rows: Sequence[Row], use: np.ndarray, blocks: Blocks) -> DomainModel:
    """A model of the rows where ``use`` [n] is true."""
    at = np.flatnonzero(use)
    fitted = [row for row, used in zip(rows, use, strict=True) if used]
    domains: np.ndarray = np.array([str(row.domain) for row in fitted], dtype=object)
    sources: np.ndarray = np.array([row.source for row in fitted], dtype=object)
    labels = sorted(set(domains))
    own = blocks.own[at]
    arrays: Arrays = {"mean": own.mean(axis=0), "scale": own.std(axis=0) + 1e-3}
    inside = np.concatenate([own, *(blocks.copies[at * COPIES + copy] for copy in range(COPIES))])
    z = standardise(inside, arrays)
    weight = np.tile(_weights(domains, sources), COPIES + 1)
    arrays |= fit_head(z, np.tile(domains, COPIES + 1), labels, SETTINGS, weight)
    config: dict[str, Any] = {
        "format": 1,
        "kind": "trained",
        "labels": labels,
        "temperature": 1.0,
        "threshold": None,
        "statistics": VERSION,
        "encoder": None,
    }
    outside = standardise(np.concatenate([blocks.drawn, blocks.photos]), arrays)
    model = DomainModel(config, arrays | fit_trees(z, outside, SETTINGS, weight, LEAF))
    fresh = model.scores(blocks.fresh[: len(blocks.fresh) // 2])[1]
    config["threshold"] = round(float(np.quantile(fresh, FLAGGED)), 6)
    return model


def _weights(domains: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Domains weigh the same; within one, a source as the root of its number of pictures."""
    weight = np.zeros(len(domains))
    for domain in set(domains):
        for source in set(sources[domains == domain]):
            chosen = (domains == domain) & (sources == source)
            weight[chosen] = 1 / np.sqrt(chosen.sum())
        weight[domains == domain] /= weight[domains == domain].sum()
    return weight / weight.mean()


def judged(model: DomainModel, features: np.ndarray, domain: str) -> dict[str, Any]:
    """Of pictures of one domain: ``n``, ``right`` (the label, unknown or not) and ``lost``."""
    logits, known = model.scores(features)
    right = np.array(model.labels)[logits.argmax(axis=1)] == domain
    return {
        "n": len(features),
        "right": round(float(right.mean()), 4),
        "lost": round(float((known < model.config["threshold"]).mean()), 4),
    }
