"""Preference pairs from traces: the table of kinds, both modes, drops and refusals with counts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from mmedrag.answering.generators.scripted import ScriptedGenerator
from mmedrag.pipeline.pipeline import Pipeline
from mmedrag.preference.pairs.build import PairSettings, make_pairs
from mmedrag.preference.pairs.construct import build_pairs
from mmedrag.preference.pairs.files import read_pairs, write_pairs
from mmedrag.preference.pairs.held_out import HeldOut
from mmedrag.preference.pairs.judge import Criterion
from mmedrag.records.answers import token_f1, verdict
from mmedrag.records.conditions import CONDITIONS, ConditionSpec, by_condition
from mmedrag.records.pair_kinds import KINDS, PAPER_KINDS
from mmedrag.records.records import Answer, Condition, Hit, Noise, Prompt, Trace, UserError
from mmedrag.runtime.data_folder import DataFolder

ALL = (*PAPER_KINDS, "stage1")


def trace(
    example: str, condition: str, answer: str, target: str = "Yes", task: str = "vqa", **changes
) -> Trace:
    noisy, refs = condition.startswith("noise"), condition.endswith("-references")
    text = f"{'with ref. ' if refs else ''}Is it there ({example})?"
    fields = dict(
        example_id=example,
        task=task,
        question="Is it there?" if task == "vqa" else None,
        answer_type="closed" if task == "vqa" else None,
        patient=f"p-{example}",
        split="val",
        image=f"images/{example}.png",
        target=target,
        target_domain="radiology",
        condition=Condition(
            image="noise" if noisy else "clean",
            noise=Noise(kind="gaussian_clip", seed=len(example)) if noisy else None,
            references="selected" if refs else "none",
        ),
        prompt=Prompt(template="t/x@1", text=text, references=["r1"] if refs else []),
        answer=Answer(text=answer),
    )
    return Trace(**{**fields, **changes})


def four(example: str, clean: str, clean_ref: str, noise: str, noise_ref: str, **kw) -> list[Trace]:
    texts = (clean, clean_ref, noise, noise_ref)
    return [trace(example, c.slug, t, **kw) for c, t in zip(CONDITIONS, texts, strict=True)]


def build(*groups: list[Trace], **options):
    return build_pairs(by_condition([t for g in groups for t in g]), **options)


def test_each_kind_of_the_paper() -> None:
    found = build(
        four("cm", "No.", "Yes.", "No.", "Yes."),  # also copy: wrong without, right with
        four("oa1", "No.", "Yes.", "No.", "No."),
        four("oa2", "Yes.", "No.", "Yes.", "No."),
        four("s1", "Yes.", "Yes.", "No.", "No."),
        kinds=ALL,
    )
    assert [p.id for p in found.pairs] == [
        "cross_modal:cm",
        "resist:oa2",
        "copy:cm",
        "copy:oa1",
        "stage1:s1",
    ]
    by_id = {p.id: p for p in found.pairs}
    cm = by_id["cross_modal:cm"]
    assert (cm.chosen.text, cm.rejected.text) == ("Yes", "Yes.")  # y against M(x*, q + x_r)
    assert cm.chosen.noise is None and cm.rejected.noise.kind == "gaussian_clip"
    assert cm.chosen.image == cm.rejected.image == "images/cm.png"
    assert cm.reference_ids == ["r1"]
    assert cm.trace_ids == ["cm@clean+references", "cm@noise+references"]
    copy = by_id["copy:oa1"]
    assert (copy.chosen.text, copy.rejected.text) == ("Yes", "No.")
    assert copy.chosen.prompt.text == copy.rejected.prompt.text == "with ref. Is it there (oa1)?"
    resist = by_id["resist:oa2"]
    assert (resist.chosen.text, resist.rejected.text) == ("Yes", "No.")
    assert resist.chosen.noise is None and resist.rejected.noise is None
    stage1 = by_id["stage1:s1"]
    assert stage1.chosen.prompt.text == "Is it there (s1)?" and stage1.reference_ids == []
    assert stage1.rejected.noise is not None and stage1.rejected.text == "No."
    assert all(p.reason == KINDS[p.kind].reason and p.patient for p in found.pairs)
    assert found.counts["pairs"] == {"cross_modal": 1, "resist": 1, "copy": 2, "stage1": 1}


def test_own_prompts() -> None:
    found = build(four("oa2", "Yes.", "No.", "", ""), kinds=("resist",), prompts="own")
    assert found.pairs[0].chosen.prompt.text == "Is it there (oa2)?"
    assert found.pairs[0].rejected.prompt.text == "with ref. Is it there (oa2)?"


def test_released_mode() -> None:
    """Chosen is the model's own answer; a hedge counts as yes; D_cm is half of the rest."""
    groups = [four(f"cm{i}", "Yes.", "It could be.", "No.", "Yes indeed.") for i in range(5)]
    groups += [four(f"b{i}", "Yes, it is.", "No.", "No.", "No.") for i in range(3)]
    groups += [four(f"c{i}", "No.", "Yes, there.", "No.", "No.") for i in range(3)]
    found = build(*groups, mode="released")
    kinds = [p.kind for p in found.pairs]
    assert kinds == ["cross_modal"] * 3 + ["resist"] * 3 + ["copy"] * 3
    assert found.counts["dropped"]["cross_modal"]["balance"] == 2
    expected = random.Random(42).sample([f"cross_modal:cm{i}" for i in range(5)], 3)
    assert [p.id for p in found.pairs[:3]] == expected
    assert found.pairs[0].chosen.text == "It could be."  # hedge, right under the released parser
    assert {p.chosen.text for p in found.pairs[3:6]} == {"Yes, it is."}
    assert all(p.meta["redraw_noise"] for p in found.pairs)
    dropped = build(*groups).counts["dropped"]  # paper mode: the hedge is unclear
    assert {kind: dropped[kind]["unclear"] for kind in dropped} == dict.fromkeys(PAPER_KINDS, 5)


