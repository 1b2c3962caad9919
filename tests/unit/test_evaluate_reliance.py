"""Reliance metrics by hand, on traces written out in full."""

import pytest

from mmedrag.evaluation.reliance import DENOMINATORS, missing, reliance
from mmedrag.records.records import Answer, Condition, Noise, Prompt, Trace

NOISE = Noise(kind="gaussian_clip", seed=1)


def trace(number, said, truth="yes", image="clean", references="none", shown=(), **meta):
    return Trace(
        example_id=f"e{number}",
        task="vqa",
        question="Is there an effusion?",
        patient=f"p{number}",
        answer_type="closed",
        target=truth,
        answer=Answer(text=said),
        meta=meta,
        condition=Condition(
            image=image, noise=NOISE if image == "noise" else None, references=references
        ),
        prompt=Prompt(template="t", text="q", references=list(shown)),
    )


def condition(answers, **more):
    return [trace(i, said, **more) for i, said in enumerate(answers)]


def test_rates_of_the_contract_by_hand():
    rows = condition(["yes", "yes", "no", "no"])  # without references: right, right, wrong, wrong
    rows += condition(["yes", "no", "yes", "no"], references="selected")
    rows += condition(["yes", "no", "no", "no"], image="noise")
    rows += condition(["yes", "yes", "yes", "no"], image="noise", references="selected")
    found = reliance(rows, resamples=200)
    value = {name: cell.value for name, cell in found.items()}
    assert value["copy_reference_rate"] == 0.75
    assert value["noise_floor"] == 0.25
    assert value["excess_copying"] == 0.5
    assert value["over_reliance_rate"] == 0.5 and found["over_reliance_rate"].n == 2
    assert value["reference_gain"] == 0.25 and value["reference_harm"] == 0.25
    assert value["oracle_accuracy"] == 0.75
    # right on noise with references, of the two that were right on the clean image with them
    assert value["copy_reference_rate_still_right"] == 1.0
    assert set(found) <= set(DENOMINATORS)
    assert all(cell.denominator for cell in found.values())
    assert set(missing(found)) == {"follow_rate", "image_sensitivity", "image_sensitivity_refs"}


def test_gain_minus_harm_is_the_change_of_accuracy():
    without, with_ = ["yes", "no", "no", "no", "yes"], ["yes", "yes", "yes", "no", "no"]
    rows = condition(without) + condition(with_, references="all")
    value = {name: cell.value for name, cell in reliance(rows, 50).items()}
    change = (with_.count("yes") - without.count("yes")) / 5
    assert value["reference_gain"] - value["reference_harm"] == pytest.approx(change)
    # the identity of the docstring
    assert value["over_reliance_rate"] == pytest.approx(value["reference_harm"] / (2 / 5))


def test_follow_rate_counts_only_shown_contradictions_and_unclear_does_not_follow():
    rows = [
        trace(0, "no", references="contradicting", shown=["r"]),
        trace(1, "yes", references="contradicting", shown=["r"]),
        trace(2, "It is hard to tell.", references="contradicting", shown=["r"]),
        trace(3, "no", references="contradicting"),  # nothing was shown: no denominator
        trace(4, "yes", truth="no", references="contradicting", shown=["r"]),
    ]
    found = reliance(rows, 50)
    assert found["follow_rate"].value == 0.5 and found["follow_rate"].n == 4
    rows += condition(["no", "yes", "yes", "yes"]) + [trace(4, "no", truth="no")]
    assert reliance(rows, 50)["follow_floor"].value == 0.25


def test_image_sensitivity_separates_asked_and_other_findings():
    rows = condition(["yes", "yes", "yes"])
    rows += [
        trace(10, "no", truth="no", twin_of="e0", flipped="effusion"),
        trace(11, "yes", truth="no", twin_of="e1", flipped="effusion"),
        trace(12, "no", truth="yes", twin_of="e2", flipped="nodule"),
    ]
    found = reliance(rows, 50)
    assert (found["image_sensitivity"].value, found["image_sensitivity"].n) == (0.5, 2)
    assert (found["image_false_flips"].value, found["image_false_flips"].n) == (1.0, 1)


def test_image_sensitivity_with_references_stands_beside_the_one_without():
    """A system that looks at the picture alone, and copies once it has references."""
    looks = [trace(0, "yes"), trace(9, "no", truth="no", twin_of="e0")]
    blind = [
        trace(0, "yes", references="selected"),
        trace(9, "yes", truth="no", references="selected", twin_of="e0"),
    ]
    both = reliance(looks + blind, 50)
    assert both["image_sensitivity"].value == 1.0 and both["image_sensitivity_refs"].value == 0.0
    assert "image_sensitivity" in missing(reliance(blind, 50))
    assert "image_sensitivity_refs" in missing(reliance(looks, 50))


def test_conditions_join_by_id_and_failed_rows_are_wrong():
    rows = condition(["yes", "yes", "yes"])
    with_ = condition(["yes", "yes"], references="selected")  # e2 was not run
    with_[1].answer, with_[1].error = None, "out of memory"
    found = reliance(rows + with_, 50)
    assert found["over_reliance_rate"].n == 2 and found["over_reliance_rate"].value == 0.5


def test_reports_and_open_questions_have_no_reliance():
    report = Trace(example_id="r", task="report", target="Clear.", answer=Answer(text="Clear."))
    assert reliance([report], 10) == {}
