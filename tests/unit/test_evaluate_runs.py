"""evaluate(): run folders to metrics.json, with controls and marks."""

import json
import re

import numpy as np
import pytest

from mmedrag.cli.eval import headline
from mmedrag.evaluation.evaluate_runs import evaluate, scores_path
from mmedrag.evaluation.metrics.statistics import Difference
from mmedrag.evaluation.result import ControlScore, NotComputed
from mmedrag.evaluation.runs import load_runs, system_groups
from mmedrag.evaluation.scoring import marked
from mmedrag.records.records import (
    Answer,
    Condition,
    Domain,
    Example,
    Finding,
    Hit,
    Noise,
    Reference,
    Selection,
    Trace,
    Truth,
    UserError,
)
from mmedrag.report.tables import metric_cell
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import read_jsonl, write_jsonl

REPORTS = ["The heart is large.", "The lungs are clear.", "A left effusion is seen."]


def closed_trace(i, said, truth, domain="radiology", references="selected", noise=None, **more):
    return Trace(
        example_id=f"q{i:03d}",
        task="vqa",
        question=f"Is finding {i % 5} present?",
        answer_type="closed",
        patient=f"p{i // 2}",
        target=truth,
        target_domain=domain,
        domain=Domain(label=domain),
        hits=[Hit(id=f"r{i % 3}", text=REPORTS[i % 3], score=0.5, rank=0)],
        answer=Answer(text=said, p_yes=0.9 if said.startswith("y") else 0.1, model="m"),
        condition=Condition(
            image="noise" if noise else "clean", noise=noise, references=references
        ),
        **more,
    )


def report_trace(i, text):
    return Trace(
        example_id=f"r{i:03d}",
        task="report",
        patient=f"p{i}",
        target=REPORTS[i % 3],
        target_domain="radiology",
        answer=Answer(text=text, model="m"),
        hits=[Hit(id=f"r{(i + 1) % 3}", text=REPORTS[(i + 1) % 3], score=0.5, rank=0)],
    )


