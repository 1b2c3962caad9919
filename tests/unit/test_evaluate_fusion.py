"""The attainable: a fuser uses references as far as they deserve it, on patients it never saw."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from training.fusion.__main__ import main

from mmedrag.evaluation import EvaluationResult, asked_twice, attainable, measured
from mmedrag.evaluation.fusion import statements
from mmedrag.evaluation.result import Environment
from mmedrag.experiments.ablation import ALONE, WITH, Row
from mmedrag.experiments.effects import IGNORED, effect_lines, read_fusion, with_effects
from mmedrag.records import Answer, Condition, Hit, Trace, UserError
from mmedrag.runtime import write_jsonl

SAYS = {"yes": "The heart is enlarged.", "no": "The heart is not enlarged."}


def other(side: str) -> str:
    return "no" if side == "yes" else "yes"


def runs(seed: int, right: float, sees: float = 0.75, n: int = 240) -> tuple[list, list]:
    """Traces without and with references: the reader sees the truth with ``sees``, its reference
    states it with ``right``, and it copies its reference."""
    rng = random.Random(f"{seed}/{right}/{sees}")
    without, with_ = [], []
    for number in range(n):
        truth = rng.choice(["yes", "no"])
        own = truth if rng.random() < sees else other(truth)
        said = truth if rng.random() < right else other(truth)
        p_yes = {"yes": 0.8, "no": 0.2}[own]
        shared = dict(
            example_id=f"q{number}",
            task="vqa",
            question="Is the heart enlarged?",
            answer_type="closed",
            patient=f"s{seed}-p{number // 2}",
            target=truth,
            target_domain="radiology",
            meta={
                "finding": "cardiomegaly",
                "side": None,
                "form": "presence",
                "study": f"{number}",
            },
        )
        without.append(
            Trace(
                answer=Answer(text=own, p_yes=p_yes),
                condition=Condition(references="none"),
                **shared,
            )
        )
        hit = Hit(id=f"r{number}", text=SAYS[said], score=0.9, rank=0)
        with_.append(Trace(answer=Answer(text=said, p_yes=0.5), hits=[hit], **shared))
    return without, with_


def test_statements_are_what_references_say_to_the_question() -> None:
    texts = ["The heart is enlarged.", "No cardiomegaly.", "Questionable cardiomegaly.", "PA view."]
    asked = runs(1, 1.0, n=1)[1][0]
    asked.hits = [Hit(id=f"r{n}", text=t, score=0.9, rank=n) for n, t in enumerate(texts)]
    assert [says for says, _ in statements(asked)] == [1.0, -1.0, 0.5, 0.0]
    asked.meta["form"] = "negated"
    assert [says for says, _ in statements(asked)] == [-1.0, 1.0, -0.5, 0.0]


def value(found: object, who: str, effect: str) -> float:
    cell = found.effects[who][effect]  # type: ignore[attr-defined]
    assert cell.n > 0 and cell.low <= cell.value <= cell.high
    return cell.value


def test_good_references_are_followed_and_bad_ones_are_not() -> None:
    for right, follows in ((0.95, True), (0.5, False)):
        pairs, fit_on = (asked_twice(*runs(seed, right)) for seed in (1, 2))
        found = attainable(pairs, fit_on, resamples=200)
        best = max(value(found, "ignored", "accuracy"), value(found, "reader", "accuracy"))
        assert value(found, "fuser", "accuracy") >= best - 0.02
        assert value(found, "ignored", "over_reliance_rate") == 0
        assert value(found, "reader", "follow_retrieved") == 1
        assert (value(found, "fuser", "follow_retrieved") > 0.5) is follows
        assert found.fitted == 240


def test_what_contradicts_is_followed_as_far_as_such_references_deserve() -> None:
    """Fitted where references are right, a fuser follows one that was chosen to be wrong."""
    without, wrong = runs(1, 0.0)
    against = asked_twice(without, wrong)
    for right, low, high in ((0.95, 0.6, 1.0), (0.5, 0.0, 0.5)):
        pairs, fit_on = (asked_twice(*runs(seed, right)) for seed in (1, 2))
        found = attainable(pairs, fit_on, against, resamples=100)
        assert low <= value(found, "fuser", "follow_rate") <= high
        assert value(found, "reader", "follow_rate") == 1
        floor = 1 - sum(none.answer.text == none.target for none, _ in against) / len(against)
        assert value(found, "ignored", "follow_rate") == pytest.approx(floor, abs=1e-6)
    assert "follow_rate" not in attainable(pairs, fit_on, resamples=100).effects["fuser"]


def test_the_evidence_together_is_worth_more_than_each() -> None:
    """Where the picture is sometimes plain, the fuser keeps to it there and follows elsewhere."""
    parts = [(runs(seed, 0.8, sees=0.99, n=120), runs(seed + 10, 0.8, sees=0.5)) for seed in (1, 2)]
    sides = []
    for (plain, plain_refs), (dim, dim_refs) in parts:
        for trace in plain:
            trace.answer.p_yes = {0.8: 0.99, 0.2: 0.01}[trace.answer.p_yes]
        for n, trace in enumerate([*dim, *dim_refs]):
            trace.example_id = f"d{n % len(dim)}"
        sides.append(asked_twice(plain + dim, plain_refs + dim_refs))
    found = attainable(*sides, resamples=200)
    for who in ("ignored", "reader"):
        assert value(found, "fuser", "accuracy") > value(found, who, "accuracy") + 0.03


def test_nobody_is_fitted_and_measured() -> None:
    pairs = asked_twice(*runs(1, 0.8))
    with pytest.raises(UserError, match="patient s1-p0 is both fitted on and measured"):
        attainable(pairs, pairs)
    with pytest.raises(UserError, match="2 patients to fit on, expected at least 5"):
        attainable(pairs, asked_twice(*runs(2, 0.8, n=4)))
    with pytest.raises(UserError, match="no closed question with p"):
        asked_twice(runs(1, 0.8)[0], [])


def folders(path: Path, seed: int, right: float = 0.9) -> tuple[Path, Path]:
    out = path / f"seed-{seed}" / "none", path / f"seed-{seed}" / "references"
    for folder, traces in zip(out, runs(seed, right), strict=True):
        folder.mkdir(parents=True)
        write_jsonl(folder / "traces.jsonl", traces)
    return out


def test_command_writes_what_an_ablation_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test, fit = folders(tmp_path, 1), folders(tmp_path, 2)
    out = tmp_path / "attainable.json"
    args = [*map(str, test), "--fit-on", *map(str, fit), "--out", str(out)]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "fitted on 240 questions, measured on 240" in printed and "references ignored" in printed
    fusion = read_fusion(out)
    found = attainable(asked_twice(*runs(1, 0.9)), asked_twice(*runs(2, 0.9)))
    assert fusion == found

    table = [Row("base", "base model", ALONE), Row("naive", "naive RAG", WITH, "generic")]
    for row, folder in zip(table, test, strict=True):
        (tmp_path / "runs" / row.name).mkdir(parents=True)
        folder.rename(tmp_path / "runs" / row.name / folder.name)
    empty = EvaluationResult(
        schema=1,
        seed=0,
        resamples=100,
        runs={},
        reliance={},
        comparisons=[],
        subgroups={},
        signatures={},
        environment=Environment({}, None, "", None, {}),
    )
    shown = with_effects(empty, table, tmp_path / "runs", fusion)
    titles = [system.title for system in shown.reliance.values()]
    assert titles[0] == IGNORED and titles[1].startswith("attainable (")
    ignored = measured(asked_twice(*runs(1, 0.9)), resamples=100)["ignored"]
    assert shown.reliance[IGNORED].metrics["accuracy"].value == ignored["accuracy"].value
    assert len(effect_lines(shown)) == 3
    shown.write(tmp_path / "metrics.json")
    assert EvaluationResult.read(tmp_path / "metrics.json").reliance == shown.reliance


def test_command_on_what_cannot_be_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = folders(tmp_path, 1)
    assert main([*map(str, test), "--fit-on", *map(str, test)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusion: patient s1-p") and error.count("\n") == 1
    assert main([str(tmp_path), str(test[1]), "--fit-on", *map(str, test)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "x.json").write_text(json.dumps({"policy": 3}))
    with pytest.raises(UserError, match="expected the JSON of training.fusion"):
        read_fusion(tmp_path / "x.json")
