"""Tables, charts and gallery of the report, without a browser."""

import csv
import io
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, strategies as st

from mmedrag.evaluation import plain_runs
from mmedrag.evaluation.result import (
    Environment,
    Estimate,
    EvaluationResult,
    Rate,
    RunResult,
    Scores,
    SystemReliance,
)
from mmedrag.evaluation.runs import SystemRun
from mmedrag.evaluation.scoring import Common
from mmedrag.records.records import Answer, Condition, Domain, Hit, Prompt, Selection, Trace
from mmedrag.report import gallery, svg, tables, view
from mmedrag.report.tables import Cell, Table


def table():
    rows = [
        [
            Cell("a & b_c"),
            Cell("x"),
            Cell("0.5† [0.4, 0.6]", 0.5, 0.4, 0.6, 12, "note", True),
            tables.count(12),
        ],
        [Cell("a & b_c"), Cell("y"), Cell("–"), tables.count(0)],
        [Cell("other, with comma"), Cell("z"), Cell("0.7", 0.7), tables.count(3)],
    ]
    return Table("t", "Caption with 95 %", ["row", "group", "score_1", "n"], rows, heads=2)


def test_csv_has_bounds_in_columns_of_their_own():
    rows = list(csv.DictReader(io.StringIO(table().csv())))
    assert rows[0]["score_1"] == "0.5" and rows[0]["score_1 low"] == "0.4"
    assert rows[0]["score_1 n"] == "12" and "n low" not in rows[0]
    assert rows[1]["score_1"] == "" and rows[2]["row"] == "other, with comma"


def test_latex_escapes_what_latex_reads():
    text = table().latex()
    assert r"a \& b\_c & x & 0.5$^\dagger$ [0.4, 0.6] & 12 \\" in text
    assert r"\caption{Caption with 95 \%}" in text and r"\begin{tabular}{llrr}" in text


def test_repeated_row_names_span_their_rows():
    assert table().spans == [2, 0, 1]


@given(st.floats(-5, 5), st.floats(0.001, 1000))
def test_ticks_are_few_round_and_inside(low, span):
    marks = svg.ticks(low, low + span)
    assert 1 <= len(marks) <= 8
    assert all(low - 1e-6 * span <= m <= low + span + 1e-6 * span for m in marks)


@pytest.mark.parametrize(
    "drawn",
    [
        svg.dots([svg.Dot("<row> & 'x'", 0.5, 0.4, 0.6, 0.45, True)], "T", "x"),
        svg.bars(["m"], ["a", "b"], [[(0.5, 0.4, 0.6), None]], "T"),
        svg.lines(
            [("a", [(0, 0.1), (1, 0.9)])],
            "T",
            "x",
            "y",
            bands=[[(0, 0, 1), (1, 0, 1)]],
            cuts=[(0, 0.5)],
            diagonal=True,
            unit=True,
        ),
        svg.lines([("flat", [(1, 0.5), (2, 0.5)])], "T", "x", "y"),
        svg.spark([0.9, 0.5, 0.4], 1),
    ],
)
def test_charts_are_well_formed_and_named_for_screen_readers(drawn):
    root = ET.fromstring(drawn)
    assert root.get("role") == "img" and len(root.get("aria-label")) > 5
    width, height = map(float, root.get("viewBox").split()[2:])
    for box in root.iter("circle"):
        assert 0 <= float(box.get("cx")) <= width and 0 <= float(box.get("cy")) <= height


def test_a_chart_s_description_says_its_numbers():
    drawn = svg.dots([svg.Dot("base", 0.512)], "Closed questions", "accuracy")
    assert "base 0.512" in ET.fromstring(drawn).get("aria-label")


def test_thin_keeps_both_ends():
    points = [(float(i), 0.0) for i in range(1000)]
    found = view.thin(points, 50)
    assert len(found) == 50 and found[0] == points[0] and found[-1] == points[-1]


def test_training_logs_are_read_in_both_forms(tmp_path):
    rows = tmp_path / "training_log.jsonl"
    rows.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.5}\n')
    state = tmp_path / "trainer_state.json"
    state.write_text('{"log_history": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]}')
    assert view.read_log(rows) == view.read_log(state)
    assert len(view.training({"a": rows})) == 1
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    assert view.training({"a": broken}) == []  # a broken log costs its curve, not the report