def write_run(folder, traces, **config):
    write_jsonl(folder / "traces.jsonl", traces)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def skilled(tmp_path):
    """Right in 9 of 10 balanced questions, in two domains."""
    rows = []
    for i in range(80):
        truth = "yes" if (i // 5) % 2 else "no"
        wrong = i % 10 == 3
        said = truth if not wrong else ("no" if truth == "yes" else "yes")
        rows.append(closed_trace(i, said, truth, "radiology" if i < 40 else "pathology"))
    return write_run(
        tmp_path / "skilled", rows + [report_trace(i, REPORTS[i % 3]) for i in range(9)]
    )


def test_metrics_json_has_what_the_contract_says(skilled, tmp_path):
    out = tmp_path / "metrics.json"
    result = evaluate([skilled], out=out, resamples=400)
    assert json.loads(out.read_text()) == result.to_json()
    group = result.runs["skilled"].tasks["vqa_closed"]
    assert set(group) == {"overall", "radiology", "pathology"}
    overall = group["overall"]
    assert (overall.n, overall.patients, overall.failed) == (80, 40, 0)
    cell = overall.metrics["accuracy"]
    assert cell.value == 0.9 and cell.low < 0.9 < cell.high and cell.n == 80
    assert {"always_yes", "always_no", "copied_reference"} <= {
        *overall.controls,
        *overall.not_computed,
    }
    for name in ("constant", "question_prior", "random_reference"):
        assert "--data" in overall.not_computed[name] or name == "random_reference"
    assert result.environment.versions["numpy"] == np.__version__
    assert "sacrebleu" in result.signatures["bleu_n"]
    assert "accuracy" not in overall.marked
    report = result.runs["skilled"].tasks["report"]["overall"]
    assert report.metrics["rouge_l"].value == 1.0
    assert report.controls["copied_reference"]["rouge_l"].value < 0.6


def test_per_example_scores_lie_beside_and_average_to_the_metric(skilled, tmp_path):
    out = tmp_path / "metrics.json"
    result = evaluate([skilled], out=out, resamples=50)
    from mmedrag.records.records import Score

    rows = list(read_jsonl(scores_path(out), Score))
    values = [r.value for r in rows if r.metric == "accuracy"]
    assert len(values) == 80
    metrics = result.runs["skilled"].tasks["vqa_closed"]["overall"].metrics
    assert np.mean(values) == pytest.approx(metrics["accuracy"].value)


def test_the_command_s_lines_have_the_best_control_and_bear_one_patient(skilled, tmp_path):
    said = headline(evaluate([skilled], resamples=50), tmp_path)
    line = next(x for x in said.splitlines() if "vqa_closed/overall  balanced_accuracy" in x)
    assert re.search(
        r"0\.9\d+ \[0\.\d+, [01]\.\d+\] n=80  control always (yes|no) 0\.500 \[0\.\d+, 0\.\d+\]$",
        line,
    )
    rows = [closed_trace(i, "yes", "yes" if i else "no") for i in range(2)]  # both of p0
    alone = headline(evaluate([write_run(tmp_path / "one", rows)], resamples=50), tmp_path)
    assert "balanced_accuracy 0.500 no interval n=2" in alone and "not clearly below" in alone


def test_same_seed_same_bytes(skilled, tmp_path):
    evaluate([skilled], out=tmp_path / "a.json", resamples=100)
    evaluate([skilled], out=tmp_path / "b.json", resamples=100)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.scores.jsonl").read_bytes() == (tmp_path / "b.scores.jsonl").read_bytes()


def test_a_system_that_always_says_yes_is_marked(tmp_path):
    rows = [closed_trace(i, "yes", "yes" if i % 7 else "no") for i in range(70)]
    result = evaluate([write_run(tmp_path / "yes", rows)], resamples=300)
    overall = result.runs["yes"].tasks["vqa_closed"]["overall"]
    assert overall.metrics["accuracy"].value > 0.85
    assert overall.marked["accuracy"] == "always_yes"
    assert overall.marked["auroc"] == "chance"
    assert overall.controls["always_yes"]["accuracy"].difference.value == 0.0


def test_a_reporter_that_copies_is_marked(tmp_path):
    rows = [report_trace(i, REPORTS[(i + 1) % 3]) for i in range(12)]
    result = evaluate([write_run(tmp_path / "copier", rows)], resamples=300)
    overall = result.runs["copier"].tasks["report"]["overall"]
    assert {"rouge_l", "bleu_1"} <= set(overall.marked)
    assert "finding_f1" in overall.not_computed


def test_training_data_brings_its_controls(skilled, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    train = [
        Example(
            id=f"t{i}",
            task="vqa",
            question=f"Is finding {i % 5} present?",
            domain=domain,
            answer_type="closed",
            answer="no" if i % 5 < 3 else "yes",
            split="train",
        )
        for i, domain in enumerate(["radiology"] * 10 + ["pathology"] * 10)
    ]
    reports = [
        Example(
            id=f"tr{i}",
            task="report",
            domain="radiology",
            split="train",
            answer=REPORTS[0] if i < 4 else REPORTS[1],
        )
        for i in range(6)
    ]
    write_jsonl(data / "examples.jsonl", train + reports)
    write_jsonl(
        data / "corpus.jsonl",
        [Reference(id="c", text=REPORTS[2], domain="radiology", split="train")],
    )
    result = evaluate([skilled], DataFolder(data), resamples=50)
    tasks = result.runs["skilled"].tasks
    controls = tasks["vqa_closed"]["overall"].controls
    assert {"constant", "question_prior", "question_prior_loo"} <= set(controls)
    # the majority answer on train is no; half of the rows are no
    assert controls["constant"]["accuracy"].value == 0.5
    reports_found = tasks["report"]["overall"].controls
    # constant = REPORTS[0], the most common: right for a third of the rows
    assert reports_found["constant"]["bleu_nltk_1"].value > 1 / 3
    assert reports_found["random_reference"]["rouge_l"].n == 9


def test_a_noise_run_becomes_a_control_of_the_same_system(tmp_path, skilled):
    noise = Noise(kind="blank", seed=0)
    rows = [
        closed_trace(
            i,
            "no",
            "yes" if (i // 5) % 2 else "no",
            "radiology" if i < 40 else "pathology",
            noise=noise,
        )
        for i in range(80)
    ]
    result = evaluate([skilled, write_run(tmp_path / "blank", rows)], resamples=50)
    overall = result.runs["skilled"].tasks["vqa_closed"]["overall"]
    assert overall.controls["generator_blank"]["accuracy"].value == 0.5
    assert "generator_blank" not in overall.not_computed
    assert "generator_noise" in overall.not_computed


def test_the_whole_system_on_a_blank_picture_marks_and_the_generator_stands_apart(
    tmp_path, skilled
):
    """The generator on a blank picture still has the clean one's references: it marks nothing."""

    def blank(name, references, wrong):
        rows = [t for t in read_jsonl(skilled / "traces.jsonl", Trace) if t.task == "vqa"]
        for i, t in enumerate(rows):
            t.condition = Condition(
                image="noise", noise=Noise(kind="blank", seed=0), references=references
            )
            t.answer.text = "unsure" if i % 10 < wrong else t.answer.text
        return write_run(tmp_path / name, rows)

    runs = [skilled, blank("generator", "selected", 0), blank("system", "shown", 8)]
    overall = evaluate(runs, resamples=200).runs["skilled"].scores("vqa_closed")
    found = {name: own["accuracy"].value for name, own in overall.controls.items()}
    assert found["generator_blank"] == 0.9 and found["system_blank"] < 0.3
    assert "accuracy" not in overall.marked
    assert overall.generator_marked["accuracy"] == "generator_blank"
    assert (
        "accuracy"
        in evaluate([skilled, blank("s", "shown", 0)], resamples=200)
        .runs["skilled"]
        .scores("vqa_closed")
        .marked
    )


def test_a_system_without_retrieval_is_its_generator(tmp_path):
    noise = Noise(kind="blank", seed=0)
    rows = [closed_trace(i, "yes", "yes" if i % 3 else "no", references="none") for i in range(60)]
    blank = [t.model_copy(deep=True) for t in rows]
    for t in blank:
        t.condition = Condition(image="noise", noise=noise, references="none")
    runs = [write_run(tmp_path / "a", rows), write_run(tmp_path / "b", blank)]
    overall = evaluate(runs, resamples=100).runs["a"].scores("vqa_closed")
    assert {"generator_blank", "system_blank"} <= set(overall.controls)
    assert overall.marked["accuracy"] and overall.generator_marked["accuracy"]


def test_rows_without_p_yes_are_counted(skilled, tmp_path):
    rows = [t for t in read_jsonl(skilled / "traces.jsonl", Trace) if t.task == "vqa"]
    for t in rows[:7]:
        t.answer.p_yes = None
    overall = evaluate([write_run(tmp_path / "some", rows)], resamples=50).runs["some"]
    scores = overall.scores("vqa_closed")
    assert scores.without_p_yes == 7 and scores.metrics["auroc"].n == 73
    assert metric_cell(scores, "ece").note.startswith("7 rows without p(yes)")
    for t in rows:
        t.answer.p_yes = None
    scores = evaluate([write_run(tmp_path / "no", rows)], resamples=50).runs["no"]
    assert scores.scores("vqa_closed").not_computed["auroc"] == "no answer has a p(yes)"


def test_comparisons_are_paired_and_corrected(tmp_path, skilled):
    rows = [t for t in read_jsonl(skilled / "traces.jsonl", Trace) if t.task == "vqa"]
    for t in rows[::2]:
        t.answer.text = "unsure"
    worse = write_run(tmp_path / "worse", rows, label="worse")
    result = evaluate([skilled, worse], resamples=500)
    row = next(r for r in result.comparisons if r.metric == "accuracy")
    assert (row.a, row.b, row.n) == ("skilled", "worse", 80)
    assert row.high < 0 and row.p < 0.01
    assert row.p_holm >= row.p


def test_of_many_rows_the_tuned_ones_are_compared_with_what_they_were_tuned_from(tmp_path):
    def run(name, references, adapter=None):
        rows = [closed_trace(i, "yes", "yes", references=references) for i in range(4)]
        system = {"row": name, "generator": {"model": "m", "adapter": adapter}}
        return write_run(tmp_path / name, rows, system=system)

    runs = [run("base", "none"), run("naive", "selected"), run("chosen", "selected")]
    runs += [run(f"{a}-{r}", r, a) for a in ("one", "two", "all") for r in ("none", "selected")]
    found = evaluate(runs, resamples=20).comparisons
    pairs = {(row.a, row.b) for row in found}
    assert {a for a, b in pairs if b == "all-selected"} == {"base", "chosen", "two-selected"}
    assert {a for a, b in pairs if b == "all-none"} == {"base", "two-none"}
    assert {a for a, b in pairs if b == "chosen"} == {"base", "naive"}


def test_subgroups_show_the_gap(tmp_path):
    rows = []
    for i in range(120):
        sex = "f" if i % 2 else "m"
        said = "yes" if sex == "m" or i % 4 == 1 else "no"
        rows.append(closed_trace(i, said, "yes", meta={"sex": sex}, patient_group=i))
        rows[-1].patient = f"p{i}"
    run = write_run(tmp_path / "run", rows)
    result = evaluate([run], resamples=300, subgroups=["meta.sex", "meta.age"])
    found = result.subgroups["run"]["vqa_closed"]
    assert found["meta.age"] == NotComputed("no row has meta.age")
    cell = found["meta.sex"]["accuracy"]
    assert cell.values["m"].value == 1.0 and cell.values["f"].value == 0.5
    assert cell.gap.value == 0.5 and cell.gap.p < 0.01
    # the score of a group is held against its controls as in every other table
    control = cell.values["m"].control
    assert (control.name, control.value) == ("always_yes", 1.0)
    assert control.low < control.high == 1.0 and control.n == cell.values["m"].n
    assert cell.gap.n == sum(group.n for group in cell.values.values())
    assert cell.values["m"].marked and cell.values["f"].marked


def test_a_degraded_run_has_controls_and_marks_as_well(tmp_path, skilled):
    noise = Noise(kind="blank", seed=0)
    rows = [
        closed_trace(
            i,
            "no",
            "yes" if (i // 5) % 2 else "no",
            "radiology" if i < 40 else "pathology",
            noise=noise,
        )
        for i in range(80)
    ]
    result = evaluate([skilled, write_run(tmp_path / "blank", rows)], resamples=50)
    run = result.runs["blank"]
    overall = run.tasks["vqa_closed"]["overall"]
    assert not run.plain and result.runs["skilled"].plain
    assert overall.controls["always_no"]["accuracy"].difference.value == 0.0
    assert overall.marked["accuracy"] in ("always_no", "always_yes")
    assert not {"generator_noise", "run_shuffled"} & set(overall.not_computed)  # it is one itself


def test_controls_that_runs_have_in_common_are_what_they_are_alone(tmp_path, skilled):
    """Scored and resampled once for all runs, with the same result as for one."""
    rows = [t for t in read_jsonl(skilled / "traces.jsonl", Trace) if t.task == "vqa"]
    for t in rows[::2]:
        t.answer.text = "unsure"
    worse = write_run(tmp_path / "worse", rows)
    alone, both = (evaluate(runs, resamples=200) for runs in ([worse], [skilled, worse]))
    assert both.runs["worse"] == alone.runs["worse"]


def test_a_gap_of_chance_has_a_large_p(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        closed_trace(i, "yes" if rng.random() < 0.5 else "no", "yes", meta={"sex": "fm"[i % 2]})
        for i in range(100)
    ]
    for i, row in enumerate(rows):
        row.patient = f"p{i}"
    result = evaluate([write_run(tmp_path / "run", rows)], resamples=100, subgroups=["meta.sex"])
    assert result.subgroups["run"]["vqa_closed"]["meta.sex"]["accuracy"].gap.p > 0.05


def test_one_folder_with_several_conditions_gives_several_runs(tmp_path):
    rows = [
        closed_trace(i, "yes", "yes", references=r) for r in ("none", "selected") for i in range(4)
    ]
    runs = load_runs([write_run(tmp_path / "run", rows)])
    assert [run.name for run in runs] == ["run [clean/none]", "run [clean/selected]"]
    assert len({run.system for run in runs}) == 1
    assert set(system_groups(runs)) == {"run"}


def test_a_system_with_references_borrows_the_reference_free_run_of_its_model(tmp_path):
    def run(name, references, retriever, model="m"):
        rows = [closed_trace(i, "yes", "yes", references=references) for i in range(4)]
        system = {"generator": {"model": model}, "retriever": retriever}
        return write_run(tmp_path / name, rows, system=system)

    runs = [
        run("base", "none", None),
        run("naive", "selected", "generic"),
        run("aware", "selected", "own"),
        run("tuned", "selected", "own", "other"),
    ]
    groups = {k: [a.name for a in v] for k, v in system_groups(load_runs(runs)).items()}
    assert groups == {
        "base": ["base"],
        "naive": ["naive", "base"],
        "aware": ["aware", "base"],
        "tuned": ["tuned"],
    }
    found = evaluate(runs, resamples=20).reliance
    assert found["naive"].metrics["over_reliance_rate"].n == 4
    assert "over_reliance_rate" in found["tuned"].not_computed


def test_folders_called_alike_are_told_apart(tmp_path):
    rows = [closed_trace(1, "yes", "yes")]
    runs = [write_run(tmp_path / base / "clean", rows) for base in ("a", "b")]
    assert [a.name for a in load_runs(runs)] == ["a/clean", "b/clean"]
    with pytest.raises(UserError, match="expected distinct folders"):
        load_runs([runs[0], runs[0]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([closed_trace(1, "yes", "yes")] * 2, "traces.jsonl:2: example_id: 'q001' stands twice"),
        ([closed_trace(1, "yes", None)], "no trace has a target"),
        ([], "expected at least one row"),
    ],
)
def test_unusable_runs_are_refused_in_one_line(tmp_path, rows, message):
    run = write_run(tmp_path / "run", rows)
    with pytest.raises(UserError, match=message):
        evaluate([run], resamples=10)


def test_missing_traces_are_named(tmp_path):
    with pytest.raises(UserError, match="no traces.jsonl, expected a run folder"):
        evaluate([tmp_path], resamples=10)


def test_a_bad_trace_is_reported_with_its_line(tmp_path):
    run = write_run(tmp_path / "run", [closed_trace(1, "yes", "yes")])
    with open(run / "traces.jsonl", "a") as handle:
        handle.write('{"example_id": 7}\n')
    with pytest.raises(UserError, match=r"traces.jsonl:2: .*example_id"):
        evaluate([run], resamples=10)


def test_failed_rows_stay_in_the_denominator(tmp_path):
    rows = [closed_trace(i, "yes", "yes") for i in range(4)]
    rows[0].answer, rows[0].error = None, "cannot decode image"
    result = evaluate([write_run(tmp_path / "run", rows)], resamples=20)
    overall = result.runs["run"].scores("vqa_closed")
    assert overall.failed == 1 and overall.metrics["accuracy"].value == 0.75


def test_agreement_of_references_counts_images_and_stands_beside_shuffled(tmp_path):
    data = tmp_path / "data"
    data.mkdir()

    def truth(study, *present):
        found = {n: Finding(present=n in present) for n in ("a", "b", "c", "d")}
        return Truth(study=study, patient=study, domain="radiology", findings=found)

    write_jsonl(
        data / "truth.jsonl",
        [truth("s0", "a"), truth("s1", "a", "b"), truth("s2", "c", "d"), truth("s3", "c", "d")],
    )
    write_jsonl(
        data / "corpus.jsonl",
        [Reference(id=f"r{i}", text="x", meta={"study": f"s{i}"}) for i in range(4)],
    )
    rows = []
    for i in range(8):  # two questions per image; images of s0 get r1, those of s2 get r3
        row = closed_trace(i, "yes", "yes", patient_number=i)
        study = 0 if (i // 2) % 2 == 0 else 2
        row.image, row.patient, row.meta = f"i{i // 2}.png", f"p{i // 2}", {"study": f"s{study}"}
        row.hits = [
            Hit(id=f"r{study + 1}", text="x", score=0.9, rank=0),
            Hit(id=f"r{2 - study}", text="y", score=0.5, rank=1),
        ]
        row.selection = Selection(rule="all", kept=[h.id for h in row.hits])
        rows.append(row)
    result = evaluate([write_run(tmp_path / "run", rows)], DataFolder(data), resamples=50)
    group = result.runs["run"].retrieval["overall"]
    assert group.n == 4  # images
    assert group.metrics["label_agreement"].value == pytest.approx((0.75 + 1) / 2)
    # second references: r2 for s0 agrees on b alone, r0 for s2 the same
    assert group.metrics["label_agreement_kept"].value == pytest.approx(
        ((0.75 + 0.25) / 2 + (1 + 0.25) / 2) / 2
    )
    assert group.controls["shuffled_references"]["label_agreement"].value < 0.875
    assert "recall@1" not in group.metrics  # own reports were excluded


def test_marking_rule():
    def control(value, low):
        return {"accuracy": ControlScore(value, None, None, 9, Difference(0, low, 1, 1, 9, "t"))}

    clear, close = control(0.7, 0.01), control(0.8, 0.0)
    assert marked({"accuracy": 0.6}, {"a": clear}) == {}
    assert marked({"accuracy": 0.6}, {"a": clear, "b": close}) == {"accuracy": "b"}
    # the leave-one-out prior reads test labels: shown, but it does not mark
    assert marked({"accuracy": 0.6}, {"question_prior_loo": close}) == {}
    assert marked({"parse_rate": 0.6}, {"a": {"parse_rate": close["accuracy"]}}) == {}
