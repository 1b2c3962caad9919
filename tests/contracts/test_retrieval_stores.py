"""One suite over every store engine: each agrees with exact search, before and after changes."""

from pathlib import Path

import numpy as np
import pytest

from mmedrag.records.records import UserError
from mmedrag.retrieval.stores.faiss import FaissStore

ENGINES = ("auto", "flat", "ivf", "hnsw")
DIM = 32


def clustered(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, DIM))
    rows = centres[rng.integers(0, 40, count)] + 0.4 * rng.standard_normal((count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def exact(vectors: np.ndarray, queries: np.ndarray, k: int, allowed=None) -> np.ndarray:
    scores = queries @ vectors.T
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(t)) / len(t) for f, t in zip(found, truth)]))  # noqa: B905


@pytest.fixture(params=ENGINES)
def store(request: pytest.FixtureRequest) -> FaissStore:
    made = FaissStore(DIM, request.param, recall=0.99)
    made.add([f"r{i}" for i in range(2000)], clustered(2000))
    made.finish(clustered(64, 1))
    return made


def test_agrees_with_exact_search(store: FaissStore) -> None:
    queries = clustered(64, 1)
    scores, rows = store.search(queries, 10)
    truth = exact(clustered(2000), queries, 10)
    assert scores.shape == rows.shape == (64, 10)
    assert rows.dtype == np.int64
    assert overlap(rows, truth) >= 0.99
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    expected = np.take_along_axis(queries @ clustered(2000).T, rows, axis=1)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_filter_is_exact_about_what_is_allowed(store: FaissStore) -> None:
    queries = clustered(32, 1)
    allowed = np.arange(2000) % 3 == 0
    _, rows = store.search(queries, 5, allowed)
    assert allowed[rows[rows >= 0]].all()
    assert overlap(rows, exact(clustered(2000), queries, 5, allowed)) >= 0.97
    _, none = store.search(queries, 5, np.zeros(2000, dtype=bool))
    assert (none == -1).all()


def test_more_than_there_are(store: FaissStore) -> None:
    few = FaissStore(DIM, store.engine)
    few.add(["a", "b"], clustered(2))
    scores, rows = few.search(clustered(3, 1), 5)
    assert sorted(rows[0].tolist()) == [-1, -1, -1, 0, 1]
    assert np.isneginf(scores[rows < 0]).all()
    assert few.search(clustered(3, 1), 0)[1].shape == (3, 0)


def test_remove_and_add(store: FaissStore) -> None:
    gone = [f"r{i}" for i in range(0, 2000, 2)]
    assert store.remove([*gone, "never there"]) == 1000
    assert store.count() == 1000
    assert store.remove(gone) == 0
    store.add(["new"], clustered(1, 5))
    store.finish()
    vectors = np.concatenate([clustered(2000)[1::2], clustered(1, 5)])
    assert store.vectors() == pytest.approx(vectors)
    assert store.ids[-1] == "new"
    queries = clustered(32, 1)
    assert overlap(store.search(queries, 5)[1], exact(vectors, queries, 5)) >= 0.97


def test_save_and_open(store: FaissStore, tmp_path: Path) -> None:
    settings = store.save(tmp_path / "v.faiss")
    opened = FaissStore.open(tmp_path / "v.faiss", settings, store.ids)
    queries = clustered(16, 1)
    for a, b in zip(store.search(queries, 5), opened.search(queries, 5), strict=True):
        assert (a == b).all()
    writable = FaissStore.open(tmp_path / "v.faiss", settings, store.ids, writable=True)
    writable.add(["new"], clustered(1, 5))
    assert writable.count() == 2001
    with pytest.raises(UserError, match="2000 vectors, expected 3"):
        FaissStore.open(tmp_path / "v.faiss", settings, ["a", "b", "c"])


def test_same_rows_same_bytes(store: FaissStore, tmp_path: Path) -> None:
    again = FaissStore(DIM, store.engine, recall=0.99)
    again.add(store.ids, clustered(2000))
    again.finish(clustered(64, 1))
    assert again.save(tmp_path / "a") == store.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a"], np.zeros((1, 3), np.float32), "got vectors"),
        (["a"], np.full((1, DIM), np.nan, np.float32), "not all values are finite"),
        (["r0"], np.ones((1, DIM), np.float32), "'r0' stands twice"),
        (["a", "a"], np.ones((2, DIM), np.float32), "stands twice"),
    ],
)
def test_bad_rows_are_refused(store: FaissStore, ids, vectors, message: str) -> None:
    before = store.count()
    with pytest.raises(UserError, match=message):
        store.add(ids, vectors)
    assert store.count() == before


def test_ivf_states_the_recall_it_measured() -> None:
    made = FaissStore(DIM, "ivf", recall=0.95)
    made.add([f"r{i}" for i in range(3000)], clustered(3000))
    made.finish(clustered(100, 1))
    assert made.measured["recall_at_10"] >= 0.95
    _, rows = made.search(clustered(100, 1), 10)
    reached = overlap(rows, exact(clustered(3000), clustered(100, 1), 10))
    assert reached == pytest.approx(made.measured["recall_at_10"], abs=1e-3)


def test_unknown_engine() -> None:
    with pytest.raises(UserError, match="engine: got 'lsh'"):
        FaissStore(8, "lsh")
