"""Options of the retrieval commands that nothing else calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli_tools import call
from mmedrag.records.records import UserError
from mmedrag.retrieval.index import Filter
from mmedrag.retrieval.index_build import build_index
from retrieval_tools import ColourEncoder, make_data

pytestmark = pytest.mark.model

OWN = ("--retriever", "retrieval_tools:colour")  # an index names no code: the user does


@pytest.fixture
def index(tmp_path: Path) -> Path:
    encoder = ColourEncoder("retrieval_tools:colour")
    build_index([make_data(tmp_path / "data")], tmp_path / "index", "radiology", encoder)
    return tmp_path / "index"


def test_where_near_and_keep_own(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.jsonl"
    base = (
        "retrieve",
        tmp_path / "data",
        "--index",
        index,
        *OWN,
        "--domain",
        "radiology",
        "--out",
        out,
        "--rule",
        "fixed_k",
        "--set",
        "selection.k=3",
        "--json",
    )
    result = call(capsys, *base)
    assert result["rows"] == 40 and result["excluded"] > 0
    result = call(capsys, *base, "--keep-own")
    assert result["excluded"] == 0
    call(capsys, *base, "--where", "patient=p3", "--where", "patient=p4", "--near", -1)
    found = [json.loads(line)["hits"] for line in out.read_text().splitlines()]
    allowed = {"s0006", "s0007", "s0008", "s0009"}
    assert {hit["id"] for hits in found for hit in hits} == allowed
    error = call(capsys, *base, "--where", "colour=red", code=2)
    assert "colour=red: expected patient=" in error


def test_conditions_of_a_filter() -> None:
    assert Filter.parse([]) is None
    assert Filter.parse(["source=a", "source=b", "from=2020-01-01"]) == Filter(
        source=["a", "b"], date_from="2020-01-01"
    )
    with pytest.raises(UserError, match="to=: given twice"):
        Filter.parse(["to=2020", "to=2021"])
    with pytest.raises(UserError, match="and a value"):
        Filter.parse(["source="])


def test_calibrate_writes_a_recipe(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = make_data(tmp_path / "val", 30, seed=1, split="val", first=100)
    for folder in (tmp_path / "data", val.path):
        rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
        for row in rows:
            row["meta"]["labels"] = {"finding": row["text"].split("There is ")[-1].split(", ")}
        (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(capsys, "index", "update", index, tmp_path / "data", *OWN, "--json")
    recipe = tmp_path / "kept.toml"
    args = (
        "retriever",
        "calibrate",
        index,
        *OWN,
        tmp_path / "data",
        val.path,
        "--level",
        0.5,
        "--out",
        recipe,
        "--json",
    )
    result = call(capsys, *args, "--precision", 0.6)
    assert result["held_out"]["reached"] >= 0.6 and result["measure"] == "label_jaccard"
    assert f"threshold = {result['threshold']}" in recipe.read_text()
    out = tmp_path / "o.jsonl"
    call(
        capsys,
        "retrieve",
        val.path,
        "--index",
        index,
        *OWN,
        "--domain",
        "radiology",
        "--out",
        out,
        "--config",
        recipe,
        "--json",
    )
    kept = [json.loads(line)["selection"] for line in out.read_text().splitlines()]
    assert {selection["rule"] for selection in kept} == {"calibrated"}
    assert "for precision 0.6" in kept[0]["reason"]
    result = call(capsys, *args, "--precision", 0.999, code=1)
    assert result["threshold"] is None
    result = call(capsys, *args, "--precision", 0.6, "--rule", "log_ratio")
    assert next(iter(result)) == "held_out" and result["held_out"]["reached"] >= 0.6
    assert f"gamma = {result['gamma']}" in recipe.read_text()
    said = call(capsys, *args[:-1], "--precision", 0.6, "--rule", "best", code=2)
    assert "expected one of log_ratio" in said


def test_zero_shot_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.toml"
    prompts.write_text('fluid = ["effusion"]\nbone = ["fracture"]\n')
    base = ("train", "domain", "--out", tmp_path / "d", "--encoder", "retrieval_tools:colour")
    result = call(capsys, *base, "--prompts", prompts, "--json")
    assert (result["kind"], result["labels"]) == ("zero-shot", ["bone", "fluid"])
    assert "DATA folders, or --prompts" in call(capsys, *base, code=2)