def test_even_answers_do_not_tell_whether_references_were_right() -> None:
    """In each domain and kind as many yes as no, and as many copy as resist pairs."""
    groups = [four(f"r{i}", "Yes.", "No.", "", "") for i in range(7)]
    groups += [four(f"s{i}", "No.", "Yes.", "", "", target="No") for i in range(3)]
    groups += [four(f"c{i}", "No.", "Yes.", "", "") for i in range(4)]
    groups += [four(f"d{i}", "Yes.", "No.", "", "", target="No") for i in range(9)]
    other = dict(target_domain="pathology")
    groups += [four(f"e{i}", "No.", "Yes.", "", "", **other) for i in range(2)]  # copy, yes alone
    groups += [four("open", "left", "right", "", "", target="left", answer_type="open")]
    groups += [report("t", ["It is so.", "No.", "", ""], "It is so.")]
    found = build(*groups, kinds=("resist", "copy"), even=True)
    told = Counter((p.kind, p.chosen.text, p.meta["task"]) for p in found.pairs)
    even = {(k, a, "vqa"): 3 for k in ("copy", "resist") for a in ("Yes", "No")}
    assert told == {**even, ("resist", "It is so.", "report"): 1}
    assert found.counts["pairs"] == {"resist": 7, "copy": 6}
    assert found.counts["dropped"] == {"resist": {"uneven": 5}, "copy": {"uneven": 9}}
    again = build(*groups, kinds=("resist", "copy"), even=True)
    assert [p.id for p in again.pairs] == [p.id for p in found.pairs]
    alone = build(*groups, kinds=("resist",), even=True).pairs  # yes and no; the open one stays
    assert Counter(p.chosen.text for p in alone) == {"Yes": 3, "No": 3, "left": 1, "It is so.": 1}


def test_unaided_pairs_are_drawn_as_often_as_the_model_is_unsure() -> None:
    """Right draw over wrong draw with probability p(1 - p), whichever side the truth is on."""
    asked = [
        trace(f"q{i}", "clean", "Yes.", target=("Yes", "No")[i % 2]).model_copy(
            update={"answer": Answer(text="Yes.", p_yes=p)}
        )
        for i, p in enumerate([0.8] * 1000 + [1.0] * 50 + [0.0] * 50)
    ]
    lost = [trace("words", "clean", "Yes, there is."), trace("silent", "clean", "No.")]
    lost[0] = lost[0].model_copy(update={"answer": Answer(text="Yes, there is.", p_yes=0.5)})
    found = build(asked, lost, kinds=("unaided",))
    told = Counter((p.chosen.text, p.rejected.text) for p in found.pairs)
    assert set(told) == {("Yes", "No."), ("No", "Yes.")}
    for count in told.values():  # 500 × 0.16 = 80, standard deviation 8
        assert 50 < count < 110
    assert all(p.chosen.prompt == p.rejected.prompt for p in found.pairs)
    assert found.counts["dropped"] == {"unaided": {"no_probability": 2}}
    again = build(asked, lost, kinds=("unaided",))
    assert [p.id for p in again.pairs] == [p.id for p in found.pairs]


