"""Selection rules: hand-computed cuts, odd similarities, and the fit of the calibrated one."""

import math

import pytest
from hypothesis import given, strategies as st

from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.records.records import Hit, Selection, Trace, UserError
from mmedrag.retrieval import select
from mmedrag.retrieval.select import RuleSpec

NAN = float("nan")


def hits(*scores: float) -> list[Hit]:
    return [Hit(id=f"r{i}", text="t", score=s, rank=i) for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("rule", "scores", "params", "kept"),
    [
        # u = log(.4/.39) = .025, log(.39/.2) = .668: the first gap over .1 is the second
        ("log_ratio", [0.4, 0.39, 0.2, 0.1], {"gamma": 0.1}, 2),
        ("log_ratio", [0.4, 0.39, 0.2, 0.1], {"gamma": 0.7}, 4),  # log(.2/.1) = .693
        ("log_ratio", [0.4, 0.39, 0.2, 0.1], {"gamma": 0.02}, 1),
        ("log_ratio", [0.4, 0.39, 0.2, 0.1], {"gamma": 0.02, "min_k": 2}, 2),
        ("log_ratio", [0.4, 0.39, 0.38], {"gamma": 0.1, "k": 2}, 2),
        ("log_ratio", [0.3, 0.3, 0.3], {"gamma": 0.0}, 3),  # equal: no gap
        ("log_ratio", [0.4, 0.3, -0.1], {"gamma": 1.0}, 2),  # negative: dropped, not kept (B6)
        ("log_ratio", [0.4, 0.3, 0.0], {"gamma": 1.0}, 2),
        ("log_ratio", [-0.1, -0.2], {"gamma": 1.0}, 0),
        ("log_ratio", [0.4, NAN, 0.3], {"gamma": 1.0}, 1),
        ("log_ratio", [], {}, 0),
        ("log_ratio", [0.4], {}, 1),
        ("top1_ratio", [0.4, 0.3, 0.26], {"threshold": 1.5}, 2),  # .4/.3 = 1.33, .4/.26 = 1.54
        ("top1_ratio", [0.4, 0.3, 0.2], {"threshold": 2.0}, 2),  # strict: 2.0 is not below 2.0
        ("top1_ratio", [0.4, 0.3, 0.29], {"threshold": 1.5, "k": 1}, 1),
        ("top1_ratio", [0.4, 0.3, -0.3], {"threshold": 1.5}, 2),  # released: kept
        ("top1_ratio", [-0.1, -0.2], {"threshold": 1.5}, 0),  # released: everything kept
        ("fixed_k", [0.4, 0.3, 0.2], {"k": 2}, 2),
        ("fixed_k", [0.4, -0.3], {"k": 2}, 2),
        ("fixed_k", [0.4, NAN], {"k": 2}, 1),
        ("fixed_k", [0.4], {"k": 3}, 1),
        ("fixed_k", [0.4], {"k": 0}, 0),
        ("score_floor", [0.4, 0.3, 0.2], {"floor": 0.3}, 2),
        ("score_floor", [-0.1, -0.3], {"floor": -0.2}, 1),
        ("calibrated", [0.4, 0.3, 0.2], {"threshold": 0.25, "precision": 0.8}, 2),
        ("calibrated", [0.4, 0.3], {"threshold": None, "precision": 0.8}, 0),
    ],
)
def test_cut(rule: str, scores: list[float], params: dict, kept: int) -> None:
    selection = RuleSpec(rule, **params)(hits(*scores))
    assert selection.kept == [f"r{i}" for i in range(kept)]
    assert selection.reason
    assert selection.rule == rule


def test_paper_and_released_rules_differ_as_documented() -> None:
    """Small even steps: no adjacent gap, but a large cumulative one (SPEC §1.3)."""
    scores = hits(0.4, 0.34, 0.29, 0.25)  # every log ratio about .16, .4/.25 = 1.6
    assert len(RuleSpec("log_ratio", gamma=0.2)(scores).kept) == 4
    assert len(RuleSpec("top1_ratio", threshold=1.5)(scores).kept) == 3


def test_flat_similarities_are_not_cut() -> None:
    """CLIP similarities fall from 0.35 to 0.30: a ratio of 1.5 keeps all (SPEC §1.3)."""
    scores = hits(*[0.35 - 0.05 * i / 19 for i in range(20)])
    assert len(RuleSpec("top1_ratio", threshold=1.5)(scores).kept) == 20


def test_reason_names_the_gap() -> None:
    reason = RuleSpec("log_ratio", gamma=0.1)(hits(0.4, 0.39, 0.2)).reason
    assert reason == "gap 2: log ratio 0.6678 > gamma 0.1"
    assert "not positive" in RuleSpec("log_ratio", gamma=9.0)(hits(0.4, -0.1)).reason
    assert RuleSpec()([]).reason == "nothing was retrieved"


