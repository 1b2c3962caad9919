"""``domain eval``: accuracy, calibration, and whether *unknown* is known.

Place in the picture: beside ``domain.identify``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.domain import (
    DomainModel,
    embed,
    features as domain_features,
    outliers as domain_outliers,
    standardise,
)
from mmedrag.evaluation.metrics.questions import calibration_error, proportion
from mmedrag.evaluation.metrics.statistics import AnyStat, RankStat, cells
from mmedrag.images import apply_noise, load_image
from mmedrag.records import UNKNOWN, Noise, Row, UserError
from mmedrag.runtime import DataFolder, numpy_rng

# pictures inside scikit-image and scikit-learn that show nothing medical
EVERYDAY = {
    "skimage": """astronaut.png brick.png camera.png chelsea.png chessboard_GRAY.png
        chessboard_RGB.png clock_motion.png coffee.png coins.png color.png grass.png gravel.png
        horse.png hubble_deep_field.jpg logo.png moon.png motorcycle_left.png motorcycle_right.png
        page.png rocket.jpg text.png""".split(),
    "sklearn": ["china.jpg", "flower.jpg"],
}
CONFIDENCE_BINS = 15  # of the ECE (Guo et al. 2017)
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def evaluate_domain(
    model: DomainModel,
    data: Sequence[DataFolder],
    split: str = "test",
    outliers: bool = True,
    leave_one_out: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics over the pictures of ``split`` (each once) whose domain the data states, each as
    {value, low, high, n}: 95 % intervals from a bootstrap over patients.

    Returns:
        ``n`` · ``accuracy`` (called unknown counts as wrong) · ``accuracy_forced`` (the best
        label, unknown or not) · ``lost`` (share called unknown) · ``ece`` of the forced label's
        confidence (15 bins) · ``confusion``: domain -> answer -> share, its diagonal also as
        ``recall`` · ``unknown``: per kind of outlier and for ``all`` {flagged, auroc} ·
        ``leave_one_source_out``: source -> accuracy of a head that never saw it, None where it
        is its domain's only source.
    """
    from mmedrag.domain import features_of, labelled_rows

    rows = labelled_rows(data, split)
    with_statistics = bool(model.config["statistics"])
    features, labels, good = features_of(rows, model.encoder, with_statistics)
    if not len(features):
        raise UserError(f"domain eval: no pictures with a domain in split {split!r}")
    logits, known = model.scores(features)
    forced = np.array(model.labels)[logits.argmax(axis=1)]
    threshold = model.config["threshold"]
    lost = known < threshold if threshold is not None else np.zeros(len(known), dtype=bool)
    answer = np.where(lost, UNKNOWN, forced)
    right, confidence = forced == labels, np.exp(logits).max(axis=1)
    patients = [r.patient for r in good]
    stats: dict[str, AnyStat] = {
        "accuracy": proportion(answer == labels),
        "accuracy_forced": proportion(right),
        "lost": proportion(lost),
        "ece": calibration_error(confidence, right, CONFIDENCE_BINS),
    }
    answers = sorted({*answer, *labels})
    confusion = {}
    for domain in sorted(set(labels)):
        own = np.flatnonzero(labels == domain)
        shares = {name: proportion(answer[own] == name) for name in answers}
        confusion[domain] = cells(shares, [patients[i] for i in own], seed=seed)
    result: dict[str, Any] = {
        "n": len(labels),
        "unreadable": len(rows) - len(good),
        **cells(stats, patients, seed=seed),
        "recall": {domain: shares[domain] for domain, shares in confusion.items()},
        "confusion": confusion,
    }
    if outliers and threshold is not None:
        result["unknown"] = _outliers(model, good, known, seed)
    if leave_one_out:
        result["leave_one_source_out"] = leave_one_source_out(model, data, seed)
    return result


