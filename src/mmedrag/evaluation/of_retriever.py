"""``retriever eval``: is the retriever better than chance, and are its references alike?

Place in the picture: beside ``retrieval.search``. Two questions over the rows of one split:

- *paired*: each picture's own report among all reports of the split (recall@k, MRR, nDCG);
- *gallery*: what retrieval from the training corpus returns, own patient excluded: how far the
  best reference's labels agree with the picture's, against random references, and hubness.

References are found by their texts or, with key "image", by their own pictures (then there is no
pairing to ask for, and agreement is also that of the five best). Beside every value stand chance
(computed), the same encoder with its pictures shuffled, and the same architecture untrained. All
have n and a 95 % interval (bootstrap over patients).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.evaluation.keywords import Keywords
from mmedrag.evaluation.metrics.questions import average
from mmedrag.evaluation.metrics.retrieval import chance, hubness
from mmedrag.evaluation.metrics.statistics import AnyStat, cells
from mmedrag.evaluation.of_references import reference_agreement
from mmedrag.records import Encoder, Reference, Truth, UserError
from mmedrag.retrieval import (
    NEAR,
    EmbeddingCache,
    ImageEmbeddings,
    embed_images,
    embed_texts,
    per_query,
    relevant,
)
from mmedrag.retrieval.encoders import load_encoder
from mmedrag.runtime import DataFolder, counted, numpy_rng

log = logging.getLogger(__name__)


def evaluate_retriever(
    data: Sequence[DataFolder],
    encoder: str | Encoder,
    domain: str | None = None,
    split: str | Sequence[str] = "test",
    gallery_split: str = "train",
    k: int = 10,
    untrained: bool = True,
    device: str | None = None,
    cache: Path | None = None,
    seed: int = 0,
    resamples: int = 2000,
    key: str = "text",
    keywords: Keywords | None = None,
) -> dict[str, Any]:
    """Every metric with its controls, each as {value, low, high, n}.

    Args:
        split: whose pictures ask; several splits ask together.
        key: what of the references they are compared with, "text" or "image".
        keywords: what the labeller of reports without ground truth looks for.

    Returns:
        ``paired``: metric -> {value, low, high, n, chance {…}, shuffled {…}, untrained {…}} ·
        ``agreement``: of the best reference -> {value, low, high, n, random {…},
        difference {…}}; with key "image" also {top5 {…}, shuffled {…}, untrained {…}} ·
        ``finding_agreement``: domain -> :class:`.of_references.Agreement` ·
        ``hubness``: metric of :func:`metrics.retrieval.hubness` -> {value, low, high, n} ·
        ``n``, ``gallery``, ``skipped`` · ``encoder``.

    Raises:
        UserError: fewer than two rows with picture and text.
    """
    splits = [split] if isinstance(split, str) else list(split)
    rows = [r for one in splits for r in rows_of(data, one, domain, key)]
    gallery = rows_of(data, gallery_split, domain, key)
    if len(rows) < 2:
        what = "picture and text" if key == "text" else "picture"
        raise UserError(
            f"retriever eval: {len(rows)} rows with {what} in split {'+'.join(splits)}, domain "
            f"{domain or 'any'}; there are: {counted(r for one in data for r in one.corpus())}"
        )
    log.info(
        "retriever eval: %d pictures of split %s ask among %d rows of split %s, domain %s",
        len(rows),
        "+".join(splits),
        len(gallery),
        gallery_split,
        domain or "any",
    )
    if not gallery:
        log.warning("no row of split %s to find: agreement is not measured", gallery_split)
    model = load_encoder(encoder, device) if isinstance(encoder, str) else encoder
    seen = EmbeddingCache(cache, model, "image")
    rows, found, skipped = _embedded(rows, model, seen)
    patients = [r.patient for r in rows]
    result: dict[str, Any] = {
        "encoder": {"spec": getattr(model, "spec", ""), "fingerprint": model.fingerprint},
        "domain": domain,
        "split": "+".join(splits),
        "n": len(rows),
        "gallery": len(gallery),
        "skipped": skipped,
    }
    words = EmbeddingCache(cache, model, "text")
    blind = untrained and hasattr(model, "towers")
    if key == "text":
        result["paired"] = _paired(rows, found.vectors, model, words, blind, resamples, seed)
    if gallery:
        if key == "text":
            allowed = _allowed(rows, gallery)
            scores = found.vectors @ embed_texts([r.text for r in gallery], model, words).T
        else:
            gallery, shelf, _ = _embedded(gallery, model, seen)
            allowed = _allowed(rows, gallery) & ~_alike(found, shelf)
            scores = found.vectors @ shelf.vectors.T
        top = _best(scores, allowed, k)
        result["hubness"] = cells(hubness(top, len(gallery)), patients, resamples, seed)
        tops = {"value": top[:, :1]}
        known = agreements(data, rows, gallery)
        if key == "image":
            known |= same_labels(rows, gallery)
            overlap = text_overlap(rows, gallery)
            known |= {} if np.isnan(overlap).all() else {"text_overlap": overlap}
            tops |= {"top5": top[:, :5], "shuffled": _of_others(top[:, 0], seed)}
            if blind:
                with reinitialised(model, seed):
                    asked, shown = (
                        model.images([r.images[0] for r in part]) for part in (rows, gallery)
                    )
                tops["untrained"] = _best(asked @ shown.T, allowed, 1)
        result["agreement"] = {
            name: _agreement(matrix, tops, allowed, patients, resamples, seed)
            for name, matrix in known.items()
        }
        best = [gallery[n].text if n >= 0 else None for n in top[:, 0]]
        result["finding_agreement"] = reference_agreement(
            data, rows, best, lambda _: len(gallery), keywords, seed
        )
    return result


def _embedded(
    rows: list[Reference], model: Encoder, cache: EmbeddingCache
) -> tuple[list[Reference], ImageEmbeddings, int]:
    """The rows whose pictures can be read, their embeddings, and how many cannot."""
    found = embed_images([r.images for r in rows], model, cache)
    good = [n for n in range(len(rows)) if n not in found.errors]
    kept = ImageEmbeddings(found.vectors[good], found.pixels[good], found.phash[good], {})
    return [rows[n] for n in good], kept, len(found.errors)


def _paired(
    rows: Sequence[Reference],
    images: np.ndarray,
    model: Encoder,
    words: EmbeddingCache,
    untrained: bool,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Does each picture find its own report among all? Every metric beside its controls."""
    texts = [r.text for r in rows]
    own_texts = embed_texts(texts, model, words)
    patients = [r.patient for r in rows]
    right = relevant(texts, range(len(rows)))
    paired = cells(_means(per_query(images @ own_texts.T, right)), patients, resamples, seed)
    order = numpy_rng(seed).permutation(len(rows))
    beside = {"chance": chance(right), "shuffled": per_query(images[order] @ own_texts.T, right)}
    if untrained:
        with reinitialised(model, seed):
            blind = model.images([r.images[0] for r in rows]) @ model.texts(texts).T
        beside["untrained"] = per_query(blind, right)
    for control, values in beside.items():
        for name, cell in cells(_means(values), patients, resamples, seed).items():
            paired[name][control] = cell
    return paired


