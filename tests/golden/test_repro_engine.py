"""The reproduction matrix's engine, on a small repository made here."""

import json
import subprocess
from dataclasses import replace

import pytest

from mmedrag.evaluation.result import (
    Environment,
    Estimate,
    EvaluationResult,
    Rate,
    RunResult,
    Scores,
    SystemReliance,
)
from mmedrag.experiments import repro, repro_checks
from mmedrag.records.records import UserError

ROW = """
[[row]]
id = "{id}"
about = "share of yes"
check = "always_yes"
data = {{ source = "released", path = "vqa.jsonl"{more} }}
expected = {expected}
tolerance = 0.5
from = "us"
"""


def git(folder, *words):
    done = subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def vqa(*said):
    return "".join(json.dumps({"answer": s, "question": "q", "image": "i"}) + "\n" for s in said)


@pytest.fixture
def released(tmp_path):
    """Two commits: the file has 3 of 4 yes in the first and is gone in the second."""
    folder = tmp_path / "released"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "vqa.jsonl").write_text(vqa("yes", "Yes.", "yes", "no"))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    first = git(folder, "rev-parse", "HEAD")
    git(folder, "rm", "-q", "vqa.jsonl")
    git(folder, "commit", "-q", "-m", "two")
    return folder, first


def checkout(tmp_path, *rows):
    root = tmp_path / "checkout"
    (root / "repro").mkdir(parents=True)
    (root / "repro" / "matrix.toml").write_text("".join(rows))
    return root


def row(id, expected, commit=None):
    more = f', commit = "{commit}"' if commit else ""
    return ROW.format(id=id, expected=expected, more=more)


def test_a_deleted_file_is_read_from_the_named_commit(released, tmp_path):
    folder, first = released
    root = checkout(
        tmp_path,
        row("good", 75, first),
        row("close", 76.4, first),
        row("far", 90, first),
        row("gone", 75),
    )
    report = repro.run_matrix(root, folders={"released": folder})
    assert [r.status for r in report.results] == ["OK", "near", "FAIL", "no data"]
    assert report.failed
    assert report.count_line() == "4 rows: 1 OK, 1 near, 1 FAIL, 1 no data"
    assert report.lines()[0].startswith("OK") and "expected 75" in report.lines()[0]


def test_a_bare_clone_serves_as_well(released, tmp_path):
    folder, first = released
    bare = tmp_path / "bare"
    subprocess.run(["git", "clone", "-q", "--bare", str(folder), str(bare)], check=True)
    report = repro.run_matrix(
        checkout(tmp_path, row("good", 75, first)), folders={"released": bare}
    )
    assert not report.failed


def test_nothing_ran_is_a_failure_that_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("MMEDRAG_RELEASED", raising=False)
    report = repro.run_matrix(checkout(tmp_path, row("x", 75)))
    assert report.failed and report.count_line() == "1 rows: 0 OK, 0 near, 0 FAIL, 1 no data"
    assert "set MMEDRAG_RELEASED" in report.lines()[0]


def test_the_page_keeps_what_was_measured_when_the_data_is_gone(released, tmp_path):
    folder, first = released
    root = checkout(tmp_path, row("good", 75, first), row("new", 75))
    repro.run_matrix(root, folders={"released": folder})
    page = (root / "docs" / "reproduce.md").read_text()
    assert "| `good` |" in page and "| 75 | OK |" in page and "never run" in page
    repro.run_matrix(root, folders={"released": tmp_path / "nowhere"})
    assert (root / "docs" / "reproduce.md").read_text() == page
    assert json.loads((root / "repro/results/latest.json").read_text())["good"]["measured"] == 75


def test_one_row_alone_writes_nothing(released, tmp_path):
    folder, first = released
    root = checkout(tmp_path, row("good", 75, first), row("far", 90, first))
    report = repro.run_matrix(root, only=["good"], folders={"released": folder})
    assert len(report.results) == 1 and not report.failed
    assert not (root / "docs").exists()
    with pytest.raises(UserError, match="--row nope: no such row"):
        repro.run_matrix(root, only=["nope"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (row("a", 1) + row("a", 1), "'a' stands twice"),
        (row("a", 1) + 'surprise = "x"', "unknown key 'surprise'"),
        (row("a", 1).replace("always_yes", "exec"), "not in mmedrag.experiments.repro_checks"),
        (row("a", 1).replace('"released"', '"web"'), "data.source is one of"),
        (row("a", 1).replace("tolerance = 0.5", ""), "tolerance is missing"),
        ("[[row]", "not valid TOML"),
    ],
)
def test_a_broken_matrix_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        repro.run_matrix(checkout(tmp_path, text))


