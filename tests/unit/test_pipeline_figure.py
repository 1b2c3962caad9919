"""The figure runs: what the pipeline's stages are is what every command does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmedrag.cli import main as cli_main
from mmedrag.evaluation.controls import Prediction
from mmedrag.evaluation.scoring import GroundTruth, Scorer
from mmedrag.pipeline import STAGES, Pipeline, Stage, pipeline as figure
from mmedrag.pipeline.interactive import _confidence
from mmedrag.preference.pairs.judge import Criterion, judge
from mmedrag.records import (
    Answer,
    ConditionSpec,
    Example,
    Trace,
    label_of,
    read_target,
    target_of,
    verdict,
)
from mmedrag.serve.settings import ServeSettings

SYSTEM = '[domain]\nlabel = "radiology"\n[generator]\nkind = "scripted"\nscript = "No."\n'


@pytest.fixture
def system(tmp_path: Path) -> Path:
    (tmp_path / "system.toml").write_text(SYSTEM)
    return tmp_path / "system.toml"


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        cli_main.main([str(word) for word in words])
    return int(done.value.code or 0)


def traces(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]


def seen(pipeline: Pipeline, rows: list[Trace]) -> None:
    """A stage of a reader's own: it leaves its mark on every row."""
    for row in rows:
        row.meta["seen"] = pipeline.k


def test_the_order_of_the_paper() -> None:
    names = [stage.name for stage in STAGES]
    assert names == ["route", "retrieve", "references", "select", "prompt", "answer", "read"]
    shared = [stage.shared for stage in STAGES]
    assert shared == sorted(shared, reverse=True), "shared stages come first"


@pytest.mark.parametrize("noun", ["run", "pairs", "retrieve"])
def test_editing_the_figure_changes_what_a_command_does(
    noun: str, small_data: Path, tmp_path: Path, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "STAGES", (*STAGES[:2], Stage("seen", seen), *STAGES[2:]))
    out = tmp_path / "out"
    more = {"run": ["--no-rag"], "pairs": ["--split", "test"], "retrieve": ["--split", "test"]}
    if noun == "retrieve":
        monkeypatch.setattr("mmedrag.pipeline.system._retrievers", lambda *_: {})
        file = tmp_path / "rows.jsonl"
        code = command(noun, small_data, "--system", system, "--out", file, *more[noun])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        code = command(noun, small_data, "--system", system, "--out", out, *more[noun])
        where = out / "traces" / "clean" if noun == "pairs" else out
        rows = traces(where)
    assert rows and code == (noun == "pairs")  # one answer to all makes no pair, and says so
    assert all(row["meta"]["seen"] == 8 for row in rows)


def test_a_stage_that_is_taken_out_is_not_run(
    small_data: Path, tmp_path: Path, system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "STAGES", [s for s in STAGES if s.name != "read"])
    assert command("run", small_data, "--system", system, "--out", tmp_path / "r", "--no-rag") == 0
    assert all("label" not in row["answer"] for row in traces(tmp_path / "r"))


def test_the_service_runs_the_same_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_data: Path
) -> None:
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    from mmedrag.answering.generators import ScriptedGenerator
    from mmedrag.pipeline import ask

    monkeypatch.setattr(figure, "STAGES", [s for s in STAGES if s.name != "read"])
    pipeline = Pipeline(domain="radiology", generator=ScriptedGenerator())
    reply = ask(small_data / "images" / "s00.png", "Is it there?", pipeline)
    assert reply.answer and reply.answer.label is None and reply.abstained
    from mmedrag.serve import engine

    made = engine.Engine(pipeline, ServeSettings())
    try:
        assert made.pipeline.stages is pipeline.stages
    finally:
        made.stop()


def test_called_in_python_it_runs_the_stages_it_holds() -> None:
    order: list[str] = []

    def note(name: str) -> Stage:
        return Stage(name, lambda pipeline, rows: order.append(name))

    pipeline = Pipeline(stages=[note("a"), note("b")])
    assert len(pipeline([Example(id="1", task="report")])) == 1
    assert order == ["a", "b"]
    pipeline.run([Example(id="1", task="report")], {"x": ConditionSpec("none")}, last="a")
    assert order == ["a", "b", "a"]


SAID = (
    ("The heart is normal.", "Is there cardiomegaly?", "no"),
    ("There is cardiomegaly.", "Is there cardiomegaly?", "yes"),
    ("It is unremarkable.", "Is the chest normal?", "yes"),
    ("No.", "Is it?", "no"),
    ("It cannot be determined.", "Is it?", "unclear"),
    ("", "Is it?", "unclear"),
)


@pytest.mark.parametrize(("text", "question", "expected"), SAID)
@pytest.mark.parametrize("target", ["yes", "No", "The heart is normal."])
@pytest.mark.parametrize("read", [True, False], ids=["read by the pipeline", "by others"])
def test_a_trace_has_one_verdict_everywhere(
    text: str, question: str, expected: str, target: str, read: bool
) -> None:
    trace = Trace(
        example_id="1",
        task="vqa",
        question=question,
        answer_type="closed",
        target=target,
        answer=Answer(text=text, p_yes=0.5),
    )
    if read:
        Pipeline().read([trace])
        assert trace.answer and trace.answer.label == expected
    assert label_of(trace) == expected
    truth = read_target(target, question)
    assert target_of(trace) == truth
    assert (verdict(trace) == "right") == (expected == truth)
    scored = Scorer("vqa_closed", [trace], GroundTruth())(Prediction.of_model([trace]))
    assert scored["accuracy"].values.tolist() == [expected == truth]
    assert scored["parse_rate"].values.tolist() == [expected != "unclear"]
    assert _confidence(trace) == (0.5, expected == truth)
    ((first, second),), _ = judge([trace], [trace], "paper", Criterion())
    assert first == second == verdict(trace)


@pytest.mark.parametrize(
    ("table", "where"),
    [('[domains.radiology]\nadapter = "a"\n', "domains.radiology"), ("", "generator")],
)
def test_a_generator_that_takes_no_adapter_says_so_in_one_line(
    table: str, where: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "system.toml"
    file.write_text(SYSTEM + ("" if table else 'adapter = "a"\n') + table)
    assert command("run", small_data, "--system", file, "--out", tmp_path / "r", "--no-rag") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: [{where}]: adapter: ")
    assert "scripted" in error and not (tmp_path / "r").exists()
