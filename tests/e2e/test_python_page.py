"""Every script of docs/python.md runs as printed, in an empty folder, and says what it should."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import mmedrag
from mmedrag import embedded

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)
SCRIPTS = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for title, text in SECTION.findall(PAGE.read_text(encoding="utf-8"))
}

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif("vlm" not in embedded.available(), reason="no embedded model"),
]


Run = Callable[[str], list[str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script of a section in the empty folder; gives the lines that it prints."""

    def printed(title: str) -> list[str]:
        (script,) = SCRIPTS[title]
        file = tmp_path / "script.py"
        file.write_text(script, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return printed


def test_the_page_has_five_short_scripts() -> None:
    assert [len(found) for found in SCRIPTS.values()] == [1] * 5
    assert all(script.count("\n") <= 25 for (script,) in SCRIPTS.values())


def test_ask_with_evidence(run: Run) -> None:
    first, *references = run("Ask, with evidence")
    assert "?" in first or first.startswith("no answer: ")
    scores = [float(line.split()[0]) for line in references]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True)
    assert all("by the rule log_ratio" in line for line in references)
    assert " True kept" in references[0]


def test_an_index_of_your_own(run: Run, tmp_path: Path) -> None:
    head, *hits, last = run("An index of your own")
    corpus = [json.loads(line) for line in (tmp_path / "data/corpus.jsonl").open()]
    train = {row["id"]: row for row in corpus if row["split"] == "train"}
    patients = {row["patient"] for row in train.values()}
    assert head == f"{len(train)} references of {len(patients)} patients"
    assert len(hits) == 3
    for line in hits:
        _, name, text = line.split(maxsplit=2)
        assert train[name]["text"].startswith(text)
    found = re.findall(r"'([^']+)'", last)
    assert found and len({train[name]["patient"] for name in found}) == 1


def test_a_batch_with_its_controls(run: Run, tmp_path: Path) -> None:
    lines = run("A batch, with its controls")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [line.split(":")[0] for line in lines] == ["alone", "references", "shuffled", "noise"]
    for line in lines:
        name, *numbers = re.split(r"[:\s\[\],]+", line.strip(" ]"))
        found = metrics["runs"][name]["tasks"]["vqa_closed"]["overall"]["metrics"][
            "balanced_accuracy"
        ]
        assert [float(n) for n in numbers] == pytest.approx(
            [found[key] for key in ("value", "low", "high")], abs=6e-4
        )


def test_pairs_and_tuning(run: Run, tmp_path: Path) -> None:
    counts, last = run("Preference pairs, and tuning")
    assert "'failed': 0" in counts
    rows = [json.loads(line) for line in (tmp_path / "pairs/pairs.jsonl").open()]
    assert {row["kind"] for row in rows} <= {"cross_modal", "copy", "resist"} and rows
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    assert re.fullmatch(r"vlm\+adapter \d+ parameters", last)


def test_an_encoder_of_your_own(run: Run, tmp_path: Path) -> None:
    shown = run("An encoder of your own")
    assert any(line.startswith("Domain: radiology") for line in shown)
    assert sum(line.startswith(("+ ", "- ")) for line in shown) == 8
    manifest = json.loads((tmp_path / "index-alike/manifest.json").read_text())
    assert manifest["encoder"]["fingerprint"] == "thumbnail-16-v1"


def test_the_examples_of_the_public_names_are_true(run: Run, tmp_path: Path) -> None:
    """In the folder of the batch script, each docstring's example runs after those before it."""
    run("A batch, with its controls")
    shutil.copy(next((tmp_path / "data/images").iterdir()), tmp_path / "chest.png")
    names = {name: getattr(mmedrag, name) for name in mmedrag.__all__}
    shown = [names["Index"], mmedrag.Pipeline, mmedrag.load_system, mmedrag.Example.of]
    for thing in (*shown, mmedrag.ask, mmedrag.evaluate, mmedrag.build_pairs):
        text = inspect.getdoc(thing) or ""
        (example,) = re.findall(r"Example::\n\n((?:    .*\n?|\n)+)", text)
        exec(textwrap.dedent(example), names)
    assert (tmp_path / "pairs/pairs.jsonl").is_file() and names["reply"].references
