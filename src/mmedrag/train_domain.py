"""``train domain``: a calibrated head on frozen features, with *unknown*.

Place in the picture: makes what ``domain.py`` loads. Steps: features of the training pictures;
a linear softmax head (L2, class-balanced); one temperature on validation pictures (Guo et al.
2017); boosted trees that tell training pictures from outliers (channel swaps of them, and drawn
pictures, ``domain_outliers``); the threshold that keeps ``keep`` of the validation pictures.

Public functions (stable)::

    train_domain(data, out, encoder="embedded", settings=DomainTraining(), device=None,
                 copy_encoder=None, notice=None) -> dict       # metrics, as in config.json
    zero_shot_domain(prompts, out, encoder, device=None) -> dict
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag import domain_features, domain_outliers
from mmedrag.domain import Arrays, DomainModel, embed, standardise
from mmedrag.encoders import load_encoder
from mmedrag.images import load_image
from mmedrag.protocols import Encoder
from mmedrag.types import DataFolder, Example, Reference, UserError

log = logging.getLogger(__name__)
COPY_LIMIT = 64 << 20  # an encoder folder up to this size is copied into the model


@dataclass(frozen=True)
class DomainTraining:
    """Settings of ``train domain``.

    Attributes:
        per_domain: at most so many training pictures per domain, drawn by ``seed``.
        variants: varied copies of each training picture (known, for the unknown score).
        swaps: channel-swapped copies of each coloured training picture (unknown).
        outliers: drawn pictures (unknown).
        keep: share of validation pictures that the threshold keeps as known.
        strength: inverse L2 weight of the head. ``trees``, ``depth``: of the unknown score.
        statistics: use the plain picture statistics beside the encoder.
    """

    per_domain: int = 1000
    variants: int = 2
    swaps: int = 3
    outliers: int = 2500
    keep: float = 0.99
    strength: float = 0.05
    trees: int = 300
    depth: int = 4
    statistics: bool = True
    seed: int = 0


def train_domain(
    data: Sequence[DataFolder],
    out: str | Path,
    encoder: str | Encoder | None = "embedded",
    settings: DomainTraining | None = None,
    device: str | None = None,
    copy_encoder: bool | None = None,
    notice: str | None = None,
) -> dict[str, Any]:
    """Train on split ``train``, calibrate on ``val`` (without one: 15 % of the patients).

    Args:
        encoder: name or folder of a frozen encoder; None uses the picture statistics alone.
        copy_encoder: None copies a small local encoder folder into the model.
        notice: a sentence that the model gives with pictures it does not know.

    Returns:
        The written ``metrics``: counts, and accuracy and log-loss on the validation pictures.

    Raises:
        UserError: fewer than two domains, or no readable picture of one.
    """
    settings = settings or DomainTraining()
    path = Path(out)
    model = load_encoder(encoder, device) if isinstance(encoder, str) else encoder
    if model is None and not settings.statistics:
        raise UserError("train domain: neither an encoder nor picture statistics to look at")
    train, val = split_rows(data, settings.seed)
    train = _limited(train, settings)
    labels = sorted({str(row.domain) for row in train})
    if len(labels) < 2:
        raise UserError(f"train domain: found domains {labels}, expected at least two")

    x, y, _ = features_of(train, model, settings.statistics)
    xv, yv, _ = features_of(val, model, settings.statistics)
    if len(xv) < 10:
        raise UserError(f"train domain: {len(xv)} validation pictures, expected at least 10")
    arrays: Arrays = {"mean": x.mean(axis=0), "scale": x.std(axis=0) + 1e-3}
    arrays |= fit_head(standardise(x, arrays), y, labels, settings)
    config: dict[str, Any] = {
        "format": 1, "kind": "trained", "labels": labels, "temperature": 1.0, "threshold": None,
        "statistics": domain_features.VERSION if settings.statistics else 0,
        "encoder": None, "notice": notice, "settings": asdict(settings),
    }  # fmt: skip
    head = DomainModel(config, arrays, model)
    config["temperature"] = fit_temperature(head, xv, yv)
    arrays |= fit_unknown(train, standardise(x, arrays), arrays, model, settings)
    logits, known = head.scores(xv)
    config["threshold"] = round(float(np.quantile(known, 1 - settings.keep)), 6)
    right = np.array([labels[i] for i in logits.argmax(axis=1)]) == yv
    chosen = [labels.index(label) if label in labels else 0 for label in yv]
    config["metrics"] = {
        "train_images": len(x), "val_images": len(xv),
        "per_domain": dict(sorted(Counter(y).items())),
        "val_accuracy": round(float(right.mean()), 4),
        "val_log_loss": round(float(-logits[np.arange(len(yv)), chosen].mean()), 4),
        "val_kept": round(float((known >= config["threshold"]).mean()), 4),
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    config["encoder"] = keep_encoder(model, path, copy_encoder)
    head.save(path)
    write_train_ids(path / "train_ids.jsonl", train)
    (path / "README.md").write_text(_card(config), encoding="utf-8")
    return config["metrics"]


def zero_shot_domain(
    prompts: Mapping[str, Sequence[str]],
    out: str | Path,
    encoder: str | Encoder,
    device: str | None = None,
    temperature: float = 0.01,
) -> dict[str, Any]:
    """A domain model without training: each label is the mean embedding of its prompts.

    There is nothing to fit a threshold on, so nothing is called unknown.
    """
    model = load_encoder(encoder, device) if isinstance(encoder, str) else encoder
    labels = sorted(prompts)
    if len(labels) < 2 or not all(prompts.values()):
        raise UserError("domain: prompts: expected at least two labels with one prompt each")
    means = np.stack([model.texts(list(prompts[label])).mean(axis=0) for label in labels])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    size = np.sqrt(model.dim)  # embed() gives unit features times sqrt(dim)
    arrays = {
        "mean": np.zeros(model.dim, np.float32),
        "scale": np.ones(model.dim, np.float32),
        "weight": (means / size).astype(np.float32),
        "bias": np.zeros(len(labels), np.float32),
    }
    path = Path(out)
    path.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "format": 1, "kind": "zero-shot", "labels": labels, "temperature": temperature,
        "threshold": None, "statistics": 0, "encoder": keep_encoder(model, path, None),
        "prompts": {label: list(prompts[label]) for label in labels}, "metrics": {},
    }  # fmt: skip
    DomainModel(config, arrays, model).save(path)
    (path / "train_ids.jsonl").write_text("", encoding="utf-8")
    (path / "README.md").write_text(_card(config), encoding="utf-8")
    return {"labels": labels, "kind": "zero-shot"}


# --- data --------------------------------------------------------------------------------------

Row = Example | Reference


def labelled_rows(data: Sequence[DataFolder], split: str | None = None) -> list[Row]:
    """Rows with a picture and a domain, each picture once."""
    rows: list[Row] = [r for f in data for r in f.corpus(split)]
    rows += [e for f in data for e in f.examples(split)]
    first: dict[tuple[Path, ...], Row] = {}
    for row in rows:
        if row.images and row.domain:
            first.setdefault(tuple(row.images), row)
    return list(first.values())


def split_rows(data: Sequence[DataFolder], seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows; without a ``val`` split, 15 % of the training patients."""
    train, val = labelled_rows(data, "train"), labelled_rows(data, "val")
    if not val:
        held = [_share(f"{seed}:{row.patient or row.id}") < 0.15 for row in train]
        val = [row for row, out in zip(train, held, strict=True) if out]
        train = [row for row, out in zip(train, held, strict=True) if not out]
    return train, val