def _best(scores: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """The k best allowed references of each query, int [q, k]; -1: none left."""
    scores = np.where(allowed, scores, -np.inf)
    top = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, scores.shape[1])]
    return np.where(np.take_along_axis(allowed, top, axis=1), top, -1)


def _of_others(best: np.ndarray, seed: int, most: int = 50) -> np.ndarray:
    """The best references of up to ``most`` other queries, int [q, others]."""
    order, number = numpy_rng(seed).permutation(len(best)), min(len(best) - 1, most)
    out = np.empty((len(best), number), dtype=best.dtype)
    for shift in range(number):
        out[order, shift] = best[np.roll(order, shift + 1)]
    return out


def _alike(asked: ImageEmbeddings, shelf: ImageEmbeddings) -> np.ndarray:
    """bool [q, g]: some view of both is the same or nearly the same picture."""
    alike = np.zeros((len(asked.pixels), len(shelf.pixels)), dtype=bool)
    for mine, look in zip(asked.pixels.T, asked.phash.T, strict=True):
        for theirs, near in zip(shelf.pixels.T, shelf.phash.T, strict=True):
            both = (mine != b"")[:, None] & (theirs != b"")[None]
            alike |= both & (np.bitwise_count(look[:, None] ^ near[None]) <= NEAR)
    return alike


