"""Controls say what they claim to say."""

import numpy as np
import pytest

from mmedrag.evaluation import controls
from mmedrag.phantom.grammar import fill, load_domain
from mmedrag.phantom.questions import phrase
from mmedrag.phantom.reading import present_in, read_reference
from mmedrag.records.records import Example, Finding, Hit, Selection, Trace, Truth


def row(i, domain="radiology", question="Is it?", patient=None, target="yes", hit="", **meta):
    hits = [Hit(id=f"h{i}", text=hit, score=1.0, rank=0)] if hit else []
    return Trace(
        example_id=str(i),
        task="vqa",
        question=question,
        target=target,
        hits=hits,
        answer_type="closed",
        patient=patient,
        target_domain=domain,
        meta=meta,
    )


def test_leave_one_out_prior_never_sees_its_own_label():
    questions = ["a", "a", "a", "b"]
    said = controls.leave_one_out_prior(questions, ["yes", "no", "no", "yes"])
    # a: others say no,no -> no; yes,no (tie; others 2 of 3 yes) -> yes; b: alone, 1 of 3 yes -> no
    assert said.texts == ["no", "yes", "yes", "no"]
    assert said.p_yes == [0.0, 0.5, 0.5, pytest.approx(1 / 3)]


def test_shuffled_references_come_from_another_patient_of_the_same_domain():
    traces = [
        row(i, "radiology" if i < 20 else "pathology", patient=f"p{i // 3}") for i in range(40)
    ]
    texts = [f"{t.target_domain} {t.patient}" for t in traces]
    out = controls.shuffled(traces, texts, seed=1)
    for trace, own, text in zip(traces, texts, out, strict=True):
        assert text != own and text.startswith(trace.target_domain)
    assert out == controls.shuffled(traces, texts, seed=1) != controls.shuffled(traces, texts, 2)


def test_shuffling_one_patient_gives_nothing_rather_than_its_own():
    traces = [row(i, patient="p") for i in range(3)]
    assert controls.shuffled(traces, ["x", "y", "z"]) == ["", "", ""]


def test_question_prior_learns_from_train_alone_and_backs_off():
    def train(question, answer):
        return Example(
            id="x",
            task="vqa",
            question=question,
            answer=answer,
            answer_type="closed",
            domain="radiology",
        )

    rows = [train("Is it?", "yes")] * 3 + [train("Was it?", "no")] * 9
    traces = [row(0), row(1, question="was it"), row(2, question="new?")]
    known = controls.count_answers(rows, [r.answer for r in rows])
    said = controls.question_prior(known, traces)
    assert said.texts == ["yes", "no", "no"]
    assert said.p_yes[2] == pytest.approx(0.25)


def test_copied_reference_is_read_for_the_asked_finding():
    domain = load_domain("radiology")
    spec = next(s for s in domain.findings if s.sided)
    side, other = domain.single_sides[:2]
    text = fill(domain, spec, _sided(spec), _state(spec, side))

    def says(text, **meta):
        return read_reference(row(0, finding=spec.name, **meta), text)

    assert says(text, form="presence", side=None) == "yes"
    assert says(text, form="presence", side=side) == "yes"
    assert says(text, form="presence", side=other) == "no"
    assert says(text, form="negated", side=None) == "no"
    assert says(domain.normal[0], form="presence", side=None) == "no"
    assert says("", form="presence") == "" and says(text, form="why") == ""
    # open questions: the place, number or grade that it states of the asked finding
    assert says(text, form="where") == domain.sides[side][1]
    assert says(text, form="severity") == (spec.grades[0] if spec.grades else "")
    assert says(domain.normal[0], form="where") == ""


@pytest.mark.parametrize(("form", "words"), [("both", "Are both"), ("either", "Is")])
def test_the_side_of_the_second_finding_is_read(form, words):
    """A reference that has it on the other side only does not state it."""
    domain = load_domain("radiology")
    first = next(s for s in domain.findings if not s.sided)
    second = next(s for s in domain.findings if s.sided)
    left, right = domain.single_sides[:2]
    asked = phrase(domain, second, left)
    a = phrase(domain, first, None)
    templates = {
        "both": f"Are both {a} and {asked} present?",
        "either": f"Is {a} or {asked} present?",
    }
    meta = {"finding": first.name, "side": None, "other": second.name, "form": form}

    def said(side, *findings):
        texts = [
            fill(domain, s, s.positive[0] if not s.sided else _sided(s), _state(s, side))
            for s in findings
        ]
        return read_reference(row(0, question=templates[form], **meta), " ".join(texts))

    both = (first, second) if form == "both" else (second,)
    assert (said(left, *both), said(right, *both)) == ("yes", "no")
    assert templates[form].startswith(words)


