"""FAISS behind the Store protocol: exact up to a measured size, inverted lists above it.

Place in the picture: inside an index. Vectors are unit rows, scores are cosines. ``engine``:

- ``flat`` - exact search;
- ``ivf`` - inverted lists (k-means cells); ``nprobe`` is the smallest that reaches the asked
  recall@10 against exact search, measured on given or own vectors when the store is finished;
- ``hnsw`` - graph; faster still, but slow to build, and ``remove`` rebuilds it;
- ``auto`` - flat up to ``FLAT_LIMIT`` rows, ivf above.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.records import UserError
from mmedrag.runtime import numpy_rng

log = logging.getLogger(__name__)
# One query over 100,000 x 512 takes 15 ms exactly and 100 queries 0.8 s on one slow core; cells
# cost a k-means and, at recall 0.99, save little below this (bench/retrieval.py prints both).
FLAT_LIMIT = 100_000
ENGINES = ("auto", "flat", "ivf", "hnsw")


class FaissStore:
    """Ids and unit vectors; rows are numbered 0.. in the order they were added."""

    def __init__(self, dim: int, engine: str = "auto", recall: float = 0.99) -> None:
        if engine not in ENGINES:
            raise UserError(f"index: engine: got {engine!r}, expected {', '.join(ENGINES)}")
        self.dim, self.engine, self.recall = dim, engine, recall
        self.ids: list[str] = []
        self.measured: dict[str, Any] = {}  # nprobe or efSearch, and the recall it reached
        self._index = _new("flat", dim, 0)
        self._kind = "flat"
        self._trained_on = 0

    # --- protocol -----------------------------------------------------------------------------

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Append rows.

        Raises:
            UserError: a wrong shape, a value that is not finite, or an id that is there already.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.shape != (len(ids), self.dim):
            raise UserError(
                f"index: got vectors {vectors.shape}, expected ({len(ids)}, {self.dim})"
            )
        if not np.isfinite(vectors).all():
            raise UserError("index: vectors: not all values are finite")
        doubled = set(self.ids).intersection(ids)
        if doubled or len(set(ids)) != len(ids):
            raise UserError(f"index: id {min(doubled, default='')!r} stands twice, expected unique")
        total = len(self.ids) + len(ids)
        if self._fits(total):
            self._append(vectors)
        else:
            self._build(np.concatenate([self.vectors(), vectors]))
        self.ids += ids
        self.measured = {}

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [q, k] and row numbers int64 [q, k], best first; -1 where none is left.

        ``allowed``: bool [count], rows that may be found.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise UserError(f"index: got queries {queries.shape}, expected (q, {self.dim})")
        if k < 1 or not len(queries):
            empty = (len(queries), max(k, 0))
            return np.zeros(empty, np.float32), np.full(empty, -1, np.int64)
        scores, rows = self._index.search(queries, k, params=self._parameters(allowed))
        scores[rows < 0] = -np.inf
        return scores, rows

    def remove(self, ids: Iterable[str]) -> int:
        """Drop rows and renumber the rest in order. Returns how many there were."""
        gone = set(ids)
        keep = np.array([i not in gone for i in self.ids], dtype=bool)
        removed = int(len(keep) - keep.sum())
        if removed:
            vectors = self.vectors()[keep]
            self.ids = [i for i, kept in zip(self.ids, keep, strict=True) if kept]
            self._build(vectors)
            self.measured = {}
        return removed

    def count(self) -> int:
        return len(self.ids)

    # --- folder -------------------------------------------------------------------------------

    def finish(self, queries: np.ndarray | None = None) -> None:
        """Choose nprobe or efSearch by recall@10 against exact search, where not exact."""
        if self._kind == "flat" or self.measured or not self.ids:
            return
        faiss = _faiss()
        vectors = self.vectors()
        if queries is None or len(queries) == 0:
            rng = numpy_rng(0)
            queries = vectors[rng.choice(len(vectors), min(256, len(vectors)), replace=False)]
        queries, k = queries[:1000], min(10, len(vectors))
        _, truth = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        name = "nprobe" if self._kind == "ivf" else "efSearch"
        value, limit = (4, self._index.nlist) if self._kind == "ivf" else (32, 1024)
        while True:
            self.measured = {name: value}
            _, found = self.search(queries, k)
            hits = [len(set(f) & set(t)) for f, t in zip(found, truth, strict=True)]
            reached = float(np.mean(hits)) / k
            self.measured["recall_at_10"] = round(reached, 4)
            if reached >= self.recall or value >= limit:
                log.info("index: %s of %d rows: %s", self._kind, len(vectors), self.measured)
                return
            value = min(value * 2, limit)

    def save(self, path: Path) -> dict[str, Any]:
        """Write the vectors to one file. Returns what :meth:`open` needs beside it."""
        faiss = _faiss()
        self.finish()
        faiss.write_index(self._index, str(path))
        return {
            "engine": self.engine,
            "kind": self._kind,
            "recall": self.recall,
            "trained_on": self._trained_on,
            **self.measured,
        }

    @classmethod
    def open(
        cls, path: Path, settings: dict[str, Any], ids: list[str], writable: bool = False
    ) -> FaissStore:
        """Memory-mapped: opening reads almost nothing, search reads what it touches.

        ``writable``: into memory instead, so that rows can be added and removed; else ``ids``
        are not copied.
        """
        faiss = _faiss()
        try:
            index = faiss.read_index(str(path), 0 if writable else faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise UserError(f"{path}: not a FAISS file: {str(error)[:120]!r}") from None
        if index.ntotal != len(ids):
            raise UserError(f"{path}: {index.ntotal} vectors, expected {len(ids)}")
        store = cls(index.d, settings["engine"], settings["recall"])
        store.ids = list(ids) if writable else ids
        store._index, store._kind = index, settings["kind"]
        store._trained_on = settings.get("trained_on", 0)
        keys = ("nprobe", "efSearch", "recall_at_10")
        store.measured = {key: settings[key] for key in keys if key in settings}
        return store

    def vectors(self) -> np.ndarray:
        """All rows in order, float32 [count, dim] (a copy)."""
        count = self._index.ntotal
        return self._index.reconstruct_n(0, count) if count else np.zeros((0, self.dim), np.float32)

    # --- inside -------------------------------------------------------------------------------

    def _wanted(self, total: int) -> str:
        if self.engine != "auto":
            return self.engine if self.engine == "flat" or total >= 1000 else "flat"
        return "flat" if total <= FLAT_LIMIT else "ivf"

    def _fits(self, total: int) -> bool:
        """May new rows simply be appended? Cells are re-trained when the rows have doubled."""
        same = self._wanted(total) == self._kind
        return same and (self._kind != "ivf" or total <= 2 * self._trained_on)

    def _build(self, vectors: np.ndarray) -> None:
        self._kind = self._wanted(len(vectors))
        self._index = _new(self._kind, self.dim, len(vectors))
        self._trained_on = 0
        if self._kind == "ivf":
            rng = numpy_rng(0)
            sample = min(len(vectors), 64 * self._index.nlist)
            self._index.train(vectors[np.sort(rng.choice(len(vectors), sample, replace=False))])
            self._trained_on = len(vectors)
        self._append(vectors)

    def _append(self, vectors: np.ndarray) -> None:
        with _threads(1 if self._kind == "hnsw" else None):  # a graph built in parallel varies
            self._index.add(vectors)

    def _parameters(self, allowed: np.ndarray | None) -> Any:
        faiss = _faiss()
        given: dict[str, Any] = {}
        if allowed is not None:
            packed = np.packbits(np.asarray(allowed, dtype=bool), bitorder="little")
            given["sel"] = faiss.IDSelectorBitmap(packed)
        if self._kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.measured.get("nprobe", 16), **given)
        if self._kind == "hnsw":
            width = self.measured.get("efSearch", 128)
            return faiss.SearchParametersHNSW(efSearch=width, **given)
        return faiss.SearchParameters(**given) if given else None


def _faiss() -> Any:
    """The library, imported when a store is used (its type stubs lag behind it)."""
    return import_module("faiss")


def _new(kind: str, dim: int, count: int) -> Any:
    faiss = _faiss()
    if kind == "ivf":
        cells = max(16, 2 ** round(np.log2(4 * np.sqrt(max(count, 1)))))
        index = faiss.index_factory(dim, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        return index
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 100
        return index
    return faiss.IndexFlatIP(dim)


class _threads:
    """FAISS with ``count`` OpenMP threads inside the block (None: as it is)."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __enter__(self) -> None:
        faiss = _faiss()
        self.before = faiss.omp_get_max_threads()
        if self.count:
            faiss.omp_set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        faiss = _faiss()
        faiss.omp_set_num_threads(self.before)
