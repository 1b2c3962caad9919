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
ENCODER = "real:lite0"  # of the neighbours
NEAREST, WEIGHT = 5, 20.0  # least lost, on average, of the sources left out: of 5 to 40
SEEN = 100  # fresh outliers for the neighbours' level, as many for their judgement
Arrays = dict[str, np.ndarray]


@dataclass
class Blocks:
    """Features [n, d] of: the rows' pictures, ``COPIES`` of each, drawn outliers of the fit, others
    for threshold (first half) and judgement (second), copies of everyday pictures; ``seen``: those
    of the encoder of the neighbours, for "own", "fresh", "photos" (PHOTOS as they are), ..."""

    own: np.ndarray
    copies: np.ndarray
    drawn: np.ndarray
    fresh: np.ndarray
    photos: np.ndarray
    seen: Arrays
    encoder: dict[str, Any]  # spec, fingerprint, dim

    def both(self, name: str, statistics: np.ndarray) -> np.ndarray:
        """[n, e + d]: what the encoder sees, then the statistics."""
        return np.concatenate([self.seen[name], statistics], axis=1)

    def fresh_both(self) -> np.ndarray:
        """``SEEN`` of the first half of the fresh outliers, ``SEEN`` of the second."""
        half = len(self.fresh) // 2
        return self.both(
            "fresh", np.concatenate([self.fresh[:SEEN], self.fresh[half : half + SEEN]])
        )


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
    _fit_neighbours(model, at, blocks)
    return model


def _fit_neighbours(model: DomainModel, at: np.ndarray, blocks: Blocks) -> None:
    """The pictures ``at`` as neighbours. Their level: ``FLAGGED`` of ``SEEN`` drawn outliers and
    all everyday pictures of the fit stay below the threshold of the trees."""
    seen = blocks.seen["own"][at]
    near = (seen / np.linalg.norm(seen, axis=1, keepdims=True)).astype(np.float16)
    model.arrays["near"] = near
    model.config["neighbours"] = {
        "encoder": blocks.encoder,
        "k": NEAREST,
        "weight": WEIGHT,
        "level": 0.0,
    }
    drawn = model.scores(blocks.fresh_both()[:SEEN])[1]
    photos = model.scores(blocks.both("photos", blocks.seen["photos_statistics"]))[1]
    least = max(float(np.quantile(drawn, FLAGGED)), float(photos.max()) + 1e-6)
    model.config["neighbours"]["level"] = round((least - model.config["threshold"]) / WEIGHT, 6)


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
    """Of pictures of one domain: ``n``, ``right`` (the label, unknown or not), ``lost`` by the
    statistics alone and by both."""
    logits, known = model.scores(features[:, -len(model.arrays["mean"]) :])
    right = np.array(model.labels)[logits.argmax(axis=1)] == domain
    return {
        "n": len(features),
        "right": round(float(right.mean()), 4),
        "lost": below(model, known),
        f"lost with {ENCODER}": below(model, model.scores(features)[1]),
    }


def below(model: DomainModel, known: np.ndarray) -> float:
    """Share of scores below the threshold."""
    return round(float((known < model.config["threshold"]).mean()), 4)
