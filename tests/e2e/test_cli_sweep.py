"""`mmedrag sweep`: points on the axis of measured agreement, resumable, with its three files."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mmedrag.cli.main import main
from mmedrag.evaluation import agreement, asked_twice, cases_of, fit_fuser
from mmedrag.records import Trace, is_right
from mmedrag.runtime import read_jsonl

pytestmark = pytest.mark.model
ROWS = ["ignored", "naive", "selection", "own-report", "fuser"]
SMALL = ("--seeds", "2", "--set", "sweep.domains=['radiology']", "--set", "sweep.asked=8")


def sweep(out: Path, *args: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--out", str(out), "--studies", "30", *SMALL, *args])
    assert (ended.value.code or 0) == code


def traces(path: Path) -> list[Trace]:
    return list(read_jsonl(path / "traces.jsonl", Trace))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    sweep(out, "--point", "1", "--point", "0")
    return out


def test_every_row_at_every_point(made: Path) -> None:
    """What the file says is what the runs say, read again by hand."""
    points = json.loads((made / "sweep.json").read_text())["points"]
    assert {point["point"] for point in points} == {"0", "1"}
    places = [point["agreement"]["mean"]["value"] for point in points]
    assert places == sorted(places)
    for point in points:
        assert list(point["rows"]) == ROWS
        seeds = sorted((made / f"similarity-{point['point']}").iterdir())
        base, own, chosen = (
            [traces(seed / "runs" / name) for seed in seeds]
            for name in ("base/none", "selection/own-report", "selection/references")
        )
        for name, runs in (("ignored", base), ("own-report", own), ("selection", chosen)):
            right = [is_right(trace) for run in runs for trace in run]
            cell = point["rows"][name]["effects"]["accuracy"]
            assert cell["n"] == len(right) > 40
            assert cell["value"] == pytest.approx(sum(right) / len(right), abs=1e-6)
            assert cell["low"] <= cell["value"] <= cell["high"]
        hits = [list(read_jsonl(seed / "hits-selection.jsonl", Trace)) for seed in seeds]
        pooled = agreement([case for run in hits for case in cases_of(run)["radiology"]], 1)
        found = point["agreement"]
        assert found["mean"]["value"] == pooled.mean.value and found["corpus"] > 10
        asked = [asked_twice(a, b) for a, b in zip(base, chosen, strict=True)]
        answers = fit_fuser(asked[1], 5001)(asked[0]) + fit_fuser(asked[0], 5001)(asked[1])
        truth = [none.target for pairs in asked for none, _ in pairs]
        right = [a == b for a, b in zip(answers, truth, strict=True)]
        fuser = point["rows"]["fuser"]["effects"]["accuracy"]["value"]
        assert fuser == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_table_and_figure(made: Path) -> None:
    with (made / "sweep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(ROWS) * 3
    assert {row["row"] for row in rows} == set(ROWS)
    drawing = ET.parse(made / "sweep.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    texts = "".join(drawing.itertext())
    assert "references ignored" in texts and "var(--s0)" in texts
    lines = drawing.findall(".//{http://www.w3.org/2000/svg}polyline")
    bands = drawing.findall(".//{http://www.w3.org/2000/svg}polygon")
    assert len(lines) == len(bands) == len(ROWS)


def test_what_is_finished_stands_and_points_join(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sorted(made.glob("*/*/runs/*/*/traces.jsonl"))
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in runs]
    first = (made / "sweep.json").read_bytes()
    sweep(made, "--point", "1", "--point", "0")
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in runs] == before
    assert (made / "sweep.json").read_bytes() == first
    assert "figure: " in capsys.readouterr().out


def test_a_tuned_row_joins(made: Path) -> None:
    """By the same command, and nothing that was there is run again or says anything else."""
    plain = json.loads((made / "sweep.json").read_text())["points"]
    runs = {path: path.stat().st_mtime_ns for path in made.glob("*/*/runs/*/*/traces.jsonl")}
    sweep(made, "--point", "1", "--point", "0", "--adapter", "embedded:adapter")
    assert all(path.stat().st_mtime_ns == when for path, when in runs.items())
    tuned = json.loads((made / "sweep.json").read_text())["points"]
    name = "pt-embedded-adapter"
    for before, after in zip(plain, tuned, strict=True):
        assert {name, f"{name}-none"} == set(after["rows"]) - set(before["rows"])
        assert {key: after["rows"][key] for key in ROWS} == before["rows"]
        assert after["rows"][f"{name}-none"]["effects"]["over_reliance_rate"]["value"] == 0


def test_what_cannot_be_swept_is_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path / "a", "--point", "nowhere", code=2)
    assert "regime: got 'nowhere', expected uniform" in capsys.readouterr().err
    sweep(tmp_path / "a", "--adapter", str(tmp_path), code=2)
    assert "no adapter" in capsys.readouterr().err
    sweep(tmp_path / "a", "--point", "nan", code=2)
    assert "regime: got 'nan', expected uniform" in capsys.readouterr().err
    sweep(tmp_path / "a", "--point", "1.5", code=2)
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not (tmp_path / "a").exists()
    sweep(made, "--point", "1", "--set", "sweep.k=3", code=2)
    assert capsys.readouterr().err.count("error:") == 1
