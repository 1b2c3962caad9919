"""``train domain``: a calibrated head on an encoder's features, with *unknown*.

Place in the picture: makes what ``identify`` loads. Steps: where asked, fine-tuning of the
encoder's picture side (``tune``); features of the training pictures; a linear softmax head (L2,
class-balanced); one temperature on validation pictures (Guo et al. 2017); boosted trees that tell
training pictures from outliers (channel swaps of them, and drawn pictures, ``outliers``); a
threshold from validation pictures and outliers of their own. The fits are in ``fit``.

Public functions (stable)::

    train_domain(data, out, encoder="embedded", settings=DomainTraining(), device=None,
                 copy_encoder=None, notice=None) -> dict       # metrics, as in config.json
    zero_shot_domain(prompts, out, encoder, device=None) -> dict
    zero_shot_from(file, out, encoder, device=None) -> dict       # prompts of a TOML file
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.domain import features as domain_features
from mmedrag.domain.fit import DomainTraining, fit_head, fit_temperature, fit_threshold, fit_unknown
from mmedrag.domain.identify import Arrays, DomainModel, embed, standardise
from mmedrag.records import Encoder, Reopenable, Row, UserError
from mmedrag.retrieval.encoders import load_encoder
from mmedrag.runtime import (
    PART,
    DataFolder,
    Figures,
    ModelCard,
    counted,
    read_toml,
    seeded_share,
    write_train_ids,
)

__all__ = ["DomainTraining", "train_domain", "zero_shot_domain", "zero_shot_from"]

log = logging.getLogger(__name__)
COPY_LIMIT = 64 << 20  # an encoder folder up to this size is copied into the model


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
        encoder: name or folder of an encoder, frozen unless ``settings.fine_tune`` (it is then
            given by name); None uses the picture statistics alone.
        copy_encoder: None copies a small local encoder folder into the model.
        notice: a sentence that the model gives with pictures it does not know.

    Returns:
        The written ``metrics``: counts, and accuracy and log-loss on the validation pictures.

    Raises:
        UserError: fewer than two domains, or no readable picture of one.
    """
    settings = settings or DomainTraining()
    path = Path(out)
    _check_ours(path)
    if encoder is None and not settings.statistics:
        raise UserError("train domain: neither an encoder nor picture statistics to look at")
    train, val = split_rows(data, settings.seed)
    train = _limited(train, settings)
    labels = sorted({str(row.domain) for row in train})
    if len(labels) < 2:
        there = counted(row for one in data for row in one.corpus() if row.images)
        raise UserError(
            f"train domain: found domains {labels} in split train, expected at least two; pictures "
            f"there are: {there}"
        )
    count = Counter(str(row.domain) for row in train)
    per = ", ".join(f"{count[label]} {label}" for label in labels)
    log.info("train domain: %d pictures of split train (%s)", len(train), per)
    log.info("train domain: %d pictures of split val to calibrate on", len(val))
    if settings.fine_tune:
        if not isinstance(encoder, str):
            raise UserError("train domain: fine-tuning needs an encoder's name or folder")
        from mmedrag.domain.tune import fine_tune

        encoder = str(fine_tune(encoder, train, path / "encoder", settings, device))
    model = load_encoder(encoder, device) if isinstance(encoder, str) else encoder

    x, y, _ = features_of(train, model, settings.statistics)
    xv, yv, _ = features_of(val, model, settings.statistics)
    if len(xv) < 10:
        raise UserError(f"train domain: {len(xv)} validation pictures, expected at least 10")
    arrays: Arrays = {"mean": x.mean(axis=0), "scale": x.std(axis=0) + 1e-3}
    arrays |= fit_head(standardise(x, arrays), y, labels, settings)
    config: dict[str, Any] = {
        "format": 1,
        "kind": "trained",
        "labels": labels,
        "temperature": 1.0,
        "threshold": None,
        "statistics": domain_features.VERSION if settings.statistics else 0,
        "encoder": None,
        "notice": notice,
        "settings": asdict(settings),
    }
    head = DomainModel(config, arrays, model)
    config["temperature"] = fit_temperature(head, xv, yv)
    arrays |= fit_unknown(train, standardise(x, arrays), arrays, model, settings)
    logits, known = head.scores(xv)
    config["threshold"], flagged = fit_threshold(head, known, val, settings)
    right = np.array([labels[i] for i in logits.argmax(axis=1)]) == yv
    chosen = [labels.index(label) if label in labels else 0 for label in yv]
    config["metrics"] = {
        "train_images": len(x),
        "val_images": len(xv),
        "per_domain": dict(sorted(Counter(y).items())),
        "val_accuracy": round(float(right.mean()), 4),
        "val_log_loss": round(float(-logits[np.arange(len(yv)), chosen].mean()), 4),
        "val_kept": round(float((known >= config["threshold"]).mean()), 4),
        "val_outliers_flagged": round(flagged, 4),
    }
    path.mkdir(parents=True, exist_ok=True)
    config["encoder"] = keep_encoder(model, path, copy_encoder)
    head.save(path)
    write_train_ids(path / "train_ids.jsonl", train)
    _card(config).write(path)
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
    _check_ours(Path(out))
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
        "format": 1,
        "kind": "zero-shot",
        "labels": labels,
        "temperature": temperature,
        "threshold": None,
        "statistics": 0,
        "encoder": keep_encoder(model, path, None),
        "prompts": {label: list(prompts[label]) for label in labels},
        "metrics": {},
    }
    DomainModel(config, arrays, model).save(path)
    write_train_ids(path / "train_ids.jsonl", [])
    _card(config).write(path)
    return {"labels": labels, "kind": "zero-shot"}