def _share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _limited(rows: list[Row], settings: DomainTraining) -> list[Row]:
    kept: Counter[str | None] = Counter()
    chosen = []
    for row in sorted(rows, key=lambda r: _share(f"{settings.seed}:{r.id}")):
        kept[row.domain] += 1
        if kept[row.domain] <= settings.per_domain:
            chosen.append(row)
    return chosen


def features_of(
    rows: Sequence[Row], model: Encoder | None, with_statistics: bool
) -> tuple[np.ndarray, np.ndarray, list[Row]]:
    """Features [n, d], labels [n] and the rows whose first view could be read."""
    features, errors = embed([row.images[0] for row in rows], model, with_statistics)
    for error in errors.values():
        log.warning("train domain: left out: %s", error)
    good = [row for row in rows if row.images[0] not in errors]
    return features, np.array([row.domain for row in good], dtype=object), good


# --- fits --------------------------------------------------------------------------------------


def fit_head(z: np.ndarray, y: np.ndarray, labels: list[str], settings: DomainTraining) -> Arrays:
    """Multinomial logistic regression, classes weighted equally."""
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression(C=settings.strength, class_weight="balanced", max_iter=2000)
    fit.fit(z, np.array([labels.index(label) for label in y]))
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
    from sklearn.ensemble import GradientBoostingClassifier

    varied, _ = embed(_varied(rows, s), model, s.statistics)
    unknown, _ = embed(_outliers(rows, s), model, s.statistics)
    inside = np.concatenate([z, standardise(varied, arrays)]) if len(varied) else z
    outside = standardise(unknown, arrays)
    x = np.concatenate([inside, outside])
    y = np.repeat([1, 0], [len(inside), len(outside)])
    weight = np.where(y == 1, len(y) / (2 * len(inside)), len(y) / (2 * max(len(outside), 1)))
    trees = GradientBoostingClassifier(
        n_estimators=s.trees, max_depth=s.depth, subsample=0.5, max_features="sqrt",
        random_state=s.seed,
    ).fit(x, y, sample_weight=weight)  # fmt: skip
    found = tree_arrays(trees)
    offset = trees.decision_function(x[:1]) - _raw(trees, x[:1])
    return {**found, "start": offset.astype(np.float32)}


