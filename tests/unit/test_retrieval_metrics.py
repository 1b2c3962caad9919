"""Recall, MRR, nDCG, chance and hubness against hand-computed numbers; text windows."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import skew

from mmedrag.evaluation.metrics.retrieval import chance, hubness, hubs, usage
from mmedrag.evaluation.metrics.statistics import intervals
from mmedrag.records.records import Hit, Selection, Trace
from mmedrag.retrieval.encoders.windows import sentences, windows
from mmedrag.retrieval.ranks import per_query, ranks, relevant


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
        assert expected[name].shape == (1,)
        assert value.mean() == pytest.approx(expected[name][0], abs=0.03), name


def test_hubness() -> None:
    stats = hubness(np.array([[0, 1], [0, 2], [0, 3], [4, -1]]), references=10)
    found = {name: stat.point() for name, stat in stats.items()}
    uses = [3, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert found == pytest.approx(
        {
            "distinct_share": 2 / 4,
            "coverage@2": 5 / 10,
            "top_share": 3 / 4,
            "top_ten_share": 1.0,
            "skewness": skew(uses),
        }
    )
    assert {stat.n for stat in stats.values()} == {4}
    nothing = hubness(np.array([[-1], [-1]]), references=3)["top_share"]
    assert nothing.n == 0 and np.isnan(nothing.point())


def test_counts_of_references_describe_the_queries_and_have_no_interval() -> None:
    """More queries show more references: there is no value that an interval could hold."""
    rng = np.random.default_rng(2)
    found = intervals(hubness(rng.integers(0, 40, (60, 3)), 40), [None] * 60, 100)
    assert {(cell.low, cell.high, cell.n) for cell in found.values()} == {(None, None, 60)}
    more = hubs(rng.integers(0, 40, 600))["distinct_share"].point()
    assert more < found["distinct_share"].value / 2


def test_usage_counts_each_image_once_and_says_what_is_kept() -> None:
    def trace(i: int, kept: list[str] | None, excluded: int) -> Trace:
        return Trace(
            example_id=str(i),
            task="vqa",
            excluded=excluded,
            hits=[
                Hit(id="a", text="", score=0.9, rank=0),
                Hit(id="b", text="", score=0.1 * i, rank=1),
            ],
            selection=None if kept is None else Selection(rule="r", kept=kept),
        )

    stats = usage([trace(1, ["a", "b"], 3), trace(2, [], 1), trace(3, None, 0)])
    found = {name: (stat.point(), stat.n) for name, stat in stats.items()}
    assert found["kept"] == (1.0, 2)  # one image was not selected from
    assert found["kept_all"] == found["kept_none"] == (0.5, 2)
    assert found["excluded"] == (pytest.approx(4 / 3), 3)
    assert found["similarity@2"] == (pytest.approx(0.2), 3)
    assert found["top_share"] == (1.0, 3) and "similarity@3" not in found


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
        "A 1.5 cm nodule, e.g. a cyst.",
        "No effusion.",
    ]


@given(st.lists(st.sampled_from(["Ab", "cd", "ef.", "Gh", "x."]), max_size=40), st.integers(4, 12))
def test_windows_lose_nothing_and_fit(parts: list[str], context: int) -> None:
    text = " ".join(parts)
    found = windows(text, words, context)
    assert " ".join(found).split() == text.split()
    assert all(words(window) <= context for window in found)
