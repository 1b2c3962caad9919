"""Recall, MRR, nDCG, chance and hubness against hand-computed numbers; text windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedrag.encoders.windows import sentences, windows
from mmedrag.retrieval_metrics import chance, hubness, per_query, ranks, relevant


def test_hand_computed() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    right = np.eye(3, dtype=bool)
    assert ranks(scores, right).tolist() == [1, 2, 3]
    found = per_query(scores, right, ks=(1, 2))
    assert found["recall@1"].tolist() == [1, 0, 0]
    assert found["recall@2"].tolist() == [1, 1, 0]
    assert found["mrr"].tolist() == [1, 1 / 2, 1 / 3]
    assert found["ndcg@10"] == pytest.approx([1, 1 / np.log2(3), 1 / 2])


def test_ties_count_against() -> None:
    assert ranks(np.zeros((1, 5)), np.eye(1, 5, dtype=bool)).tolist() == [5]


def test_equal_texts_are_all_right() -> None:
    right = relevant(["normal.", "mass", "normal. "], [0, 1])
    assert right.tolist() == [[True, False, True], [False, True, False]]
    assert ranks(np.array([[0.1, 0.5, 0.9]]), right[:1]).tolist() == [1]


@pytest.mark.parametrize(("n", "m"), [(10, 1), (12, 3), (30, 7), (5, 5)])
def test_chance_is_what_random_orders_give(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    right = np.zeros((1, n), dtype=bool)
    right[0, :m] = True
    expected = chance(right)
    many = np.repeat(right, 4000, axis=0)
    measured = per_query(rng.random((4000, n)), many)
    for name, value in measured.items():
        assert value.mean() == pytest.approx(expected[name], abs=0.03), name


def test_hubness() -> None:
    found = hubness(np.array([[0, 1], [0, 2], [0, 3], [4, -1]]), references=10)
    assert found["distinct"] == 2
    assert found["distinct@2"] == 5
    assert found["possible"] == 4
    assert found["top_share"] == 0.75
    assert found["skewness"] > 1


def words(text: str) -> int:
    return len(text.split()) + 2


def test_windows_are_whole_sentences() -> None:
    text = "One two three. Four five. Six seven eight nine. Ten."
    assert windows(text, words, 8) == ["One two three. Four five.", "Six seven eight nine. Ten."]
    assert windows(text, words, 99) == [text]
    assert windows("", words, 8) == []


def test_a_long_sentence_is_cut_between_words() -> None:
    assert windows("a b c d e f g", words, 5) == ["a b c", "d e f", "g"]


def test_numbers_and_abbreviations_stay_inside() -> None:
    assert sentences("A 1.5 cm nodule, e.g. a cyst. No effusion.") == [
        "A 1.5 cm nodule, e.g. a cyst.", "No effusion."
    ]  # fmt: skip


@given(st.lists(st.sampled_from(["Ab", "cd", "ef.", "Gh", "x."]), max_size=40), st.integers(4, 12))
def test_windows_lose_nothing_and_fit(parts: list[str], context: int) -> None:
    text = " ".join(parts)
    found = windows(text, words, context)
    assert " ".join(found).split() == text.split()
    assert all(words(window) <= context for window in found)