def zero_shot_from(
    file: Path, out: str | Path, encoder: str, device: str | None = None
) -> dict[str, Any]:
    """:func:`zero_shot_domain` with the prompts of a TOML file: ``label = ["text", ...]``.

    Raises:
        UserError: not such a file, or an encoder without a text side.
    """
    prompts = read_toml(file)
    for label, texts in prompts.items():
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise UserError(f"{file}: {label}: expected a list of texts")
    if encoder == "none":
        raise UserError("train domain: --prompts needs an encoder, got none")
    return zero_shot_domain(prompts, out, encoder, device)


# --- data --------------------------------------------------------------------------------------


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
        held = [seeded_share(seed, row.patient or row.id) < 0.15 for row in train]
        val = [row for row, out in zip(train, held, strict=True) if out]
        train = [row for row, out in zip(train, held, strict=True) if not out]
    return train, val


def _limited(rows: list[Row], settings: DomainTraining) -> list[Row]:
    kept: Counter[str | None] = Counter()
    chosen = []
    for row in sorted(rows, key=lambda r: seeded_share(settings.seed, r.id)):
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


# --- folder ------------------------------------------------------------------------------------


def _check_ours(path: Path) -> None:
    """A domain model goes into a new folder, or on where one was killed before its config.json.

    Raises:
        UserError: the folder holds something else, or a model.
    """
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if {n for n in names if not PART.fullmatch(n)} - {"encoder", "head.safetensors"}:
        raise UserError(f"{path}: not empty, expected a new folder; choose another --out")


def keep_encoder(model: Encoder | None, path: Path, copy: bool | None) -> dict[str, Any] | None:
    """Config entry of the encoder; a small local folder is copied beside the head."""
    if model is None:
        return None
    spec = model.spec if isinstance(model, Reopenable) else ""
    folder = Path(spec)
    local = bool(spec) and folder.is_dir()
    if local and folder == path / "encoder":  # a fine-tuned one is there already
        spec, copy = "encoder", False
    elif copy is None:
        copy = local and sum(f.stat().st_size for f in folder.glob("*")) <= COPY_LIMIT
    if copy:
        if not local:
            raise UserError(f"train domain: encoder {spec!r} is not a folder, it cannot be copied")
        shutil.copytree(folder, path / "encoder", dirs_exist_ok=True)
        spec = "encoder"
    return {"spec": spec, "fingerprint": model.fingerprint, "dim": model.dim}


def _card(config: dict[str, Any]) -> ModelCard:
    return ModelCard(
        title="Domain model",
        what=f"Labels: {', '.join(config['labels'])}, or unknown. Kind: {config['kind']}.",
        facts=[config["notice"]] if config.get("notice") else [],
        figures=[Figures("Measured:", ("what", "value"), _figures(config["metrics"]))]
        if config["metrics"]
        else [],
        settings=config.get("settings", {}),
    )


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Name and value a line; of values by domain one line each."""
    rows: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        inner = value.items() if isinstance(value, Mapping) else [(None, value)]
        rows += [(name if key is None else f"{name}, {key}", each) for key, each in inner]
    return rows