def test_defaults_are_recorded() -> None:
    assert RuleSpec("log_ratio", k=3)(hits(0.4)).params == {"gamma": 0.1, "min_k": 0, "k": 3}


@pytest.mark.parametrize(
    ("rule", "params", "message"),
    [
        ("log_ration", {}, "is not known, expected one of calibrated"),
        ("log_ratio", {"gama": 1.0}, "'gama' is not known, expected gamma, min_k, k"),
        ("log_ratio", {"gamma": "1"}, "gamma: got '1', expected a number"),
        ("log_ratio", {"gamma": NAN}, "expected a number"),
    ],
)
def test_bad_rules_are_refused(rule: str, params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        RuleSpec(rule, **params)


def test_threshold_of_one_is_refused() -> None:
    """The released rule keeps nothing at all with a threshold of 1 (B6)."""
    with pytest.raises(UserError, match="expected more than 1"):
        RuleSpec("top1_ratio", threshold=1.0)(hits(0.4, 0.3))


def test_a_rule_of_another_package() -> None:
    rule = RuleSpec("mmedrag.retrieval.select:fixed_k", k=1)
    assert rule(hits(0.4, 0.3)).kept == ["r0"]


scores = st.lists(st.floats(-1, 1) | st.just(NAN), max_size=12).map(
    lambda values: sorted(values, key=lambda v: (math.isnan(v), -v))
)
specs = st.sampled_from(
    [
        RuleSpec("log_ratio", gamma=0.1),
        RuleSpec("top1_ratio"),
        RuleSpec("fixed_k", k=4),
        RuleSpec("score_floor", floor=0.2),
        RuleSpec("calibrated", threshold=0.1),
        RuleSpec("log_ratio", gamma=0.5, min_k=2, k=5),
    ]
)


@given(scores, specs)
def test_kept_is_a_prefix_without_odd_values(values: list[float], rule: RuleSpec) -> None:
    selection = rule(hits(*values))
    count = len(selection.kept)
    assert selection.kept == [f"r{i}" for i in range(count)]
    assert not any(math.isnan(v) for v in values[:count])
    assert count <= rule.params.get("k", len(values))
    if rule.rule.endswith("ratio"):
        assert all(v > 0 for v in values[:count])


def test_questions_with_the_same_hits_are_cut_once() -> None:
    """The rule is asked once per list of hits, and each trace still gets its own list's cut."""
    asked = []

    def rule(found: list[Hit]) -> Selection:
        asked.append(found)
        return Selection(rule="first", kept=[found[0].id] if found else [])

    lists = [hits(0.4, 0.3), hits(0.4, 0.3), hits(0.3, 0.4), [], hits(0.4, 0.3)]
    traces = [Trace(example_id=f"e{n}", task="report", hits=h) for n, h in enumerate(lists)]
    lists[2][0].id = "other"
    Pipeline(rule=rule).select(traces)  # type: ignore[arg-type]
    kept = [trace.selection.kept for trace in traces if trace.selection]
    assert kept == [["r0"], ["r0"], ["other"], [], ["r0"]]
    assert len(asked) == 3


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.floats(0, 3), st.floats(0, 3))
def test_a_larger_gamma_never_keeps_fewer(values: list[float], a: float, b: float) -> None:
    values = sorted(values, reverse=True)
    few, many = select.log_ratio(values, min(a, b))[0], select.log_ratio(values, max(a, b))[0]
    assert few <= many


def test_fitted_threshold_reaches_its_precision() -> None:
    """Agreement rises with the score; the fitted floor keeps only where it is reached."""
    fit_scores = [i / 1000 for i in range(1000)]
    agrees = [(i * 7919) % 1000 < i for i in range(1000)]  # P(agrees | score s) = s
    params = select.fit_threshold(fit_scores, agrees, precision=0.8)
    above = [a for s, a in zip(fit_scores, agrees, strict=True) if s >= params["threshold"]]
    assert sum(above) / len(above) >= 0.8
    assert 0.55 < params["threshold"] < 0.75  # the mean over s..1 is 0.8 at s = 0.6
    kept = RuleSpec("calibrated", **params)(hits(0.9, params["threshold"], 0.1)).kept
    assert kept == ["r0", "r1"]


def test_unreachable_precision_keeps_nothing() -> None:
    params = select.fit_threshold([0.1 * i for i in range(100)], [False] * 100, precision=0.9)
    assert params["threshold"] is None
    selection = RuleSpec("calibrated", **params)(hits(0.9))
    assert selection.kept == []
    assert "no threshold reached" in selection.reason


def test_fit_does_not_split_ties() -> None:
    params = select.fit_threshold([0.5] * 30 + [0.4] * 30, [True] * 30 + [True, False] * 15, 0.9)
    assert params["threshold"] == 0.5
