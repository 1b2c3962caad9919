"""Bootstrap, paired tests and Holm against hand computation and scipy."""

import time

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from mmedrag.evaluation.compare import holm, sign_flip
from mmedrag.evaluation.metrics.bounds import bca, bca_p, inverted, quantiles
from mmedrag.evaluation.metrics.questions import average, closed, proportion
from mmedrag.evaluation.metrics.statistics import (
    RankStat,
    Replicates,
    clean,
    clusters,
    difference,
    draws,
    interval,
    intervals,
    resample,
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


def test_quantiles_are_numpy_s(rng):
    for size in (2, 7, 1000):
        samples = rng.normal(size=size)
        levels = np.array([0.0, 0.025, 0.975, 1.0])
        assert quantiles(samples, levels) == pytest.approx(np.quantile(samples, levels))
    assert bca(1.0, np.array([np.nan, 1.0]), np.array([]), 9) == (1.0, 1.0)
    assert bca(1.0, np.array([np.nan]), np.array([]), 9) == (None, None)


def test_bca_of_many_clusters_is_scipy_s(rng):
    """Of a skewed mean, where bias and acceleration count; with enough clusters that the widening
    for few of them does not."""
    values = rng.exponential(size=180) ** 2
    found = intervals({"mean": average(values, unit=False)}, [None] * 180, 20_000)["mean"]
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.low == pytest.approx(theirs.low, rel=0.02)
    assert found.high == pytest.approx(theirs.high, rel=0.02)


def test_few_patients_widen_the_interval_as_student_s_t_does(rng):
    values = rng.normal(0.5, 0.1, 8)
    found = intervals({"mean": average(values)}, [None] * 8, 20_000)["mean"]
    exact = scipy_stats.t.interval(0.95, 7, values.mean(), values.std(ddof=1) / np.sqrt(8))
    assert found.high - found.low == pytest.approx(exact[1] - exact[0], rel=0.15)


def test_p_is_where_the_interval_ends(rng):
    """The p of a difference is 0.05 where its interval just reaches 0, whatever its shape."""
    values = rng.exponential(size=40)
    one, nothing = resample([average(values), average(0 * values)], clusters([None] * 40), 4000)
    low, high = bca(values.mean(), one.bootstrap, one.jackknife, 40)
    for end in (low, high):
        moved = (values.mean() - end, one.bootstrap - end, one.jackknife - end, 40)
        assert bca_p(*moved) == pytest.approx(0.05, abs=0.003)
    assert difference(values.mean(), one, nothing, 40).p == pytest.approx(2 / 4001, abs=1e-6)


def test_a_norm_is_corrected_for_what_sampling_adds(rng):
    def length(v):
        return np.sqrt((v**2).sum(-1))

    noise = rng.normal(0, 0.1, (4000, 10))
    value, low, high = inverted(length, rng.normal(0, 0.1, 10), noise, 1000)
    assert (low, 0 <= value < 0.2 < high) == (0.0, True) or value == 0.0
    far = np.full(10, 1.0)
    value, low, high = inverted(length, far, far + noise, 1000)
    assert value == pytest.approx(length(far), abs=0.03)  # far from 0 there is little to correct
    assert high - low == pytest.approx(2 * 1.96 * 0.1, rel=0.1)
    assert inverted(length, np.zeros(10), np.zeros((5, 10)), 9) == (0.0, 0.0, 0.0)


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
    assert np.array_equal(a[0].bootstrap, b[0].bootstrap)
    assert np.allclose(a[1].bootstrap - a[0].bootstrap, 1.0)  # paired: the same rows in each draw


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
    own = interval(proportion(better), one)
    assert gap.high - gap.low < own.high - own.low


def test_difference_of_equals_is_nothing(rng):
    row = Replicates(rng.random(500), rng.random(10), 10)
    gap = difference(0.0, row, row, 10)
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
    nothing = Replicates(np.full(10, np.nan), np.array([np.nan]), 0)
    found = interval(proportion([True], [False]), nothing)
    assert clean(found.value) is None and found.low is None
    assert clean(-0.0) == 0.0
