"""d = F(x_v): which domain an image belongs to, or none that was trained (paper §3.1).

Place in the picture: the first stage. A linear head on frozen features (encoder and plain
picture statistics), its probabilities calibrated by one temperature; beside it a boosted-tree
score that tells the training pictures from everything else, with a threshold fitted on
validation pictures. Domains come from the data. Folder::

    MODEL/config.json        labels, temperature, threshold, encoder, notice, metrics
    MODEL/head.safetensors   the head's and the trees' arrays
    MODEL/encoder/           a copy of the encoder, when it is small and not a shipped one
    MODEL/README.md, train_ids.jsonl

Public functions (stable)::

    open_domain(path, device=None) -> DomainModel       # path or "embedded:domain"
    DomainModel.identify(images) -> list[Domain]        # labels, notice
    predict_domain(data, model, split=None) -> list[dict]     # rows of `domain predict`
    mmedrag.evaluation.of_domain.evaluate_domain(model, data, split="test", ...) -> dict
    mmedrag.domain.train.train_domain(data, out, encoder=..., ...) -> dict
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.domain.features import VERSION, statistics
from mmedrag.images import load_image
from mmedrag.records import UNKNOWN, Domain, Encoder, Preparing, UserError
from mmedrag.runtime import DataFolder, write_bytes, write_json

BATCH = 128
Arrays = dict[str, np.ndarray]


@dataclass
class DomainModel:
    """A :class:`~mmedrag.records.protocols.DomainIdentifier`.

    ``arrays``: ``mean``, ``scale`` [d] (standardisation), ``weight`` [K, d], ``bias`` [K]; with
    trees also ``feature``, ``left``, ``right`` int32 and ``threshold``, ``value`` float32, all
    [trees, nodes], and ``start`` [1]. ``config`` is config.json; ``by`` says in a trace which
    model it is.
    """

    config: dict[str, Any]
    arrays: Arrays
    encoder: Encoder | None = None
    by: str = "model"

    @property
    def labels(self) -> list[str]:
        return list(self.config["labels"])

    @property
    def notice(self) -> str | None:
        """What users of this model's answers have to know (such as: benchmark images only)."""
        return self.config.get("notice")

    def identify(self, images: Sequence[Sequence[Path]]) -> list[Domain]:
        """One result per example; the views of an example are averaged.

        ``scores`` are calibrated probabilities given that the picture is of a known domain. A
        label of ``unknown`` carries its ``reason``: out of the training data, or unreadable.
        """
        paths = list(dict.fromkeys(path for views in images for path in views))
        features, errors = embed(paths, self.encoder, self.config["statistics"])
        at = {path: n for n, path in enumerate(path for path in paths if path not in errors)}
        logits, known = self.scores(features)
        results = []
        for views in images:
            bad = next((errors[path] for path in views if path in errors), None)
            rows = [at[path] for path in views if path in at]
            if bad or not rows:
                results.append(_unknown(bad or "no image", None, None))
            else:
                results.append(self._decide(logits[rows], known[rows]))
        return results

    def scores(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Calibrated log-probabilities [n, K] and the known-ness score [n] (higher: known)."""
        a = self.arrays
        z = standardise(features, a)
        logits = (z @ a["weight"].T + a["bias"]) / self.config["temperature"]
        logits = logits - logits.max(axis=1, keepdims=True)
        logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        if "feature" in a:
            return logits, tree_scores(z, a)
        return logits, logits.max(axis=1, initial=-np.inf)  # zero-shot: the best label's own

    def _decide(self, logits: np.ndarray, known: np.ndarray) -> Domain:
        chances = np.exp(logits).mean(axis=0)
        scores = {label: round(float(p), 6) for label, p in zip(self.labels, chances, strict=True)}
        score, threshold = float(known.mean()), self.config["threshold"]
        if threshold is not None and score < threshold:
            reason = f"unlike the training pictures (score {score:.3f} < {threshold:.3f})"
            if self.notice:
                reason += f"; {self.notice}"
            return _unknown(reason, 1 / (1 + np.exp(score - threshold)), scores)
        best = int(chances.argmax())
        return Domain(label=self.labels[best], confidence=scores[self.labels[best]], scores=scores)

    def save(self, path: str | Path) -> None:
        """Write config.json and head.safetensors (the encoder is not copied here)."""
        from safetensors.numpy import save

        folder = Path(path)
        kept = {k: np.ascontiguousarray(v) for k, v in sorted(self.arrays.items())}
        write_bytes(folder / "head.safetensors", save(kept))
        write_json(folder / "config.json", self.config, sort_keys=True)


def _unknown(reason: str, confidence: float | None, scores: dict[str, float] | None) -> Domain:
    sure = None if confidence is None else round(float(confidence), 6)
    return Domain(label=UNKNOWN, confidence=sure, scores=scores or {}, reason=reason)


def open_domain(
    path: str | Path, device: str | None = None, encoder: str | Encoder | None = None
) -> DomainModel:
    """Load a domain model folder (or ``embedded:domain``).

    Args:
        encoder: that it was trained with, where that is neither a shipped one nor in its folder
            (a folder names no code and nothing outside of itself).

    Raises:
        UserError: no such model, made by another version, or its encoder was exchanged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if str(path).startswith("embedded"):
        from mmedrag import embedded

        path = embedded.path(str(path).partition(":")[2] or "domain")
    folder = Path(path)
    for name in ("config.json", "head.safetensors"):
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name}: a link, expected a file of the model itself")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        arrays = load_file(folder / "head.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: no domain model here: {str(error)[:200]}") from None
    missing = {"labels", "temperature", "threshold", "statistics", "encoder"} - set(config)
    if missing or not {"mean", "scale", "weight", "bias"} <= set(arrays):
        raise UserError(f"{folder}: not a domain model, config.json lacks {sorted(missing)}")
    if config["statistics"] not in (VERSION, 0):
        raise UserError(
            f"{folder}: made with picture statistics {config['statistics']}, expected {VERSION}; "
            "train it again"
        )
    if config["encoder"] is None:
        encoder = None
    else:
        from mmedrag.retrieval.encoders import encoder_of_folder, load_encoder

        spec = str(config["encoder"]["spec"])
        if spec == "encoder":
            spec = "inside:encoder"
        given = encoder or encoder_of_folder(spec, folder, "--domain-encoder")
        encoder = load_encoder(given, device) if isinstance(given, str) else given
        if encoder.fingerprint != config["encoder"]["fingerprint"]:
            raise UserError(f"{folder}: encoder {spec} is not the one it was trained with")
    return DomainModel(config, arrays, encoder)