def agreements(
    data: Sequence[DataFolder], rows: Sequence[Reference], gallery: Sequence[Reference]
) -> dict[str, np.ndarray]:
    """How far each reference's study agrees with each query's, [q, g]; NaN: cannot be said.

    With ground truth (``truth.jsonl``): ``finding_accuracy``, the share of findings that are
    present in both or absent in both, and ``finding_jaccard`` of the present ones. Otherwise
    ``label_jaccard`` of what the source labelled (``meta.labels``: words, not numbers).
    """
    truth: dict[str, Truth] = {}
    for folder in data:
        truth |= folder.truth()
    if truth:
        mine, theirs = ([_present(truth, r) for r in part] for part in (rows, gallery))
        names = sorted({name for row in [*mine, *theirs] for name in row})
        a, b = (_table(part, names) for part in (mine, theirs))
        both = (~np.isnan(a)).astype(float) @ (~np.isnan(b)).astype(float).T
        x, y = np.nan_to_num(a), np.nan_to_num(b)
        u, v = np.nan_to_num(1 - a), np.nan_to_num(1 - b)
        same = x @ y.T + u @ v.T
        return {
            "finding_accuracy": np.divide(
                same, both, out=np.full(both.shape, np.nan), where=both > 0
            ),
            "finding_jaccard": _jaccard(x, y),
        }
    sets = [[labels_of(r) for r in part] for part in (rows, gallery)]
    names = sorted({name for part in sets for s in part for name in s})
    if not names:
        return {}
    x, y = (np.array([[float(n in s) for n in names] for s in part]) for part in sets)
    return {"label_jaccard": _jaccard(x, y)}


def same_labels(rows: Sequence[Reference], gallery: Sequence[Reference]) -> dict[str, np.ndarray]:
    """``same_NAME``: does the reference say the same of this label (``meta.labels``, or
    ``meta.modality``) as the query? ``same_all``: of all of them. [q, g]; NaN: one says nothing."""
    said = [[_said(r) for r in part] for part in (rows, gallery)]
    names = sorted({name for part in said for row in part for name in row})
    out: dict[str, np.ndarray] = {}
    number: dict[frozenset[str], float] = {}
    for name in names:
        a, b = (
            np.array(
                [number.setdefault(r[name], len(number)) if name in r else np.nan for r in part]
            )
            for part in said
        )
        known = ~np.isnan(a)[:, None] & ~np.isnan(b)[None]
        out[f"same_{name}"] = np.where(known, a[:, None] == b[None], np.nan)
    if len(out) > 1:
        out["same_all"] = np.min(list(out.values()), axis=0)  # NaN where any is
    return out


def text_overlap(rows: Sequence[Reference], gallery: Sequence[Reference]) -> np.ndarray:
    """Jaccard index of the words (four letters or more) of both texts, [q, g]; NaN where one is no
    report, caption or note. Crude: a denied finding counts as a named one."""
    said = [[_words(r) for r in part] for part in (rows, gallery)]
    number = {word: n for n, word in enumerate(sorted({w for p in said for s in p for w in s}))}
    tables = [np.zeros((len(part), len(number))) for part in said]
    for table, part in zip(tables, said, strict=True):
        for line, words in zip(table, part, strict=True):
            line[[number[word] for word in words]] = 1
    both = np.logical_and.outer(tables[0].any(axis=1), tables[1].any(axis=1))
    return np.where(both, _jaccard(*tables), np.nan)


def _words(row: Reference) -> set[str]:
    plain = row.meta.get("text_kind", "report") in ("report", "caption", "note")
    return set(re.findall(r"[^\W\d_]{4,}", row.text.lower())) if plain else set()


