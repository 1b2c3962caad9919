"""What ``train domain`` fits: head, temperature, the score of *unknown* and its threshold.

Place in the picture: below ``train``; every fit sees features only, or draws the pictures
it needs (varied copies, channel swaps, ``outliers``) from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.domain import features, outliers as domain_outliers
from mmedrag.domain.identify import Arrays, DomainModel, embed, standardise
from mmedrag.domain.settings import DomainTraining
from mmedrag.images import load_image
from mmedrag.records import Encoder, Row, UserError
from mmedrag.runtime import numpy_rng, seeded_int


def fit_head(
    z: np.ndarray,
    y: np.ndarray,
    labels: list[str],
    settings: DomainTraining,
    weight: np.ndarray | None = None,
) -> Arrays:
    """Multinomial logistic regression, classes weighted equally, or every row by ``weight``."""
    from sklearn.linear_model import LogisticRegression

    even = "balanced" if weight is None else None
    fit = LogisticRegression(C=settings.strength, class_weight=even, max_iter=2000)
    fit.fit(z, np.array([labels.index(label) for label in y]), sample_weight=weight)
    weight, bias = fit.coef_, fit.intercept_
    if len(labels) == 2:  # one logit: the second label against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def fit_temperature(head: DomainModel, x: np.ndarray, y: np.ndarray) -> float:
    """T that minimises the log-loss of softmax(logits / T) on validation pictures.

    Searched between 0.5 and 10: where every picture is right, the log-loss alone would make
    the model infinitely sure.
    """
    rows = [n for n, label in enumerate(y) if label in head.labels]
    chosen = [head.labels.index(y[n]) for n in rows]
    best = (np.inf, 1.0)
    for temperature in np.geomspace(0.5, 10, 61):
        head.config["temperature"] = float(temperature)
        logits, _ = head.scores(x[rows])
        best = min(best, (float(-logits[np.arange(len(rows)), chosen].mean()), float(temperature)))
    return round(best[1], 6)


def fit_unknown(
    rows: Sequence[Row], z: np.ndarray, arrays: Arrays, model: Encoder | None, s: DomainTraining
) -> Arrays:
    """Boosted trees: training pictures and varied copies against outliers."""
    varied, _ = embed(_varied(rows, s), model, s.statistics)
    unknown, _ = embed(_outliers(rows, s), model, s.statistics)
    inside = np.concatenate([z, standardise(varied, arrays)]) if len(varied) else z
    return fit_trees(inside, standardise(unknown, arrays), s)


def fit_trees(
    inside: np.ndarray,
    outside: np.ndarray,
    s: DomainTraining,
    weight: np.ndarray | None = None,
    leaf: int = 1,
) -> Arrays:
    """Boosted trees that tell standardised features of the known from those of the unknown, both
    sides weighing equally.

    Args:
        weight: of the known, [len(inside)]; by default all the same.
        leaf: least number of pictures in a leaf.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    x = np.concatenate([inside, outside])
    known = np.ones(len(inside)) if weight is None else weight
    half = len(x) / 2
    trees = GradientBoostingClassifier(
        n_estimators=s.trees,
        max_depth=s.depth,
        subsample=0.5,
        max_features="sqrt",
        min_samples_leaf=leaf,
        random_state=s.seed,
    ).fit(
        x,
        np.repeat([1, 0], [len(inside), len(outside)]),
        sample_weight=np.concatenate(
            [known / known.sum() * half, np.full(len(outside), half / max(len(outside), 1))]
        ),
    )
    found = tree_arrays(trees)
    offset = trees.decision_function(x[:1]) - _raw(trees, x[:1])
    return {**found, "start": offset.astype(np.float32)}


def fit_threshold(
    head: DomainModel, known: np.ndarray, rows: Sequence[Row], s: DomainTraining
) -> tuple[float, float]:
    """Where *unknown* begins, and the share of validation outliers below it.

    ``known``: scores of the validation pictures ``rows``. Outliers are drawn anew, and are these
    pictures with exchanged colours, so that no fit has seen them. At least ``keep`` of the known
    stay known. Where known and unknown lie apart, the threshold is the middle of the gap: a
    threshold at its upper end would lose every picture that is a little further out than those
    of validation (another clinic's), one at its lower end would take in the next odd picture.
    """
    fresh = replace(s, seed=s.seed + 1, outliers=max(200, s.outliers // 5))
    unknown, _ = embed(_outliers(rows, fresh), head.encoder, s.statistics)
    scores = head.scores(unknown)[1]
    return threshold_between(known, scores, s.keep)


def threshold_between(known: np.ndarray, unknown: np.ndarray, keep: float) -> tuple[float, float]:
    """The rule of :func:`fit_threshold` on scores alone: (threshold, share of unknown below)."""
    upper = float(np.quantile(known, 1 - keep, method="lower"))
    lower = float(np.quantile(unknown, 0.99)) if len(unknown) else upper
    threshold = np.floor(1e6 * ((upper + lower) / 2 if lower < upper else upper)) / 1e6
    return float(threshold), float((unknown < threshold).mean()) if len(unknown) else 1.0


def _raw(trees: Any, x: np.ndarray) -> np.ndarray:
    """Sum of the trees without the starting value."""
    return np.sum([trees.learning_rate * t[0].predict(x) for t in trees.estimators_], axis=0)


def tree_arrays(trees: Any) -> Arrays:
    """scikit-learn's fitted trees as padded plain arrays [trees, nodes]; leaves have left -1."""
    parts = [t[0].tree_ for t in trees.estimators_]
    nodes = max(t.node_count for t in parts)
    shape = (len(parts), nodes)
    out: Arrays = {
        "feature": np.zeros(shape, np.int32),
        "left": np.full(shape, -1, np.int32),
        "right": np.full(shape, -1, np.int32),
        "threshold": np.zeros(shape, np.float32),
        "value": np.zeros(shape, np.float32),
    }
    for n, tree in enumerate(parts):
        size = tree.node_count
        out["feature"][n, :size] = np.maximum(tree.feature, 0)
        out["left"][n, :size], out["right"][n, :size] = tree.children_left, tree.children_right
        out["threshold"][n, :size] = tree.threshold
        out["value"][n, :size] = trees.learning_rate * tree.value[:, 0, 0]
    return out


def _varied(rows: Sequence[Row], s: DomainTraining) -> Iterator[Image.Image]:
    for row in rows:
        rng = numpy_rng(_seed(s.seed, "vary", row.id))
        picture = _readable(row)
        if picture is None:
            continue
        for _ in range(s.variants):
            yield domain_outliers.vary(rng, picture)


def _outliers(rows: Sequence[Row], s: DomainTraining) -> Iterator[Image.Image]:
    for row in rows:
        rng = numpy_rng(_seed(s.seed, "swap", row.id))
        picture = _readable(row)
        if picture is None or not features.is_coloured(picture):
            continue
        for n, order in enumerate(rng.permutation(len(domain_outliers.SWAPS))[: s.swaps]):
            swapped = domain_outliers.swap_channels(picture, domain_outliers.SWAPS[order])
            yield domain_outliers.vary(rng, swapped) if n else swapped
    for n in range(s.outliers):
        rng = numpy_rng(_seed(s.seed, "outlier", n))
        yield domain_outliers.outlier(rng)


def _seed(seed: int, what: str, key: object) -> int:
    return seeded_int(seed, what, key, joint=":", bits=64)


def _readable(row: Row) -> Image.Image | None:
    try:
        picture = load_image(row.images[0])
    except UserError:
        return None  # reported when the features were computed
    picture.thumbnail((512, 512))
    return picture