# --- features ----------------------------------------------------------------------------------


def embed(
    pictures: Iterable[Path | Image.Image], encoder: Encoder | None, with_statistics: int | bool
) -> tuple[np.ndarray, dict[Any, str]]:
    """float32 [readable, d]: encoder features (times sqrt(dim)), then statistics; and errors.

    Pictures may be a generator; files are decoded in threads while the encoder runs, and only
    a few batches are in memory at a time.
    """
    errors: dict[Any, str] = {}
    blocks: list[np.ndarray] = []
    prepare = encoder.prepare if isinstance(encoder, Preparing) else (lambda picture: picture)

    def read(item: Path | Image.Image) -> Any:
        try:
            picture = item if isinstance(item, Image.Image) else load_image(item)
        except UserError as error:
            return item, str(error)
        plain = statistics(picture) if with_statistics else np.zeros(0, np.float32)
        return plain, (prepare(picture) if encoder is not None else None)

    with ThreadPoolExecutor(max_workers=2) as pool:
        for batch in _ahead(pool, read, pictures):
            for item, error in [made for made in batch if isinstance(made[1], str)]:
                errors[item] = error
            batch = [made for made in batch if not isinstance(made[1], str)]
            if not batch:
                continue
            block = np.stack([made[0] for made in batch])
            if encoder is not None:
                seen = encoder.images([made[1] for made in batch]) * np.sqrt(encoder.dim)
                block = np.concatenate([seen, block], axis=1)
            blocks.append(block.astype(np.float32))
    return (np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)), errors


def _ahead(pool: ThreadPoolExecutor, read: Any, pictures: Iterable[Any]) -> Iterator[list[Any]]:
    waiting: list[list[Any]] = [[]]
    for picture in pictures:
        waiting[-1].append(pool.submit(read, picture))
        if len(waiting[-1]) == BATCH:
            waiting.append([])
        if len(waiting) > 2:
            yield [future.result() for future in waiting.pop(0)]
    for batch in waiting:
        yield [future.result() for future in batch]


def standardise(features: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Zero mean and unit spread of the training pictures; far-out values are clipped at 6."""
    if not len(features):
        return np.zeros((0, len(arrays["mean"])), np.float32)
    return np.clip((features - arrays["mean"]) / arrays["scale"], -6, 6)


def tree_scores(z: np.ndarray, arrays: Arrays) -> np.ndarray:
    """Sum of the leaves that each row reaches (gradient boosting, Friedman 2001)."""
    total = np.full(len(z), float(arrays["start"][0]))
    names = ("feature", "threshold", "left", "right", "value")
    for feature, threshold, left, right, value in zip(*(arrays[n] for n in names), strict=True):
        node = np.zeros(len(z), dtype=np.int64)
        inner = left[node] >= 0
        while inner.any():
            rows = np.flatnonzero(inner)
            here = node[rows]
            go_left = z[rows, feature[here]] <= threshold[here]
            node[rows] = np.where(go_left, left[here], right[here])
            inner = left[node] >= 0
        total += value[node]
    return total


def predict_domain(
    data: DataFolder, model: DomainModel, split: str | None = None
) -> list[dict[str, Any]]:
    """Rows ``{id, label, confidence, scores, reason?, domain?}`` of every row with an image."""
    rows: dict[str, Any] = {r.id: r for r in data.corpus(split) if r.images}
    rows |= {e.id: e for e in data.examples(split) if e.images}
    found = model.identify([row.images for row in rows.values()])
    return [
        {
            "id": row.id,
            **({"domain": row.domain} if row.domain else {}),
            **domain.model_dump(mode="json"),
        }
        for row, domain in zip(rows.values(), found, strict=True)
    ]