def _said(row: Reference) -> dict[str, frozenset[str]]:
    """Label -> its words, of labels that are words."""
    labels = row.meta.get("labels")
    given = dict(labels) if isinstance(labels, Mapping) else {}
    given.setdefault("modality", row.meta.get("modality"))
    out = {}
    for key, value in given.items():
        words = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, str)]
        if words:
            out[key] = frozenset(words)
    return out


def labels_of(row: Reference) -> set[str]:
    """Words among the source's labels: ``key=value`` of strings, items of lists of strings."""
    out = set()
    labels = row.meta.get("labels")
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        items = value if isinstance(value, list) else [value]
        out |= {f"{key}={item}" for item in items if isinstance(item, str)}
    return out


@contextmanager
def reinitialised(model: Any, seed: int) -> Any:
    """Inside the block the encoder's weights are random (same architecture); then restored."""
    import torch

    module = model.towers.model
    kept = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 1 / float(np.sqrt(parameter[0].numel())))
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        yield
    finally:
        module.load_state_dict(kept)
        torch.set_rng_state(state)


def rows_of(
    data: Sequence[DataFolder], split: str, domain: str | None, key: str = "text"
) -> list[Reference]:
    """Rows with picture and (key "text") text; twins pair a picture with another's report."""
    rows = [r for folder in data for r in folder.corpus(split, domain)]
    usable = [r for r in rows if r.images and (key == "image" or r.text.strip())]
    return [r for r in usable if "twin" not in r.meta]


def _means(values: Mapping[str, np.ndarray]) -> dict[str, AnyStat]:
    return {name: average(row) for name, row in values.items()}


def _allowed(rows: Sequence[Reference], gallery: Sequence[Reference]) -> np.ndarray:
    """bool [q, g]: not the query's own row or patient."""
    ids, patients = np.array([g.id for g in gallery]), np.array([g.patient for g in gallery])
    return np.stack(
        [(ids != r.id) & ((patients != r.patient) if r.patient is not None else True) for r in rows]
    )


def _agreement(
    matrix: np.ndarray,
    tops: Mapping[str, np.ndarray],
    allowed: np.ndarray,
    patients: Sequence[str | None],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Mean agreement of the best reference (``tops["value"]``, and of others; [q, k], -1: none),
    of a random allowed one, and the difference of the two."""
    matrix = np.where(allowed, matrix, np.nan)

    def measured(top: np.ndarray) -> dict[str, Any]:
        found = np.take_along_axis(matrix, np.maximum(top, 0), axis=1)
        said = (top >= 0) & ~np.isnan(found)
        known = said.any(axis=1)
        best = np.divide(
            np.where(said, found, 0).sum(axis=1),
            said.sum(axis=1),
            where=known,
            out=np.zeros(len(top)),
        )
        if not known.any():
            return {"value": {"value": None, "low": None, "high": None, "n": 0}}
        random = np.nanmean(matrix[known], axis=1)
        chosen = [p for p, keep in zip(patients, known, strict=True) if keep]
        stats: dict[str, AnyStat] = {
            "value": average(best[known]),
            "random": average(random),
            "difference": average(best[known] - random, unit=False),
        }
        return cells(stats, chosen, resamples, seed)

    found = measured(tops["value"])
    others = {name: measured(top)["value"] for name, top in tops.items() if name != "value"}
    return {**found.pop("value"), **found, **others}


def _present(truth: Mapping[str, Truth], row: Reference) -> dict[str, bool]:
    known = truth.get(str(row.meta.get("study", row.id)))
    return {} if known is None else {n: f.present for n, f in known.findings.items()}


def _table(rows: Sequence[Mapping[str, bool]], names: Sequence[str]) -> np.ndarray:
    return np.array([[float(r[n]) if n in r else np.nan for n in names] for r in rows])


def _jaccard(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    common = x @ y.T
    union = x.sum(axis=1)[:, None] + y.sum(axis=1)[None] - common
    return np.divide(common, union, out=np.full(union.shape, np.nan), where=union > 0)