def _sided(spec):
    return next(t for t in spec.positive if "{at}" in t or "{side}" in t)


def _state(spec, side):
    return Finding(
        present=True,
        side=side if spec.sided else None,
        count=1 if spec.most else None,
        severity=spec.grades[0] if spec.grades else None,
    )


def test_the_kept_references_vote_and_the_better_ranked_ones_break_a_tie():
    domain = load_domain("radiology")
    spec = domain.by_name["nodule"]
    yes, no = fill(domain, spec, _sided(spec), _state(spec, domain.single_sides[0])), "No nodules."

    def asked(kept, *texts):
        trace = row(0, hit="x", finding="nodule", form="presence")
        trace.hits = [Hit(id=str(i), text=t, score=1 - i / 10, rank=i) for i, t in enumerate(texts)]
        trace.selection = Selection(rule="r", kept=kept)
        return controls.vote(trace, read_reference)

    assert asked(["0", "1", "2"], yes, no, no) == "no"
    assert asked(["0", "1"], yes, no, no) == "yes"  # one each: the first
    assert asked(["0"], yes, no, no) == "yes"
    assert asked([], no, yes, yes) == "no"  # none kept: the top-1
    assert asked([]) == ""


def test_open_questions_have_the_controls_of_references_too():
    pytest.importorskip("mmedrag.phantom.chest")
    asked = {"finding": "nodule", "form": "count"}
    traces = [row(i, patient=f"p{i}", target="two", hit="No nodules.", **asked) for i in range(3)]
    found, missing = controls.open_controls(traces, None)
    assert {
        "copied_reference",
        "reference_vote",
        "shuffled_references",
        "constant_retrieved",
    } <= set(found)
    assert set(missing) == {"constant", "question_prior", "random_reference"}
    found, missing = controls.open_controls([row(0, hit="The lungs are clear.")], None)
    assert missing["copied_reference"] == controls.NOT_READABLE


def test_without_benchmark_questions_references_cannot_be_read():
    found, missing = controls.closed_controls([row(0, hit="The lungs are clear.")], None)
    assert "copied_reference" not in found
    assert missing["copied_reference"] == controls.NOT_READABLE


def test_best_constant_is_the_most_central_report():
    reports = (
        ["the lungs are clear and the heart is normal"] * 6
        + ["xyz"] * 3
        + ["the lungs are clear and the heart is large"] * 3
    )
    assert controls.best_constant(reports) == reports[0]


def test_word_f1_by_hand():
    found = controls.word_f1(["a a b"], ["a a", "c"])
    assert found.tolist() == [[pytest.approx(4 / 5), 0.0]]


def test_best_findings_constant_maximises_micro_f1_by_brute_force():
    pytest.importorskip("mmedrag.phantom.chest")
    from mmedrag.evaluation.metrics.questions import findings

    domain = load_domain("radiology")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        on = {s.name: bool(rng.random() < 0.4) for s in domain.findings}
        states = {
            s.name: Finding(
                present=True,
                side=domain.single_sides[0] if s.sided else None,
                count=1 if s.most else None,
                severity=(s.grades or (None,))[0],
            )
            for s in domain.findings
        }
        text = " ".join(
            fill(domain, s, s.positive[0], states[s.name]) for s in domain.findings if on[s.name]
        )
        truth = {n: states[n] if p else Finding(present=False) for n, p in on.items()}
        known = Truth(study=str(i), patient="p", domain="radiology", findings=truth)
        rows.append((text or domain.normal[0], known))
    best = controls.best_findings("radiology", rows)
    wanted = [{n for n, f in t.findings.items() if f.present} for _, t in rows]

    def score(text):
        said = present_in("radiology", text)
        return findings([said] * 30, wanted)["finding_f1"].point()

    assert score(best) == pytest.approx(max(score(text) for text, _ in rows))
