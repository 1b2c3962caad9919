"""R_d: the references of a domain that are nearest to an image.

Place in the picture: ``retriever[d].search``. S = cos(V(x_v), T(r)) between the image (mean of
its views) and the references' texts (paper §3.1). References of the query's own patient, with
the same image, or with an image within a perceptual distance are left out and counted: else an
evaluation finds the answer itself.

Public functions (stable; the commands ``retrieve`` and ``retriever eval`` call nothing else)::

    open_retriever(path, encoder=None, device=None, exclude=Exclusion(), views="mean",
                   where=None, cache=True) -> Retriever
    Retriever.search(examples, k) -> (hits per example, excluded per example)   # Searcher
    Retriever.domain, .index, .encoder
    released_rows(examples, hits, selections) -> list of released JSON rows
    mmedrag.evaluation.of_retriever.evaluate_retriever(data, retriever, ...) -> dict
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.records import Encoder, Example, Hit, Selection
from mmedrag.retrieval.embeddings import EmbeddingCache, ImageEmbeddings, embed_images
from mmedrag.retrieval.index import Filter, IndexFolder

NEAR = 2  # bits of 64 in which near-identical images may differ


@dataclass(frozen=True)
class Exclusion:
    """Which references may not be found for a query.

    ``patient``: those of the same patient (an unknown patient matches nobody). ``image``: those
    with the same decoded pixels. ``near``: those whose perceptual hash differs in at most so
    many of 64 bits; None switches this off.
    """

    patient: bool = True
    image: bool = True
    near: int | None = NEAR


class Retriever:
    """An encoder and an index; a :class:`~mmedrag.records.protocols.Searcher`."""

    def __init__(
        self,
        index: IndexFolder,
        encoder: Encoder,
        exclude: Exclusion = Exclusion(),  # noqa: B008 - frozen
        views: str = "mean",
        where: Filter | None = None,
        cache: Path | None = None,
    ) -> None:
        index.check(encoder)
        self.index, self.encoder, self.exclude, self.views = index, encoder, exclude, views
        self.allowed = None if where is None else index.mask(where)
        self.keeps = cache is not None
        self.cache = EmbeddingCache(cache or index.path / "cache", encoder, "image")
        self.errors: dict[str, str] = {}

    @property
    def domain(self) -> str | None:
        return self.index.domain

    def forget(self) -> None:
        """Drop what a caller's folder keeps of queries from memory; from now on keep none."""
        if self.keeps:
            self.keeps, self.cache = False, EmbeddingCache(None, self.encoder, "image")

    def embed(self, examples: Sequence[Example]) -> ImageEmbeddings:
        """Each distinct image once; images of the index's own cache not at all. Nothing of the
        others is left, in memory or on disk, unless the caller named a folder for it."""
        cache = self.cache if self.keeps else self.cache.scratch()
        return embed_images([e.images for e in examples], self.encoder, cache, self.views)

    def search(self, examples: Sequence[Example], k: int) -> tuple[list[list[Hit]], list[int]]:
        """Per example: at most ``k`` hits best first, and how many better ones were excluded.

        Scores are rounded to 6 decimals and equal ones ordered by row, so that the result does
        not depend on the batch. An example whose image cannot be read gets no hits; the reason
        stands in ``self.errors`` (example id -> why, of the last search).
        """
        examples = list(examples)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for n, e in enumerate(examples):
            patient = e.patient if self.exclude.patient else None
            views = e.image if isinstance(e.image, str) else tuple(e.image or ())
            groups.setdefault((patient, e.root, views), []).append(n)
        firsts = [examples[members[0]] for members in groups.values()]
        found = self.embed(firsts)
        members_of = list(groups.values())
        self.errors = {
            examples[m].id: reason for n, reason in found.errors.items() for m in members_of[n]
        }
        rows, scores, excluded = self._search(firsts, found, k)
        needed = sorted({int(r) for r in rows.ravel() if r >= 0})
        text = dict(zip(needed, self.index.texts(needed), strict=True))
        hits: list[list[Hit]] = [[] for _ in examples]
        own = [0] * len(examples)
        for g, members in enumerate(groups.values()):
            ranked = enumerate(zip(rows[g].tolist(), scores[g].tolist(), strict=True))
            shared = [
                Hit(id=self.index.ids[r], text=text[r], score=s, rank=rank)
                for rank, (r, s) in ranked
                if r >= 0
            ]
            for n in members:
                own[n], hits[n] = int(excluded[g]), list(shared)
        return hits, own

    def _search(
        self, examples: list[Example], found: ImageEmbeddings, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers and scores [q, k] (-1: none left) and how many were excluded before them.

        Fetches a few more than k and repeats with more for the queries that still lack hits,
        or whose last hit is tied with what was not fetched.
        """
        rows = np.full((len(examples), k), -1, np.int64)
        scores = np.zeros((len(examples), k), np.float64)
        excluded = np.zeros(len(examples), np.int64)
        if k < 1:
            return rows, scores, excluded
        total = len(self.index)
        todo = np.array([n for n in range(len(examples)) if n not in found.errors], dtype=np.int64)
        fetch = min(total, k + 16)
        while len(todo):
            raw, at = self.index.store.search(found.vectors[todo], fetch, self.allowed)
            again = []
            for n, s, r in zip(todo, raw, at, strict=True):
                complete = fetch >= total or r[-1] < 0
                s, r = s[r >= 0].astype(np.float64).round(6), r[r >= 0]
                order = np.lexsort((r, -s))
                s, r = s[order], r[order]
                barred = self._barred(examples[n], found.pixels[n], found.phash[n], r)
                free = np.flatnonzero(~barred)
                if not complete and (len(free) < k or s[free[k - 1]] <= s[-1]):
                    again.append(n)
                    continue
                best = free[:k]
                rows[n, : len(best)], scores[n, : len(best)] = r[best], s[best]
                seen = best[-1] + 1 if len(best) == k else len(r)
                excluded[n] = int(barred[:seen].sum())
            todo, fetch = np.array(again, dtype=np.int64), min(total, fetch * 4)
        return rows, scores, excluded

    def _barred(
        self, example: Example, pixels: np.ndarray, phash: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """bool [len(rows)]: is the reference the query's own?"""
        barred = np.zeros(len(rows), dtype=bool)
        if self.exclude.patient and example.patient is not None:
            barred |= self.index.patients[rows] == example.patient
        theirs, near = self.index.pixels[rows], self.index.phash[rows]
        for pixel, look in zip(pixels, phash, strict=True):
            if not pixel:
                continue  # a missing view
            if self.exclude.image:
                barred |= (theirs == pixel).any(axis=1)
            if self.exclude.near is not None:
                close = np.bitwise_count(near ^ look) <= self.exclude.near
                barred |= (close & (theirs != b"")).any(axis=1)
        return barred


def open_retriever(
    path: str | Path,
    encoder: str | Encoder | None = None,
    device: str | None = None,
    exclude: Exclusion = Exclusion(),  # noqa: B008 - frozen
    views: str = "mean",
    where: Filter | None = None,
    cache: Path | None = None,
) -> Retriever:
    """The retriever of an index folder, with the encoder the index was built with.

    Args:
        encoder: where that encoder is now, when it was moved; another one is refused.
        views: "mean" of the view embeddings, or the "first" view only (as released).
        where: only references that pass this filter.
        cache: folder in which query embeddings are kept for later calls; by default they are kept
            nowhere.
    """
    index = IndexFolder.open(path)
    if encoder is None or isinstance(encoder, str):
        encoder = index.encoder(encoder, device)
    return Retriever(index, encoder, exclude, views, where, cache)


def released_rows(
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    selections: Sequence[Selection | None],
) -> list[dict[str, Any]]:
    """Rows as the released retrieval wrote them (retrieve_clip_VQA.py:204-222).

    The example's own fields (of an imported released row: that row as it was), then
    ``reference_reports`` (texts kept, best first) and ``retrieve_k`` (how many). Departures, in
    docs/differences.md: B1 (the row keeps its own image paths), B6 (negative similarities are
    not kept), B7 (nothing kept gives k = 0, not 1).
    """
    rows = []
    for example, found, selection in zip(examples, hits, selections, strict=True):
        kept = None if selection is None else set(selection.kept)
        texts = [hit.text for hit in found if kept is None or hit.id in kept]
        origin = example.meta.get("released")
        row: dict[str, Any] = {"question_id": example.id, "image": example.image}
        if isinstance(origin, dict) and isinstance(origin.get("fields"), dict):
            row = dict(origin["fields"])
        elif example.task == "vqa":
            row |= {"question": example.question, "answer": example.answer}
        else:
            row |= {"report": example.answer}
        rows.append({**row, "reference_reports": texts, "retrieve_k": len(texts)})
    return rows