def _outliers(
    model: DomainModel, rows: Sequence[Row], known: np.ndarray, seed: int
) -> dict[str, Any]:
    """Share flagged and AUROC of known against unknown, per kind; an outlier made from a picture
    counts as its patient's."""
    kinds: dict[str, list[tuple[str | None, Image.Image]]] = {
        "noise": [(r.patient, _noise(r.images[0], n, seed)) for n, r in enumerate(rows[:50])],
        "blank": [(None, blank(n, seed)) for n in range(50)],
        "channel_swap": [(r.patient, p) for r in rows for p in _swapped(r.images[0])],
        "everyday": [(None, p) for p in everyday()],
    }
    scored = {}
    for kind, found in kinds.items():
        if found:
            features, _ = embed([p for _, p in found], model.encoder, model.config["statistics"])
            scored[kind] = (model.scores(features)[1], [who for who, _ in found])
    every = np.concatenate([scores for scores, _ in scored.values()])
    scored["all"] = (every, [who for _, owners in scored.values() for who in owners])
    out: dict[str, Any] = {}
    for kind in (*kinds, "all"):
        scores, owners = scored.get(kind, (np.empty(0), []))
        outlying = np.repeat([False, True], [len(known), len(scores)])
        joined = np.concatenate([known, scores])
        stats: dict[str, AnyStat] = {
            "flagged": proportion(joined < model.config["threshold"], outlying),
            "auroc": RankStat(joined, ~outlying, joined),
        }
        out[kind] = cells(stats, [*(r.patient for r in rows), *owners], seed=seed)
    return out


def everyday() -> list[Image.Image]:
    """Everyday pictures that scikit-image and scikit-learn carry (where they are installed)."""
    found = []
    for package, names in EVERYDAY.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent / _FOLDERS[package]
        found += [load_image(folder / name) for name in names if (folder / name).exists()]
    return found


def _noise(path: Path, number: int, seed: int) -> Image.Image:
    size = (64, 224, 336)[number % 3]
    kind = "gaussian_clip" if number % 2 else "additive"
    params = {} if number % 2 else {"sigma": 2.0}
    noise = Noise(kind=kind, seed=seed * 1000 + number, params=params)  # type: ignore[arg-type]
    return apply_noise(load_image(path), noise, size)


def blank(number: int, seed: int) -> Image.Image:
    """A picture of one colour; every other one is grey."""
    rng = numpy_rng(seed * 1000 + number)
    colour = rng.integers(0, 256, 3) if number % 2 else np.repeat(rng.integers(0, 256), 3)
    return Image.new("RGB", (128, 128), tuple(int(v) for v in colour))


def _swapped(path: Path) -> list[Image.Image]:
    picture = load_image(path)
    if not domain_features.is_coloured(picture):
        return []
    picture.thumbnail((512, 512))
    return [domain_outliers.swap_channels(picture, order) for order in domain_outliers.SWAPS]


def leave_one_source_out(
    model: DomainModel, data: Sequence[DataFolder], seed: int = 0
) -> dict[str, dict[str, Any] | None]:
    """Accuracy on each source of a head trained on all the others (same features, all splits).

    None for a source that is the only one of its domain: the head cannot know that domain.
    """
    from mmedrag.domain import DomainTraining, features_of, fit_head, labelled_rows

    rows = labelled_rows(data)
    features, labels, good = features_of(rows, model.encoder, bool(model.config["statistics"]))
    sources = np.array([r.source or "unnamed" for r in good], dtype=object)
    out: dict[str, dict[str, Any] | None] = {}
    for source in sorted(set(sources)):
        held = sources == source
        names = sorted(set(labels[~held]))
        if len(names) < 2 or not set(labels[held]) <= set(names):
            out[source] = None
            continue
        x = features[~held]
        arrays = {"mean": x.mean(axis=0), "scale": x.std(axis=0) + 1e-3}
        fit = fit_head(standardise(x, arrays), labels[~held], names, DomainTraining())
        logits = standardise(features[held], arrays) @ fit["weight"].T + fit["bias"]
        right = np.array(names)[logits.argmax(axis=1)] == labels[held]
        patients = [good[i].patient for i in np.flatnonzero(held)]
        out[source] = cells({"accuracy": proportion(right)}, patients, seed=seed)
    return out