def test_drawn_copy_pairs_are_as_many_as_probability_says() -> None:
    """Wrong without references (0.4) and right with them (0.7); the likelier answers agree."""
    asked = []
    for i in range(1000):
        for condition, p in (("clean", 0.6), ("clean-references", 0.7)):
            answer = Answer(text="Yes", p_yes=p)
            asked.append(trace(f"q{i}", condition, "").model_copy(update={"answer": answer}))
    assert not build(asked, kinds=("copy",)).pairs
    with pytest.raises(UserError, match="drawn has 'resist', expected some of copy"):
        build(asked, kinds=("copy",), drawn=("resist",))
    found = build(asked, kinds=("copy",), drawn=("copy",))
    assert 230 < len(found.pairs) < 330  # 280, standard deviation 14
    assert {(p.chosen.text, p.rejected.text) for p in found.pairs} == {("Yes", "No")}


def test_released_noise_is_the_trainer_s() -> None:
    """Generation may add noise to the picture; the released trainer always used pure noise."""
    group = four("a", "Yes.", "Yes.", "No.", "Yes.")
    for t in group[2:]:
        t.condition.noise = Noise(kind="additive", seed=7, params={"sigma": 1.0})
    (pair,) = build(group, mode="released", kinds=("cross_modal",), balance=None).pairs
    assert pair.rejected.noise == Noise(kind="gaussian_clip", seed=7)
    (pair,) = build(group, kinds=("cross_modal",)).pairs
    assert pair.rejected.noise.kind == "additive"


def report(example: str, texts: list[str], target: str, **kw) -> list[Trace]:
    return four(example, *texts, target=target, task="report", **kw)


def test_released_report_correctness_by_hand() -> None:
    """First-sentence BLEU against the mean over both compared files; chosen is the report."""
    target = "The heart is enlarged today. Lungs are clear."
    exact = "The heart is enlarged today. Something else entirely that is not scored."
    other = "Small nodules on both sides here. The heart is enlarged today."
    found = build(
        report("a", [exact, other, other, other], target),  # right without, wrong with
        report("b", [other, exact, other, exact], target),
        mode="released",
        balance=None,
    )
    assert [p.id for p in found.pairs] == ["cross_modal:b", "resist:a", "copy:b"]
    assert {p.chosen.text for p in found.pairs} == {target}
    means = found.counts["score_means"]
    assert 0.4 < means["resist"]["radiology"] < 0.6  # two of four sentences are exact


def test_one_word_reports_do_not_break_bleu() -> None:
    group = report("a", ["Normal.", "", "x", "y"], "Normal.")
    found = build(group, mode="released", kinds=("resist",))
    assert found.counts["dropped"]["resist"] == {"empty": 1}  # the rejected text is empty


def test_report_criterion_with_thresholds() -> None:
    def score(t: Trace) -> float:
        return float(t.answer.text)

    criterion = Criterion(report_score=score, report_right=0.8, report_wrong=0.5)
    found = build(
        report("a", ["0.9", "0.4", "0", "0"], "GT"),
        report("b", ["0.9", "0.6", "0", "0"], "GT"),  # between: unclear
        kinds=("resist",),
        criterion=criterion,
    )
    assert [p.id for p in found.pairs] == ["resist:a"]
    assert found.counts["dropped"]["resist"]["unclear"] == 1
    with pytest.raises(UserError, match="report_wrong"):
        Criterion(report_right=0.2, report_wrong=0.5)


def test_paper_report_default_is_token_f1_against_the_mean_per_domain() -> None:
    found = build(
        report("a", ["heart is big", "lungs clear", "", ""], "heart is big"),
        report("b", ["x", "y", "", ""], "z", target_domain="pathology"),
        kinds=("resist",),
    )
    assert [p.id for p in found.pairs] == ["resist:a"]
    assert found.counts["score_means"]["resist"] == {"pathology": 0.0, "radiology": 0.5}
    assert token_f1("the heart", "heart, the big!") == pytest.approx(2 / 3)  # articles do not count
    assert token_f1("", "x") == 0.0


def test_benchmark_reports_by_exact_findings() -> None:
    from mmedrag.phantom import grammar
    from mmedrag.preference.pairs.judge import benchmark_criterion
    from mmedrag.records.records import Finding, Truth

    study = {"cardiomegaly": Finding(present=True)}
    yes, no = "The heart is enlarged.", "Nothing that this grammar knows."
    assert grammar.label_report("radiology", yes)["findings"]["cardiomegaly"]["present"]
    truth = Truth(study="s", patient="p", domain="radiology", findings=study)
    group = report("a", [yes, no, "", ""], "GT", meta={"study": "s"})
    criterion = benchmark_criterion({"s": truth})
    found = build(group, kinds=("resist", "copy"), criterion=criterion)
    assert [p.id for p in found.pairs] == ["resist:a"]
    assert benchmark_criterion({}) is None