def test_no_matrix(tmp_path):
    with pytest.raises(UserError, match="expected a checkout"):
        repro.run_matrix(tmp_path)


def test_pairs_of_shuffled_files_are_told_apart_by_the_length_of_what_was_rejected():
    """Rows of resist were rejected with a reference (long), those of copy without (short)."""
    said = [(9, 1), (40, 0), (35, 0), (44, 0), (12, 0), (13, 0), (14, 0), (12, 0), (11, 0)]
    rows = [
        {
            "image": f"{i * 7 % 5}.png",
            "rejected_noised": noised,
            "rejected_conversations": [{}, {"value": "word " * length}],
        }
        for i, (length, noised) in enumerate(said)
    ]
    found = {
        kind: repro_checks.pairs(lambda file: rows, "f", kind, apart="length")
        for kind in ("cross_modal", "rest", "resist", "copy")
    }
    assert found == {"cross_modal": 1, "rest": 8, "resist": 3, "copy": 5}
    with pytest.raises(UserError, match="falls .* times, expected once"):
        repro_checks.pairs(lambda file: rows, "f", "copy")


def test_judgement():
    made = repro.Row("x", "", "rows", 10.0, 0.1, "own")
    assert repro.judge(made, 10.1).status == "OK"
    assert repro.judge(made, 10.3).status == "near"
    assert repro.judge(made, 10.31).status == "FAIL"
    wide = repro.Row("x", "", "rows", 10.0, 0.1, "own", near=2)
    assert repro.judge(wide, 8.5).status == "near"
    exact = repro.Row("x", "", "rows", 10, 0, "own")
    assert repro.judge(exact, 10).status == "OK" and repro.judge(exact, 11).status == "FAIL"


def test_our_own_ablation_becomes_rows_that_hold_on_the_run_they_came_from(tmp_path):
    found, rate = Estimate(0.75, 0.7, 0.8, 10), Rate(0.75, 0.7, 0.8, 10, "rows")
    scores = {"accuracy": found, "balanced_accuracy": found}
    tasks = {"vqa_closed": {"overall": Scores(10, 10, 0, scores, {}, {}, {})}}
    result = EvaluationResult(
        schema=1,
        seed=0,
        resamples=100,
        runs={
            "base/none": RunResult("base", "clean/none", True, 10, 0, tasks, {}),
            "base/noise": RunResult("base", "noise:blank/none", False, 10, 0, tasks, {}),
        },
        reliance={"base": SystemReliance("base", "m", {"excess_copying": rate}, {})},
        comparisons=[],
        subgroups={},
        signatures={},
        environment=Environment({}, None, "linux", 2, {}),
    )
    demo = tmp_path / "demo"
    demo.mkdir()
    result.write(demo / "metrics.json")
    root = checkout(tmp_path, "")
    with pytest.raises(UserError, match=r"sample.json is not in .*expected the output of"):
        repro.adopt(demo, root / "repro/ablation.toml")
    (demo / "sample.json").write_text(json.dumps({"studies_per_domain": 12}))
    assert repro.adopt(demo, root / "repro/ablation.toml") == 3
    report = repro.run_matrix(root, folders={"demo": demo})
    assert [r.status for r in report.results] == ["OK"] * 3
    result.reliance["base"].metrics["excess_copying"] = replace(rate, value=0.2)
    result.write(demo / "metrics.json")
    assert repro.run_matrix(root, folders={"demo": demo}).counts["FAIL"] == 1
    (demo / "sample.json").write_text(json.dumps({"studies_per_domain": 0}))
    other = repro.run_matrix(root, folders={"demo": demo})
    assert other.counts["no data"] == 3 and other.failed
    assert "all studies per domain, expected 12" in other.results[0].why
