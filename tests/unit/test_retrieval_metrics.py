"""Recall, MRR, nDCG, chance and hubness against hand-computed numbers; text windows."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import skew

from mmedrag.evaluation.metrics.retrieval import chance, hubness, hubs, usage
from mmedrag.evaluation.metrics.statistics import AnyStat, intervals
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


def test_hubs_of_whole_patients_are_resampled_as_repeated_queries() -> None:
    rng = np.random.default_rng(1)
    first = rng.integers(0, 40, size=60)
    weights = rng.integers(0, 3, size=(5, 20))  # of 20 patients with three queries each
    groups = np.arange(60) // 3
    for name, stat in hubs(first).items():
        found = stat.weighted(weights.astype(float), groups)
        again = [hubs(np.repeat(first, w[groups]))[name].point() for w in weights]
        assert found == pytest.approx(again), name


def test_intervals_of_hubness_hold_what_other_queries_would_give() -> None:
    rng = np.random.default_rng(2)
    odds = 1 / np.arange(1, 301)

    def found() -> dict[str, AnyStat]:
        rows = [rng.choice(300, 3, replace=False, p=odds / odds.sum()) for _ in range(60)]
        return hubness(np.array(rows), references=300)

    wanted = {name: 0.0 for name in found()}
    for _ in range(200):
        for name, stat in found().items():
            wanted[name] += stat.point() / 200
    held = dict.fromkeys(wanted, 0)
    for _ in range(60):
        for name, cell in intervals(found(), [None] * 60, resamples=200).items():
            held[name] += cell.low <= wanted[name] <= cell.high
            assert cell.n == 60
    assert min(held.values()) >= 50, held  # 57 of 60 on average where all is well


def test_one_reference_for_all_does_not_print_as_certainty() -> None:
    found = intervals(hubs([0] * 20), [None] * 20)
    unseen = 1 - 0.025 ** (1 / 20)
    distinct, top = found["distinct_share"], found["top_share"]
    assert (distinct.low, distinct.high) == pytest.approx((1 / 20, 1 / 20 + unseen))
    assert (top.low, top.high) == pytest.approx((1 - unseen, 1.0))


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