def test_open_questions() -> None:
    kw = {"answer_type": "open"}
    group = four("a", "left lung", "right", "", "", target="left lung", **kw)
    assert [p.id for p in build(group, kinds=("resist",)).pairs] == ["resist:a"]
    assert not build(group, kinds=("resist",), mode="released").pairs


def test_drops_with_counts() -> None:
    kinds = ("resist",)
    no_refs = four("a", "Yes.", "No.", "", "")
    no_refs[1].prompt = Prompt(template="t", text="q")
    failed = four("b", "Yes.", "No.", "", "")
    failed[0].error = "boom"
    lone = four("c", "Yes.", "No.", "", "")[:1]
    unclear = four("d", "Perhaps.", "No.", "", "")
    no_target = four("e", "Yes.", "No.", "", "", target="")
    empty = four("f", "Yes", "", "", "", target="left", answer_type="open")
    empty[0].answer = Answer(text="left")
    good = four("g", "Yes.", "No.", "", "")
    found = build(no_refs, failed, lone, unclear, no_target, empty, good, kinds=kinds)
    assert [p.id for p in found.pairs] == ["resist:g"]
    assert found.counts["dropped"]["resist"] == {
        "empty": 1,
        "failed": 1,
        "incomplete": 1,
        "no_references": 1,
        "no_target": 1,
        "unclear": 1,
    }


def test_identical_sides_are_dropped() -> None:
    """Same text, image and prompt on both sides: nothing to prefer."""
    group = four("a", "Yes.", "Yes.", "Yes.", "Yes.")
    for t in group[2:]:
        t.condition = t.condition.model_copy(update={"noise": None})
    found = build(group, mode="released", kinds=("cross_modal",), balance=None)
    assert not found.pairs and found.counts["dropped"] == {"cross_modal": {"identical": 1}}


def test_identical_texts_with_different_images_stay() -> None:
    found = build(four("a", "Yes.", "Yes", "No.", "Yes"), kinds=("cross_modal",))
    assert found.pairs[0].chosen.text == found.pairs[0].rejected.text == "Yes"


def test_join_is_by_id_never_by_position() -> None:
    groups = [four("a", "Yes.", "No.", "", ""), four("b", "No.", "Yes.", "", "")]
    by = by_condition([t for g in groups for t in g])
    by["clean-references"].reverse()
    found = build_pairs(by, kinds=("resist", "copy"))
    assert [p.id for p in found.pairs] == ["resist:a", "copy:b"]


def test_bad_calls() -> None:
    group = four("a", "Yes.", "No.", "Yes.", "No.")
    with pytest.raises(UserError, match="no traces under condition 'noise'"):
        build(group[:2], kinds=("stage1",))
    with pytest.raises(UserError, match="two traces under condition"):
        build(group, group)
    with pytest.raises(UserError, match="mode 'own'"):
        build(group, mode="own")
    with pytest.raises(UserError, match="kinds"):
        build(group, kinds=("d_cm",))
    with pytest.raises(UserError, match="given as 'noise'"):
        build_pairs({"clean": group[:1], "noise": group[:1]}, kinds=("stage1",))
    assert build(group[:2], kinds=("resist", "copy")).pairs  # noise is not needed for these


def test_held_out_patients_and_test_split(tmp_path: Path) -> None:
    (tmp_path / "train_ids.jsonl").write_text(
        '{"id": "x", "patient": "p-a", "sha256": "00"}\n{"id": "y", "patient": null}\n'
    )
    held = HeldOut().add_trained(tmp_path)
    found = build(
        four("a", "Yes.", "No.", "", ""),
        four("b", "Yes.", "No.", "", "", split="test"),
        four("c", "Yes.", "No.", "", ""),
        kinds=("resist",),
        held_out=held,
        root=tmp_path,
    )
    assert [p.id for p in found.pairs] == ["resist:c"]
    assert found.counts["refused"] == {"resist": {"retriever_patient": 1, "test_split": 1}}


