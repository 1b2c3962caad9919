"""`retriever eval` and `retrieve` say how far the best references agree with the cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmedrag.cli.main import main
from mmedrag.phantom import build_benchmark, cells, findings_in, has, load_domain
from mmedrag.records import Finding
from mmedrag.runtime import DataFolder

pytestmark = pytest.mark.model
DOMAIN = "radiology"


def call(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == code, err
    return out, err


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agreement") / "data"
    build_benchmark(path, studies=60, domains=[DOMAIN], seed=3, workers=1, size=64)
    return path


@pytest.fixture(scope="module")
def index(benchmark: Path) -> Path:
    with pytest.raises(SystemExit):
        main(["index", "build", str(benchmark), "--domain", DOMAIN, "--out", f"{benchmark}-index"])
    return Path(f"{benchmark}-index")


def by_hand(data: Path, hits: dict[str, str]) -> tuple[float, int, int]:
    """Mean agreement, n and present of studies' references, from questions and truth alone."""
    truth, spec = DataFolder(data).truth(), load_domain(DOMAIN)
    counts: dict[str, list[int]] = {}
    seen = set()
    for row in DataFolder(data).examples():
        meta = row.meta
        cell = (meta["study"], meta.get("finding"), meta.get("side"))
        if meta.get("form") not in ("presence", "negated") or cell in seen:
            continue
        seen.add(cell)
        if meta["study"] in hits:
            said = findings_in(DOMAIN, hits[meta["study"]]).get(meta["finding"])
            state = Finding(present=bool(said and said["present"]), side=(said or {}).get("side"))
            if state.present and state.side is None and spec.by_name[meta["finding"]].sided:
                state = Finding(present=True, side=spec.both)
            there = has(spec, truth[meta["study"]].findings[meta["finding"]], meta.get("side"))
            right = has(spec, state, meta.get("side")) == there
            count = counts.setdefault(meta["finding"], [0, 0, 0, 0])
            count[0 if there else 2] += right
            count[1 if there else 3] += 1
    defined = [c for c in counts.values() if c[1] and c[3]]
    mean = sum((c[0] / c[1] + c[2] / c[3]) / 2 for c in defined) / len(defined)
    return mean, sum(c[1] + c[3] for c in defined), sum(c[1] for c in defined)


def test_retrieve_on_the_benchmark(
    benchmark: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hits.jsonl"
    args = ("retrieve", benchmark, "--index", index, "--domain", DOMAIN, "--out", out)
    result = json.loads(call(capsys, *args, "--json")[0])["finding_agreement"][DOMAIN]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    hits = {row["meta"]["study"]: row["hits"][0]["text"] for row in rows}
    mean, n, present = by_hand(benchmark, hits)
    assert result["mean"]["value"] == pytest.approx(mean, abs=1e-6)
    assert (result["mean"]["n"], result["mean"]["present"]) == (n, present)
    assert result["corpus"] == len(DataFolder(benchmark).corpus("train"))
    assert result["labeller"] == "grammar" and result["cases"] == len(hits)
    spec = load_domain(DOMAIN)
    assert set(result["findings"]) <= {name for name, _ in cells(spec)}
    for cell in result["findings"].values():
        assert {"value", "low", "high", "n", "present", "shuffled"} == set(cell)
    assert result["mean"]["low"] < result["mean"]["value"] < result["mean"]["high"]
    assert result["mean"]["value"] > result["mean"]["shuffled"]["value"]
    text, _ = call(capsys, *args, "--limit", 12)
    assert f"agreement of the best reference, {DOMAIN}: " in text
    assert "corpus studies, read by grammar" in text and "  mean: " in text


def test_retriever_eval_on_the_benchmark(
    benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("retriever", "eval", benchmark, "--domain", DOMAIN, "--no-untrained")
    result = json.loads(call(capsys, *args, "--json")[0])
    found = result["finding_agreement"][DOMAIN]
    assert found["corpus"] == result["gallery"] and found["mean"]["n"] > 20
    assert "  mean: " in call(capsys, *args)[0]


def plain(path: Path, source: Path) -> Path:
    """The benchmark's pictures and reports as anybody's: no truth, no findings in questions."""
    path.mkdir()
    (path / "images").symlink_to(source / "images")
    for name in ("corpus", "examples"):
        rows: list[dict[str, Any]] = [
            json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()
        ]
        for row in rows:
            row.pop("meta", None)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(text)
    return path


def test_any_reports_are_read_by_keywords(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without truth the own report is; a user's own words are looked for too."""
    data = plain(tmp_path / "plain", benchmark)
    own = tmp_path / "own.toml"
    own.write_text('[radiology]\nheart = ["heart*", "cardiac*"]\n')
    args = ("retriever", "eval", data, "--domain", DOMAIN, "--no-untrained", "--json")
    found = json.loads(call(capsys, *args)[0])["finding_agreement"][DOMAIN]
    assert found["labeller"] == "keywords" and "heart" not in found["findings"]
    assert found["findings"]["effusion"]["n"] == found["cases"]
    more = json.loads(call(capsys, *args, "--findings", own)[0])["finding_agreement"][DOMAIN]
    assert more["findings"]["heart"]["present"] > 0
    del more["findings"]["heart"]
    assert more["findings"] == found["findings"]


def test_retrieve_reads_the_pictures_own_reports(
    benchmark: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions carry no report: that of the same picture is the truth, each picture once."""
    data = plain(tmp_path / "plain", benchmark)
    out = tmp_path / "hits.jsonl"
    args = ("retrieve", data, "--index", index, "--domain", DOMAIN, "--out", out, "--json")
    found = json.loads(call(capsys, *args, "--task", "vqa")[0])["finding_agreement"][DOMAIN]
    assert found["labeller"] == "keywords"
    assert found["cases"] == len({json.loads(line)["image"] for line in out.open()})
    released = json.loads(call(capsys, *args, "--format", "released", "--task", "vqa")[0])
    assert released["finding_agreement"][DOMAIN] == found
    error = call(capsys, *args, "--findings", benchmark / "corpus.jsonl", code=2)[1]
    assert "expected TOML" in error and error.count("\n") == 1


def test_no_report_no_truth_no_agreement(
    benchmark: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = plain(tmp_path / "plain", benchmark)
    (data / "corpus.jsonl").unlink()
    rows = [json.loads(line) for line in (data / "examples.jsonl").read_text().splitlines()]
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["task"] == "vqa")
    (data / "examples.jsonl").write_text(kept)
    out = tmp_path / "hits.jsonl"
    args = ("retrieve", data, "--index", index, "--domain", DOMAIN, "--out", out, "--json")
    assert "finding_agreement" not in json.loads(call(capsys, *args)[0])
