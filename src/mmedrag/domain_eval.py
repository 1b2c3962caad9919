"""``domain eval``: accuracy, calibration, and whether *unknown* is known.

Place in the picture: beside ``domain.py``.

Public function (stable)::

    evaluate_domain(model, data, split="test", outliers=True, leave_one_out=True) -> dict
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag import domain_features, domain_outliers
from mmedrag.domain import DomainModel, embed, standardise
from mmedrag.images import apply_noise, load_image
from mmedrag.types import UNKNOWN, DataFolder, Noise, UserError

# pictures inside scikit-image and scikit-learn that show nothing medical
EVERYDAY = {
    "skimage": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "chessboard_GRAY.png",
        "chessboard_RGB.png", "clock_motion.png", "coffee.png", "coins.png", "color.png",
        "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "logo.png", "moon.png",
        "motorcycle_left.png", "motorcycle_right.png", "page.png", "rocket.jpg", "text.png",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}  # fmt: skip
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def evaluate_domain(
    model: DomainModel,
    data: Sequence[DataFolder],
    split: str = "test",
    outliers: bool = True,
    leave_one_out: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics over the pictures of ``split`` (each once) whose domain the data states.

    Returns:
        ``n`` · ``accuracy`` (called unknown counts as wrong) · ``accuracy_forced`` (the best
        label, unknown or not) · ``recall`` per domain · ``lost`` (share called unknown) ·
        ``ece`` of the forced label's confidence (15 bins) · ``unknown``: per kind of outlier
        {n, flagged, auroc} and ``all`` · ``leave_one_source_out``: source -> accuracy of a head
        that never saw it, None where it is its domain's only source.
    """
    from mmedrag.train_domain import features_of, labelled_rows

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
    right = forced == labels
    result: dict[str, Any] = {
        "n": len(labels),
        "unreadable": len(rows) - len(good),
        "accuracy": _share(answer == labels),
        "accuracy_forced": _share(right),
        "recall": {d: _share(answer[labels == d] == d) for d in sorted(set(labels))},
        "lost": _share(lost),
        "ece": round(calibration_error(np.exp(logits).max(axis=1), right), 6),
        "confusion": _confusion(labels, answer),
    }
    if outliers and threshold is not None:
        result["unknown"] = _outliers(model, [r.images[0] for r in good], known, seed)
    if leave_one_out:
        result["leave_one_source_out"] = leave_one_source_out(model, data)
    return result


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017)."""
    at = np.minimum((confidence * bins).astype(int), bins - 1)
    parts = [at == b for b in range(bins)]
    gaps = [abs(confidence[p].mean() - right[p].mean()) * p.mean() for p in parts if p.any()]
    return float(sum(gaps))


def _outliers(
    model: DomainModel, paths: Sequence[Path], known: np.ndarray, seed: int
) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    kinds: dict[str, list[Image.Image]] = {
        "noise": [_noise(path, n, seed) for n, path in enumerate(paths[:50])],
        "blank": [_blank(n, seed) for n in range(50)],
        "channel_swap": _swapped(paths),
        "everyday": everyday(),
    }
    out: dict[str, Any] = {}
    flagged: list[bool] = []
    every: list[float] = []
    for kind, pictures in kinds.items():
        if not pictures:
            out[kind] = {"n": 0, "flagged": None, "auroc": None}
            continue
        features, _ = embed(pictures, model.encoder, model.config["statistics"])
        scores = model.scores(features)[1]
        caught = scores < model.config["threshold"]
        truth = np.repeat([1, 0], [len(known), len(scores)])
        out[kind] = {
            "n": len(scores),
            "flagged": _share(caught),
            "auroc": round(float(roc_auc_score(truth, np.concatenate([known, scores]))), 6),
        }
        flagged += caught.tolist()
        every += scores.tolist()
    truth = np.repeat([1, 0], [len(known), len(every)])
    auroc = roc_auc_score(truth, np.concatenate([known, every]))
    out["all"] = {"n": len(every), "flagged": _share(np.array(flagged)), "auroc": round(auroc, 6)}
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


def _blank(number: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed * 1000 + number)
    colour = rng.integers(0, 256, 3) if number % 2 else np.repeat(rng.integers(0, 256), 3)
    return Image.new("RGB", (128, 128), tuple(int(v) for v in colour))


def _swapped(paths: Sequence[Path]) -> list[Image.Image]:
    out = []
    for path in paths:
        picture = load_image(path)
        if domain_features.is_coloured(picture):
            picture.thumbnail((512, 512))
            out += [domain_outliers.swap_channels(picture, o) for o in domain_outliers.SWAPS]
    return out


def leave_one_source_out(
    model: DomainModel, data: Sequence[DataFolder]
) -> dict[str, dict[str, Any] | None]:
    """Accuracy on each source of a head trained on all the others (same features, all splits).

    None for a source that is the only one of its domain: the head cannot know that domain.
    """
    from mmedrag.domain_fit import DomainTraining, fit_head
    from mmedrag.train_domain import features_of, labelled_rows

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
        out[source] = {"n": int(held.sum()), "accuracy": _share(right)}
    return out


def _share(values: np.ndarray) -> float:
    return round(float(np.mean(values)), 6)


def _confusion(truth: np.ndarray, answer: np.ndarray) -> Mapping[str, dict[str, int]]:
    return {
        d: dict(sorted(Counter(answer[truth == d].tolist()).items())) for d in sorted(set(truth))
    }
