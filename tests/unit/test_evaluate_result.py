"""The typed result: what is written is what was found, and what earlier versions wrote opens."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest

from mmedrag.evaluation.metrics.statistics import Difference, Estimate, Interval
from mmedrag.evaluation.result import (
    Breakdown,
    Comparison,
    ControlScore,
    Environment,
    EvaluationResult,
    Gap,
    NamedControl,
    NotComputed,
    Rate,
    ReliabilityPoint,
    RunResult,
    Scores,
    SubgroupScore,
    SystemReliance,
)
from mmedrag.records.records import UserError

HALF = Estimate(0.5, 0.4, 0.6, 9)
UNDEFINED = Estimate(None, None, None, 0)


def full() -> EvaluationResult:
    """Every type and every field of them."""
    gap = Difference(0.1, -0.05, 0.2, 0.3, 9, "paired bootstrap")
    scores = Scores(
        n=9,
        patients=3,
        failed=1,
        metrics={"accuracy": HALF, "mcc": UNDEFINED},
        controls={"constant": {"accuracy": ControlScore(0.4, 0.3, 0.5, 9, gap)}},
        not_computed={"generator_noise": "needs a run"},
        marked={"accuracy": "constant"},
        generator_marked={"accuracy": "generator_blank"},
        without_p_yes=2,
    )
    control = NamedControl("constant", 0.4, 0.3, 0.5, 9)
    return EvaluationResult(
        schema=1,
        seed=0,
        resamples=100,
        runs={
            "base": RunResult(
                "base – “a”",
                "clean/none",
                True,
                9,
                1,
                {"vqa_closed": {"overall": scores}},
                {"overall": replace(scores, rules=["all"])},
                confusion={"overall": {"yes": {"yes": HALF}}},
                routing={"radiology": {"radiology": HALF}},
                reliability=[ReliabilityPoint(HALF, HALF)],
            ),
            "noise": RunResult("noise", "noise:blank/none", False, 9, 0, {}, {}),
        },
        reliance={
            "base": SystemReliance("base", "m", {"follow_rate": Rate(1.0, 0.0, 1.0, 3, "x")}, {})
        },
        comparisons=[
            Comparison("report", "rouge_l", "a", "b", 0.0, None, None, None, 9, "t", None)
        ],
        subgroups={
            "base": {
                "vqa_closed": {
                    "meta.sex": {
                        "accuracy": Breakdown(
                            {"f": SubgroupScore(0.5, 0.4, 0.6, 9, control, True)},
                            Gap(0.1, 0.0, 0.2, 18, 0.04),
                        ),
                        "mcc": Breakdown({}, None, "fewer than two groups of 10 rows"),
                    },
                    "meta.age": NotComputed("no row has meta.age"),
                }
            }
        },
        signatures={"rouge": "rouge_score"},
        not_computed={"meteor": "needs WordNet"},
        environment=Environment({"python": "3.11"}, None, "linux", None, {"base": "abc"}),
    )


def test_what_is_written_is_read_again(tmp_path):
    result, path = full(), tmp_path / "metrics.json"
    result.write(path)
    again = EvaluationResult.read(path)
    assert again == result
    assert json.loads(path.read_text()) == result.to_json()
    first = path.read_bytes()
    again.write(path)
    assert path.read_bytes() == first


def test_the_file_has_the_fields_in_their_order():
    """The order of the types is that of the file; a key that a type lacks would be lost."""

    def check(value, found):
        if is_dataclass(value):
            names = [f.name for f in fields(value)]
            assert [n for n in names if n in found] == list(found)
            assert set(names) - set(found) <= {"rules", "note"}
            for name in found:
                check(getattr(value, name), found[name])
        elif isinstance(value, dict):
            assert list(value) == list(found)
            for key in value:
                check(value[key], found[key])
        elif isinstance(value, list):
            for own, there in zip(value, found, strict=True):
                check(own, there)
        else:
            assert value == found

    result = full()
    bare = replace(result, runs={"base": result.runs["base"]})  # "noise" has absent fields
    check(bare, bare.to_json())


def test_absent_fields_stay_absent_and_undefined_ones_are_null():
    result = full()
    noise = result.to_json()["runs"]["noise"]
    assert set(noise) == {"title", "condition", "plain", "n", "failed", "tasks", "retrieval"}
    assert "not_computed" not in replace(result, not_computed={}).to_json()
    scores = result.to_json()["runs"]["base"]["tasks"]["vqa_closed"]["overall"]
    assert "rules" not in scores
    assert scores["metrics"]["mcc"] == {"value": None, "low": None, "high": None, "n": 0}
    breakdown = result.to_json()["subgroups"]["base"]["vqa_closed"]["meta.sex"]
    assert "note" not in breakdown["accuracy"] and breakdown["mcc"]["gap"] is None


def test_a_file_of_an_earlier_version_opens(tmp_path):
    """Without the tables of classes and the rules, and with a key that is no longer written."""
    found = full().to_json()
    del found["not_computed"]
    base = found["runs"]["base"]
    for name in ("confusion", "routing", "reliability"):
        del base[name]
    del base["retrieval"]["overall"]["rules"]
    base["system"] = "m {}"
    path = tmp_path / "metrics.json"
    old = json.dumps(found).replace("generator_blank", "blank_image")
    path.write_text(old.replace("generator_noise", "noise_image"))
    result = EvaluationResult.read(path)
    assert result.runs["base"].confusion is None and result.not_computed == {}
    assert result.runs["base"].retrieval["overall"].rules is None
    del base["system"]
    assert result.to_json() == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ("[]", "expected a metrics.json"),
        ("{}", "schema: .*required"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "metrics.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"metrics.json: .*{message}") as error:
        EvaluationResult.read(path)
    assert "\n" not in str(error.value)


def test_a_wrong_field_is_named(tmp_path):
    found = full().to_json()
    found["runs"]["base"]["tasks"]["vqa_closed"]["overall"]["metrics"]["accuracy"]["n"] = "many"
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="runs.base.tasks.vqa_closed.overall.metrics.accuracy.n: "):
        EvaluationResult.read(path)


def test_estimates_are_rounded_and_undefined_is_none():
    assert Estimate.of(Interval(1 / 3, float("nan"), None, 3)) == Estimate(0.333333, None, None, 3)
    rate = Rate.of(Interval(0.5, 0.1, 0.9, 2), denominator="rows")
    assert (rate.value, rate.n, rate.denominator) == (0.5, 2, "rows")


def test_scores_know_what_is_defined():
    scores = full().runs["base"].scores("vqa_closed")
    assert scores.known("accuracy") == HALF
    assert scores.known("mcc") is None and scores.known("rouge_l") is None
    assert full().runs["noise"].scores("vqa_closed") is None
