"""The main job on real images of three domains: import, train, index, run, score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmedrag import embedded
from mmedrag.cli.main import main

pytestmark = [pytest.mark.data, pytest.mark.model]
SOURCES = {"vqa-rad": 40, "idrid": 40, "bccd": 40}  # rows taken of each


@pytest.fixture
def mm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command in this process; its JSON result."""

    def run(*args: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*map(str, args), "--json"])
        shown = capsys.readouterr()
        assert done.value.code == 0, shown.err
        return json.loads(shown.out)

    return run


@pytest.mark.skipif("encoder" not in embedded.available(), reason="no embedded encoder yet")
def test_main_job_on_real_images(mm: Callable[..., Any], sample_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, count in SOURCES.items():
        lines = (sample_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        step = max(1, len(lines) // count)
        (source / f"{name}.jsonl").write_text("\n".join(lines[::step][:count]) + "\n")
    data = tmp_path / "data"
    made = mm("data", "import", "manifest", source, data, "--image-root", sample_data)
    assert made["rejected"] == 0 and made["images"] == sum(SOURCES.values())
    found = mm(
        "train",
        "domain",
        data,
        "--out",
        tmp_path / "domain",
        "--encoder",
        "none",
        "--set",
        "trees=60",
        "--set",
        "outliers=200",
    )
    assert Path(found["out"], "train_ids.jsonl").exists()
    metrics = mm("domain", "eval", data, "--model", tmp_path / "domain", "--no-outliers")
    assert metrics["accuracy_forced"]["value"] > 0.6  # chance: one in three
    indexes: list[object] = []
    for domain in ("radiology", "ophthalmology", "pathology"):
        out = tmp_path / f"index-{domain}"
        assert mm("index", "build", data, "--domain", domain, "--out", out)["count"] > 5
        indexes += ["--index", out]
    own = "vlm" in embedded.available()
    generator = () if own else ("--set", "generator.kind=scripted")
    run = tmp_path / "run"
    result = mm(
        "run",
        data,
        "--out",
        run,
        "--split",
        "test",
        "--domain-model",
        tmp_path / "domain",
        *indexes,
        *generator,
        "--limit",
        60,
    )
    assert result["failed"] == 0
    traces = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    assert any(trace["hits"] for trace in traces)
    rows = map(json.loads, (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    patients = {row["id"]: row.get("patient") for row in rows}
    for trace in traces:  # train and test share no patient, and an index would exclude one
        if trace.get("patient"):
            assert trace["patient"] not in {patients[hit["id"]] for hit in trace["hits"]}
    scored = mm("eval", run, "--data", data, "--out", tmp_path / "m.json", "--resamples", 200)
    closed = scored["runs"]["run"]["tasks"]["vqa_closed"]["overall"]
    assert 0 <= closed["metrics"]["balanced_accuracy"]["value"] <= 1
    assert {"always_yes", "always_no"} & set(closed["controls"])