def case(i, said, truth, references="none", domain="radiology", hits=()):
    kept = [h.id for h in hits][:1]
    return Trace(
        example_id=f"e{i:03d}",
        task="vqa",
        question=f"Question {i}?",
        answer_type="closed",
        target=truth,
        target_domain=domain,
        answer=Answer(text=said),
        hits=list(hits),
        condition=Condition(references=references),
        patient=f"p{i}",
        selection=Selection(rule="log_ratio", kept=kept, reason="cut") if hits else None,
        prompt=Prompt(template="t", text="", references=[], dropped=[]),
    )


HITS = [
    Hit(id="h0", text="Kept text.", score=0.9, rank=0),
    Hit(id="h1", text="Dropped text.", score=0.2, rank=1),
]


def runs():
    alone = [case(i, "yes", "yes" if i % 2 else "no") for i in range(20)]
    with_ = [case(i, "no", "yes" if i % 2 else "no", "selected", hits=HITS) for i in range(20)]

    def run(name, condition, traces):
        return SystemRun(name, None, condition, "m", "s", traces, title=name)

    return [run("base", "clean/none", alone), run("rag", "clean/selected", with_)]


def test_cases_show_what_references_changed_and_why_each_was_kept():
    found = gallery.cases(runs(), None, most=20)
    assert len(found) == 20
    helped = [c for c in found if "references helped" in c.outcomes]
    assert len(helped) == 10 and all("right" in c.outcomes for c in helped)
    assert all("references harmed" in c.outcomes for c in found if "wrong" in c.outcomes)
    shown = found[0].references
    assert [(r.kept, r.why) for r in shown] == [(True, "kept"), (False, "dropped by the rule")]
    assert found[0].reason == "log_ratio: cut" and "1 of 2 kept" in found[0].spark
    assert [a.row for a in found[0].answers] == ["base", "rag"]


def test_a_reference_that_did_not_fit_says_so():
    rows = runs()
    for trace in rows[1].traces:
        trace.prompt.dropped = ["h0"]
    shown = gallery.cases(rows, None, 1)[0].references
    assert shown[0].why == "dropped: does not fit the context" and not shown[0].kept


def test_cases_are_spread_over_outcomes_and_seeded():
    few = gallery.cases(runs(), None, most=4)
    assert len({tuple(c.outcomes) for c in few}) == 2
    assert [c.id for c in few] == [c.id for c in gallery.cases(runs(), None, most=4)]
    other = gallery.cases(runs(), None, most=4, seed=3)
    assert [c.id for c in few] != [c.id for c in other]


def scored(rows):
    """What the tables of retrieval and of classes read, measured."""
    common = Common(resamples=200)
    return evaluation(
        {
            run.name: result_of(
                run.title,
                retrieval=plain_runs.retrieval(run, common),
                confusion=plain_runs.confusion(run, common),
                routing=plain_runs.routing(run, common),
                reliability=plain_runs.reliability(run, common),
            )
            for run in rows
        }
    )


def evaluation(runs, **more):
    parts = {"reliance": {}, "comparisons": [], "subgroups": {}, "signatures": {}} | more
    where = Environment({"mmedrag": "0"}, None, "linux", 2, {})
    return EvaluationResult(schema=1, seed=0, resamples=200, runs=runs, environment=where, **parts)


def result_of(title, plain=True, tasks=None, retrieval=None, **more):
    return RunResult(title, "clean/none", plain, 20, 0, tasks or {}, retrieval or {}, **more)


def test_hubness_counts_images_not_questions():
    rows = runs()
    for i, trace in enumerate(rows[1].traces):
        trace.image = f"images/{i // 2}.png"
        trace.hits = [Hit(id="hub" if i < 16 else f"r{i // 2}", text="", score=1.0, rank=0)]
    found = {table_.id: table_ for table_ in tables.retrieval(scored(rows))}["hubness"]
    names = dict(zip(found.columns, found.rows[0], strict=True))
    assert names["images"].value == 10
    distinct, top = (names[tables.HUBNESS[m]] for m in ("distinct_share", "top_share"))
    assert (distinct.value, distinct.low, distinct.n) == (0.3, None, 10)
    assert (top.value, top.low) == (0.8, None)  # they describe the images: no interval


