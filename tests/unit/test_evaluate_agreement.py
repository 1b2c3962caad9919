"""Agreement of references with cases: by hand, at its ends, and over patients."""

from __future__ import annotations

import pytest

from mmedrag.evaluation import Case, agreement, asked_cells, stated, true_of
from mmedrag.phantom import Knobs, cells, load_domain, read_reference, studies, write_report
from mmedrag.phantom.canvas import Rng
from mmedrag.phantom.questions import ask_closed
from mmedrag.phantom.sample import report
from mmedrag.records import Example, Finding, Trace

LEFT, RIGHT, HEART = ("effusion", "left"), ("effusion", "right"), ("heart", None)


def case(patient: str, truth: dict, said: set | None) -> Case:
    return Case(patient, truth, None if said is None else frozenset(said))


def test_by_hand() -> None:
    """Effusion: 1 of 2 present stated, 1 of 2 absent unstated; heart: 1 of 1 and 1 of 1."""
    found = agreement(
        [
            case("a", {LEFT: True, RIGHT: False, HEART: True}, {LEFT, RIGHT, HEART}),
            case("b", {LEFT: True, RIGHT: False, HEART: False}, set()),
            case("c", {LEFT: True, HEART: True}, None),  # found nothing: not counted
        ],
        corpus=7,
    )
    effusion, heart = found.findings["effusion"], found.findings["heart"]
    assert (effusion.value, effusion.n, effusion.present) == (0.5, 4, 2)
    assert (heart.value, heart.n, heart.present) == (1.0, 2, 1)
    assert heart.shuffled.value == 0.0  # each has the other's reference
    assert (found.mean.value, found.mean.n, found.mean.present) == (0.75, 6, 3)
    assert (found.cases, found.without, found.corpus) == (2, 1, 7)


def test_a_finding_that_is_never_there_is_not_in_the_mean() -> None:
    found = agreement(
        [
            case("a", {HEART: True, LEFT: False}, {HEART}),
            case("b", {HEART: False, LEFT: False}, set()),
        ],
        corpus=2,
    )
    assert found.findings["effusion"].value is None
    assert (found.mean.value, found.mean.n) == (1.0, 2)


def test_nothing_to_compare() -> None:
    found = agreement([case("a", {HEART: True}, None)], corpus=0)
    assert found.mean.value is None and not found.findings and found.without == 1
    alone = agreement([case("a", {HEART: True, LEFT: True}, {HEART, LEFT})], corpus=1)
    assert alone.mean.value is None


def benchmark(similarity: float, count: int = 400) -> list:
    spec = load_domain("radiology")
    return list(studies(spec, count, 5, Knobs(similarity=similarity)))


def test_the_own_report_agrees_and_a_strangers_says_nothing() -> None:
    """The own report says all but never contradicts: agreement 1 where nothing is in doubt."""
    spec = load_domain("radiology")
    knobs = Knobs(hedging=0.0)
    rows = benchmark(0.0)
    cases = [
        Case(
            s.patient,
            true_of("radiology", s.findings, cells(spec)),
            stated("radiology", report(spec, s, knobs)),
        )
        for s in rows
    ]
    found = agreement(cases, len(rows))
    assert found.mean.value == 1.0
    assert found.mean.shuffled.low < 0.5 < found.mean.shuffled.high
    assert found.mean.shuffled.high - found.mean.shuffled.low < 0.06
    again = agreement(cases, len(rows))
    assert found == again
    assert agreement(cases, len(rows), seed=1).mean.shuffled != found.mean.shuffled


@pytest.mark.parametrize("domain", ["radiology", "ophthalmology", "pathology"])
def test_reads_a_reference_as_the_controls_do(domain: str) -> None:
    """Every presence and negated question: what the reference states is what it answers."""
    spec = load_domain(domain)
    seen = set()
    for study in studies(spec, 60, 3, Knobs()):
        rng = Rng("agreement", study.id)
        text = write_report(spec, study.findings, study.attributes, rng)
        for form in ("presence", "negated"):
            asked = ask_closed(spec, study.findings, rng, form=form)
            meta = {"finding": asked.finding, "side": asked.side, "form": form}
            trace = Trace(example_id="x", task="vqa", meta=meta, target_domain=domain)
            there = (asked.finding, asked.side) in stated(domain, text)
            assert read_reference(trace, text) == ("yes" if there == (form == "presence") else "no")
            seen.add((form, there))
    assert len(seen) == 4


def test_questions_that_count() -> None:
    """Presence and negated ones, each finding and side once a study, image twins left out."""

    def row(number: int, **meta: object) -> Example:
        return Example(id=str(number), task="vqa", question="?", meta={"study": "s", **meta})

    rows = [
        row(0, form="presence", finding="nodule", side="left"),
        row(1, form="negated", finding="nodule", side="left"),
        row(2, form="both", finding="atelectasis", side="left"),
        row(3, form="where", finding="pneumothorax", side="left"),
        row(4, form="presence", finding="nodule", side="right", twin_of="s-q0"),
        row(5, form="presence", finding="made_up", side=None),
    ]
    asked = asked_cells(rows)
    assert asked == {"s": {("nodule", "left"), ("made_up", None)}}
    findings = {"nodule": Finding(present=True, side=load_domain("radiology").both)}
    assert true_of("radiology", findings, asked["s"]) == {("nodule", "left"): True}