def test_what_the_retriever_was_trained_on_is_held_out(small_data: Path, tmp_path: Path) -> None:
    """Without being told: the pipeline's encoder folder lists its training rows."""
    file = small_data / "examples.jsonl"
    file.write_text(file.read_text().replace('"split": "test"', '"split": "val"'))
    data = DataFolder(small_data)
    assert {row.split for row in data.examples()} == {"val"}
    folder = tmp_path / "retriever"
    folder.mkdir()

    class Searcher:
        encoder = SimpleNamespace(spec=str(folder))

        def search(self, rows, k):
            hit = Hit(id="s", text="A report.", score=0.5, rank=0)
            return [[hit] for _ in rows], [0] * len(rows)

    def pipeline() -> Pipeline:
        script = ScriptedGenerator("t", script=lambda r: "yes" if r.prompt.references else "no")
        return Pipeline(retrievers={"generic": Searcher()}, rule=None, generator=script)

    asked = PairSettings(kinds=("copy", "resist"), task="vqa")
    free = make_pairs(pipeline, data, tmp_path / "free", asked)
    assert not free["refused"] and free["pairs"] == {"copy": 12, "resist": 12}
    (folder / "train_ids.jsonl").write_text('{"id": "s00", "patient": "p0", "sha256": "00"}\n')
    held = make_pairs(pipeline, data, tmp_path / "held", asked)
    assert held["pairs"] == {"copy": 10, "resist": 10}
    assert held["refused"] == {k: {"retriever_patient": 2} for k in ("copy", "resist")}
    config = json.loads((tmp_path / "held" / "config.json").read_text())
    assert config["settings"]["held_out"] == ["retriever"]


def test_same_traces_give_same_bytes(tmp_path: Path) -> None:
    groups = [four(f"e{i}", "Yes.", "No.", "No.", "No.") for i in range(5)]
    for name in "xy":
        write_pairs(build(*groups), tmp_path / name, tmp_path, {"mode": "paper"})
    first, second = ((tmp_path / n / "pairs.jsonl").read_bytes() for n in "xy")
    assert first == second
    back = read_pairs(tmp_path / "x")
    assert len(back) == 5 and back[0].root.resolve() == tmp_path.resolve()
    assert back[0].to_json() == first.decode().splitlines()[0]


answers = st.sampled_from(["Yes.", "No.", "Perhaps.", ""])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(answers, answers, answers, answers, st.booleans()), max_size=12),
    mode=st.sampled_from(["paper", "released"]),
)
def test_properties(rows: list, mode: str) -> None:
    """Every pair's premises hold, resist and copy exclude each other, counts add up."""
    if not rows:
        return
    groups = [
        four(f"e{i}", *texts, target="Yes" if yes else "No") for i, (*texts, yes) in enumerate(rows)
    ]
    found = build(*groups, mode=mode, kinds=ALL)
    traces = {t.example_id: {} for g in groups for t in g}
    for g in groups:
        for t in g:
            traces[t.example_id][ConditionSpec.of(t).slug] = t
    seen: dict[str, set[str]] = {}
    for pair in found.pairs:
        example = pair.id.split(":")[1]
        seen.setdefault(example, set()).add(pair.kind)
        assert pair.chosen.text and pair.rejected.text
        assert pair.chosen != pair.rejected
        if mode == "paper":
            assert pair.chosen.text == traces[example]["clean"].target
            worse = traces[example][KINDS[pair.kind].worse.slug]
            assert pair.rejected.text == worse.answer.text.strip() != "Perhaps."
    assert not any({"resist", "copy"} <= kinds for kinds in seen.values())
    assert (
        sum(found.counts["pairs"].values()) == len(found.pairs) == len({p.id for p in found.pairs})
    )


def test_criterion_of_the_released_balance() -> None:
    groups = [four(f"cm{i}", "Yes.", "Yes.", "No.", "Yes.") for i in range(4)]
    assert not build(*groups, mode="released").pairs  # half of nothing
    assert len(build(*groups, mode="released", balance=None).pairs) == 4
    assert len(build(*groups).pairs) == 4


@pytest.mark.parametrize("even", [False, True])
def test_answers_in_sentences_make_the_pairs_that_words_make(even: bool) -> None:
    """Pairs read an answer with its question, as evaluation does."""
    sides = {"No": ("The heart is normal.", "There is cardiomegaly.")}
    sides["Yes"] = sides["No"][::-1]
    words = {"No": ("No.", "Yes."), "Yes": ("Yes.", "No.")}

    def asked(texts: dict[str, tuple[str, str]]) -> list[list[Trace]]:
        question = "Is there cardiomegaly?"
        return [
            four(target, *said, "", "", target=target, question=question)
            for target, said in texts.items()
        ]

    for group in asked(sides):
        assert [verdict(trace) for trace in group[:2]] == ["right", "wrong"]
    found, plain = (build(*asked(texts), kinds=("resist",), even=even) for texts in (sides, words))
    assert [p.id for p in found.pairs] == [p.id for p in plain.pairs] == ["resist:No", "resist:Yes"]