def test_selection_says_the_rule_and_every_share_has_bounds():
    found = {table_.id: table_ for table_ in tables.retrieval(scored(runs()))}
    selection = found["selection"]
    names = dict(zip(selection.columns, selection.rows[0], strict=True))
    assert names["rule"].text == "log_ratio" and names["images"].value == 20
    assert names["mean kept"].value == 1.0 and names["all kept"].value == 0.0
    assert names["all kept"].low == 0.0 < names["all kept"].high
    assert found["similarity"].columns[3:] == ["similarity@1", "similarity@2"]
    assert [cell.value for cell in found["similarity"].rows[0][3:]] == [0.9, 0.2]


@pytest.mark.parametrize("made", [tables.retrieval, tables.classification])
def test_every_estimate_of_the_retrieval_and_class_tables_has_n_and_an_interval(made):
    rows = runs()
    for run in rows:
        for trace in run.traces:
            trace.answer.p_yes = 0.3
            trace.domain = Domain(label="radiology" if trace.example_id < "e015" else "unknown")
    found = [table_ for table_ in made(scored(rows)) if table_.id != "hubness"]
    cells = [cell for table_ in found for row in table_.rows for cell in row]
    estimates = [c for c in cells if c.n is not None]
    assert len(estimates) >= 12
    assert all(c.n and c.low is not None and c.low <= c.value <= c.high for c in estimates)
    counts = [c for c in cells if c.value is not None and c.n is None]
    assert all(c.value == int(c.value) for c in counts)


def test_domains_are_shown_against_those_identified():
    rows = runs()
    for i, trace in enumerate(rows[1].traces):
        trace.domain = Domain(label="radiology" if i < 15 else "unknown")
    found = {table_.id: table_ for table_ in tables.classification(scored(rows))}["routing"]
    assert found.columns == ["domain", "images", "identified as radiology", "identified as unknown"]
    assert [c.value for c in found.rows[0][1:]] == [20, 0.75, 0.25]


def test_reliance_before_the_tuning_stays_among_many_tuned_systems():
    rate = {"excess_copying": Rate(0.1, 0.0, 0.2, 9, "questions")}
    names = ["naive", "selection", *(f"tuned {i}" for i in range(7))]
    found = {
        name: SystemReliance(name, "m" if i < 2 else name, rate, {}) for i, name in enumerate(names)
    }
    ((_, drawn),) = view.reliance_bars(evaluation({}, reliance=found))
    shown = [name for name in names if f">{name}<" in drawn]
    assert shown == ["selection", *names[-5:]]


def test_what_is_missing_says_where():
    def run(title, plain, **missing):
        overall = Scores(1, 1, 0, {}, {}, missing, {})
        return result_of(title, plain, {"report": {"overall": overall}})

    runs = {
        "a": run("A", True, generator_blank="needs a run", constant="needs --data"),
        "b": run("B", True, constant="needs --data"),
        "c": run("C", False, copied="needs hits"),
    }
    found = evaluation(runs, not_computed={"row D": "no adapter"})
    rows = [[cell.text for cell in row] for row in tables.not_computed(found).rows]
    assert rows == [
        ["constant", "needs --data", "all"],
        ["generator blank", "needs a run", "A"],
        ["row D", "no adapter", ""],
    ]


def test_confusion_counts_every_answer():
    found = tables.classification(scored(runs()))[0]
    cells = {(r[0].text, r[2].text): [c.value for c in r[3:]] for r in found.rows}
    assert cells["base", "yes"] == [10, 1, 0, 0] and cells["rag", "yes"] == [10, 0, 1, 0]


def test_number_cells():
    assert tables.number(None).text == "–"
    half = Estimate(0.5, 0.4, 0.6, 9)
    cell = tables.number(half, marked=True, rows=9)
    assert cell.text == "0.500† [0.400, 0.600]" and cell.marked
    assert tables.number(half, rows=10).text == "0.500 [0.400, 0.600] (n 9)"


def test_style_colours_have_enough_contrast():
    """WCAG 2.1: 4.5 for text, 3 for the marks of charts, in both colour schemes."""
    from importlib.resources import files

    style = (files("mmedrag.report") / "page.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for scheme in (light, dark):
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme[: scheme.index("}")]))
        for back in ("back", "panel"):
            for ink in ("ink", "soft", "link", "good", "bad"):
                assert contrast(colour[ink], colour[back]) >= 4.5, (ink, back)
            for mark in ("s0", "s1", "s2", "s3", "s4", "s5"):
                assert contrast(colour[mark], colour[back]) >= 3, (mark, back)
        assert contrast(colour["warn"], colour["warn-back"]) >= 4.5


def contrast(a: str, b: str) -> float:
    def luminance(text):
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