def _raw(trees: Any, x: np.ndarray) -> np.ndarray:
    """Sum of the trees without the starting value."""
    return np.sum([trees.learning_rate * t[0].predict(x) for t in trees.estimators_], axis=0)


def tree_arrays(trees: Any) -> Arrays:
    """scikit-learn's fitted trees as padded plain arrays [trees, nodes]; leaves have left -1."""
    parts = [t[0].tree_ for t in trees.estimators_]
    nodes = max(t.node_count for t in parts)
    shape = (len(parts), nodes)
    out: Arrays = {
        "feature": np.zeros(shape, np.int32), "left": np.full(shape, -1, np.int32),
        "right": np.full(shape, -1, np.int32), "threshold": np.zeros(shape, np.float32),
        "value": np.zeros(shape, np.float32),
    }  # fmt: skip
    for n, tree in enumerate(parts):
        size = tree.node_count
        out["feature"][n, :size] = np.maximum(tree.feature, 0)
        out["left"][n, :size], out["right"][n, :size] = tree.children_left, tree.children_right
        out["threshold"][n, :size] = tree.threshold
        out["value"][n, :size] = trees.learning_rate * tree.value[:, 0, 0]
    return out


def _varied(rows: Sequence[Row], s: DomainTraining) -> Iterator[Image.Image]:
    for row in rows:
        rng = np.random.default_rng(_seed(s.seed, "vary", row.id))
        picture = _readable(row)
        if picture is None:
            continue
        for _ in range(s.variants):
            yield domain_outliers.vary(rng, picture)


def _outliers(rows: Sequence[Row], s: DomainTraining) -> Iterator[Image.Image]:
    for row in rows:
        rng = np.random.default_rng(_seed(s.seed, "swap", row.id))
        picture = _readable(row)
        if picture is None or not domain_features.is_coloured(picture):
            continue
        for n, order in enumerate(rng.permutation(len(domain_outliers.SWAPS))[: s.swaps]):
            swapped = domain_outliers.swap_channels(picture, domain_outliers.SWAPS[order])
            yield domain_outliers.vary(rng, swapped) if n else swapped
    for n in range(s.outliers):
        rng = np.random.default_rng(_seed(s.seed, "outlier", str(n)))
        yield domain_outliers.outlier(rng)


def _seed(seed: int, what: str, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{what}:{key}".encode()).digest()[:8], "big")


def _readable(row: Row) -> Image.Image | None:
    try:
        picture = load_image(row.images[0])
    except UserError:
        return None  # reported when the features were computed
    picture.thumbnail((512, 512))
    return picture


# --- folder ------------------------------------------------------------------------------------


def keep_encoder(model: Encoder | None, path: Path, copy: bool | None) -> dict[str, Any] | None:
    """Config entry of the encoder; a small local folder is copied beside the head."""
    if model is None:
        return None
    spec = getattr(model, "spec", "")
    folder = Path(spec)
    local = bool(spec) and folder.is_dir()
    if copy is None:
        copy = local and sum(f.stat().st_size for f in folder.glob("*")) <= COPY_LIMIT
    if copy:
        if not local:
            raise UserError(f"train domain: encoder {spec!r} is not a folder, it cannot be copied")
        shutil.copytree(folder, path / "encoder", dirs_exist_ok=True)
        spec = "encoder"
    return {"spec": spec, "fingerprint": model.fingerprint, "dim": model.dim}


def write_train_ids(path: Path, rows: Sequence[Row]) -> None:
    """id, patient and sha256 of the image file of every training row (for leakage checks)."""
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        for row in sorted(rows, key=lambda r: r.id):
            for image in row.images[:1]:
                digest = hashlib.sha256(image.read_bytes()).hexdigest() if image.exists() else None
                entry = {"id": row.id, "patient": row.patient, "image_sha256": digest}
                handle.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _card(config: dict[str, Any]) -> str:
    metrics = "\n".join(f"- {name}: {value}" for name, value in config["metrics"].items())
    return (
        "# Domain model\n\n"
        f"Labels: {', '.join(config['labels'])}, or unknown. Kind: {config['kind']}.\n\n"
        f"{config.get('notice') or ''}\n\n{metrics}\n\n"
        "Research software, not a medical device. `config.json` holds every setting, "
        "`train_ids.jsonl` what it was trained on.\n"
    )
