"""Bootstrap, paired tests and Holm against hand computation and scipy."""

import time

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from mmedrag.evaluation.metrics.questions import average, closed, proportion
from mmedrag.evaluation.metrics.statistics import (
    RankStat,
    clean,
    clusters,
    difference,
    draws,
    holm,
    interval,
    intervals,
    percentile,
    resample,
    sign_flip,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_every_resample_draws_as_many_clusters_as_there_are():
    weights = np.concatenate(list(draws(13, 700, seed=1)))
    assert weights.shape == (700, 13)
    assert (weights.sum(axis=1) == 13).all()
    assert abs(weights.var() - 12 / 13) < 0.05  # multinomial: variance n p (1 - p)


def test_interval_of_a_mean_agrees_with_theory(rng):
    right = rng.random(1000) < 0.7
    found = intervals({"accuracy": proportion(right)}, [str(i) for i in range(1000)], 4000)
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 1000)
    result = found["accuracy"]
    assert result.value == pytest.approx(right.mean())
    assert result.low == pytest.approx(right.mean() - half, abs=0.004)
    assert result.high == pytest.approx(right.mean() + half, abs=0.004)


def test_percentile_is_numpy_s(rng):
    for size in (2, 7, 1000):
        samples = rng.normal(size=size)
        assert percentile(samples) == pytest.approx(tuple(np.percentile(samples, [2.5, 97.5])))
    assert percentile(np.array([np.nan, 1.0])) == (1.0, 1.0)
    assert percentile(np.array([np.nan])) == (None, None)


def test_rows_of_one_patient_widen_the_interval(rng):
    right = np.repeat(rng.random(100) < 0.5, 9)  # nine identical rows per patient
    alone = intervals({"a": proportion(right)}, [None] * 900, 2000)["a"]
    by_patient = intervals({"a": proportion(right)}, [str(i // 9) for i in range(900)], 2000)["a"]
    ratio = (by_patient.high - by_patient.low) / (alone.high - alone.low)
    assert 2.6 < ratio < 3.4  # sqrt(9)


def test_missing_patients_are_their_own_clusters():
    assert clusters(["a", None, "a", None]).tolist() == [0, 1, 0, 2]


def test_ten_thousand_resamples_of_four_thousand_rows_in_two_seconds(rng):
    """In processor time: the wall clock would measure what else runs here."""
    truth = ["yes" if v else "no" for v in rng.random(4000) < 0.5]
    said = ["yes" if v else "no" for v in rng.random(4000) < 0.5]
    stats = list(closed(said, truth).values())
    assert len(stats) == 11
    groups = clusters([str(i) for i in range(4000)])
    start = time.process_time()
    resample(stats, groups, 10_000)
    assert time.process_time() - start < 2.0


def test_same_seed_same_numbers_and_shared_weights(rng):
    values = rng.random(50)
    a = resample([average(values), average(values + 1)], clusters([None] * 50), 300, seed=3)
    b = resample([average(values)], clusters([None] * 50), 300, seed=3)
    assert np.array_equal(a[0], b[0])
    assert np.allclose(a[1] - a[0], 1.0)  # paired: the same rows in each draw


def test_perfect_score_of_five_rows_is_not_certainty():
    found = intervals({"a": proportion([True] * 5)}, [None] * 5, 100)["a"]
    exact = scipy_stats.binomtest(5, 5).proportion_ci(method="exact")
    assert found.low == pytest.approx(exact.low) and found.high == 1.0
    nothing = intervals({"a": proportion([False] * 5)}, [None] * 5, 100)["a"]
    assert nothing.low == 0.0 and nothing.high == pytest.approx(1 - exact.low)


def test_one_patient_gives_no_interval():
    found = intervals({"a": proportion([True, False])}, ["p", "p"], 100)["a"]
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_auroc_equals_scikit_learn_also_under_weights_and_ties(rng):
    scores = np.round(rng.random(80), 1)
    positive = rng.random(80) < 0.4
    stat = RankStat(scores, positive, scores)
    assert stat.point() == pytest.approx(roc_auc_score(positive, scores))
    weights = rng.integers(0, 4, size=(3, 80)).astype(float)
    for row, value in zip(weights, stat.weighted(weights), strict=True):
        assert value == pytest.approx(roc_auc_score(positive, scores, sample_weight=row))


def test_auroc_under_weights_of_clusters_is_that_of_their_rows(rng):
    scores = np.round(rng.random(90), 1)
    scores[::7] = np.nan
    groups = clusters([str(i % 11) for i in range(90)])
    stat = RankStat(scores, rng.random(90) < 0.4, scores)
    weights = rng.multinomial(11, [1 / 11] * 11, size=50).astype(float)
    by_cluster = stat.weighted(weights, groups)
    assert by_cluster == pytest.approx(stat.weighted(weights[:, groups]), nan_ok=True)


def test_auroc_leaves_out_rows_without_a_score():
    stat = RankStat(np.array([0.1, np.nan, 0.9]), np.array([False, True, True]), np.zeros(3))
    assert stat.point() == 1.0 and stat.n == 2


def test_paired_difference_is_tighter_than_unpaired(rng):
    base = rng.random(400) < 0.6
    better = base | (rng.random(400) < 0.15)
    groups = clusters([None] * 400)
    one, two = resample([proportion(better), proportion(base)], groups, 2000)
    gap = difference(better.mean() - base.mean(), one, two, 400)
    assert gap.low > 0 and gap.p < 0.01
    width = np.subtract(*percentile(one)[::-1])
    assert gap.high - gap.low < width


def test_difference_of_equals_is_nothing(rng):
    row = rng.random((1, 500))
    gap = difference(0.0, row[0], row[0], 10)
    assert (gap.low, gap.high, gap.p) == (0.0, 0.0, 1.0)


def test_sign_flip_is_exact_for_few_patients():
    # one patient says +3, two say +1: |sum| = 5 in 2 of 8 sign patterns
    differences = np.array([3.0, 1.0, 0.5, 0.5])
    assert sign_flip(differences, np.array([0, 1, 2, 2])) == pytest.approx(2 / 8)
    assert sign_flip(np.zeros(4), np.arange(4)) == 1.0


def test_sampled_sign_flips_agree_with_the_normal_test(rng):
    differences = rng.normal(0.15, 1, size=60)
    found = sign_flip(differences, np.arange(60), 20_000, seed=1)
    assert found == pytest.approx(scipy_stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert sign_flip(differences, np.arange(60), 20_000, seed=1) == found
    assert sign_flip(np.array([2.0, 1.0]), np.array([0, 0])) == 1.0  # one patient


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_undefined_is_null_not_zero():
    found = interval(proportion([True], [False]), np.full(10, np.nan), np.array([0]))
    assert clean(found.value) is None and found.low is None
    assert clean(-0.0) == 0.0
