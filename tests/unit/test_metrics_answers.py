"""Closed and open question metrics against scikit-learn and hand-computed numbers."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from sklearn import metrics as sk

from mmedrag.evaluation.metrics import questions

LABELS = st.sampled_from(["yes", "no", "unclear"])
WORDS = {"yes": "Yes.", "no": "No.", "unclear": "It may be there."}


def closed(labels, truth, p_yes=None):
    found = questions.closed([WORDS[x] for x in labels], [WORDS[x] for x in truth], p_yes)
    return {name: stat.point() for name, stat in found.items()}


@pytest.mark.filterwarnings("ignore:A single label:UserWarning")
@given(st.lists(st.tuples(LABELS, st.sampled_from(["yes", "no"])), min_size=1, max_size=40))
def test_closed_metrics_equal_scikit_learn(rows):
    labels, truth = zip(*rows, strict=True)
    found = closed(labels, truth)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, labels))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, labels))
    f1 = sk.f1_score(truth, labels, labels=["yes", "no"], average=None, zero_division=np.nan)
    assert found["f1_yes"] == pytest.approx(f1[0], nan_ok=True)
    assert found["macro_f1"] == pytest.approx(f1.mean(), nan_ok=True)
    if {"yes", "no"} <= set(truth):
        recall = sk.recall_score(truth, labels, labels=["yes", "no"], average=None)
        assert found["balanced_accuracy"] == pytest.approx(recall.mean())
    else:
        assert np.isnan(found["balanced_accuracy"])  # undefined, not flattering
    assert found["parse_rate"] == pytest.approx(1 - labels.count("unclear") / len(labels))


def test_an_unclear_answer_is_wrong_not_missing():
    found = closed(["yes", "unclear"], ["yes", "yes"])
    assert found["accuracy"] == 0.5 and found["parse_rate"] == 0.5
    assert found["accuracy_released"] == 1.0  # the released parser reads any hedge as yes


def test_a_failed_row_is_wrong_under_both_parsers():
    found = questions.closed(["", "yes"], ["yes", "yes"])
    assert found["accuracy"].point() == 0.5
    assert found["accuracy_released"].point() == 0.5


def test_always_yes_has_no_skill():
    found = closed(["yes"] * 10, ["yes"] * 8 + ["no"] * 2)
    assert found["accuracy"] == 0.8
    assert found["balanced_accuracy"] == 0.5 and found["mcc"] == 0.0


def test_auroc_and_ece_by_hand():
    found = closed(["yes"] * 4, ["yes", "no", "yes", "no"], [0.9, 0.8, 0.7, None])
    assert found["auroc"] == pytest.approx(0.5)  # .9 > .8, .7 < .8
    # three bins of one row each: |.9-1|, |.8-0|, |.7-1|
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.3) / 3)


def test_ece_of_a_calibrated_model_is_not_told_from_0():
    """The binned value is well above it; the printed one is corrected, its interval begins at 0."""
    from mmedrag.evaluation.metrics.statistics import difference, intervals, resample

    rng = np.random.default_rng(0)
    p = rng.random(300)
    truth = ["yes" if rng.random() < x else "no" for x in p]
    stat = questions.closed(truth, truth, list(p))["ece"]
    found = intervals({"ece": stat}, [None] * 300, 2000)["ece"]
    assert found.low == 0.0 and found.value < stat.point() and found.high < 0.15
    wrong = questions.closed(truth, truth, list(1 - p))["ece"]
    bad = intervals({"ece": wrong}, [None] * 300, 2000)["ece"]
    assert 0.4 < bad.low < bad.value < bad.high < 0.6
    assert bad.value == pytest.approx(wrong.point(), abs=0.01)
    drawn = resample([wrong, stat], np.arange(300), 200)
    gap = difference(bad.value - found.value, *drawn, 300)
    assert gap.value and (gap.low, gap.high, gap.p) == (None, None, None)


def test_without_probabilities_there_is_no_auroc():
    assert not {"auroc", "ece"} & set(closed(["yes"], ["yes"]))


def test_targets_in_the_field_s_forms():
    forms = {"Yes": "yes", "No.": "no", "- No.": "no", "No, not indicated by the film.": "no"}
    for text, label in forms.items():
        assert questions.read_target(text) == label


def test_open_answers():
    found = questions.open_answers(
        ["The left lung.", "two", "", "left-sided"], ["left lung", "three", "x", "left sided"]
    )
    assert found["exact_match"].values.tolist() == [1, 0, 0, 1]
    assert questions.token_f1("large left effusion", "left effusion") == pytest.approx(4 / 5)
    assert questions.token_f1("", "") == 1.0 and questions.token_f1("", "a b") == 0.0


def test_findings_micro_average_by_hand():
    said = [{"effusion", "nodule"}, set(), {"fracture"}]
    truth = [{"effusion"}, set(), {"effusion", "fracture"}]
    found = questions.findings(said, truth)  # tp 2, fp 1, fn 1
    assert found["finding_precision"].point() == pytest.approx(2 / 3)
    assert found["finding_recall"].point() == pytest.approx(2 / 3)
    assert found["finding_f1"].point() == pytest.approx(2 / 3)
    assert found["finding_f1"].values.tolist() == pytest.approx([2 / 3, 1.0, 2 / 3])


def test_retrieval_metrics():
    found = questions.retrieval([0, 4, None, 9])
    assert found["recall@1"].point() == 0.25 and found["recall@5"].point() == 0.5
    assert found["recall@10"].point() == 0.75
    assert found["mrr"].point() == pytest.approx((1 + 1 / 5 + 0 + 1 / 10) / 4)


def test_reliability_points():
    points = questions.reliability([0.95, 0.91, 0.1, None], ["yes", "no", "no", "yes"])
    assert [(p["p_yes"].n, p["share_yes"].n) for p in points] == [(1, 1), (2, 2)]
    assert points[1]["p_yes"].point() == pytest.approx(0.93)
    assert points[1]["share_yes"].point() == 0.5


def test_every_contract_name_is_computed_somewhere():
    from mmedrag.evaluation.metrics import text as metrics_text
    from mmedrag.evaluation.reliance import DENOMINATORS

    made = set(questions.closed(["yes", "no"], ["yes", "no"], [0.9, 0.2]))
    made |= set(questions.open_answers(["a"], ["a"])) | set(questions.findings([{"a"}], [{"a"}]))
    made |= set(metrics_text.bleu(["a"], ["a"])) | set(metrics_text.rouge(["a"], ["a"]))
    made |= {"meteor", "recall@k", *questions.retrieval([0]), *DENOMINATORS}
    assert set(questions.CONTRACT_NAMES) <= made
