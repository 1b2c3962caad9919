"""The shipped domain model for real pictures: it needs no extra and flags what is no
picture of its domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmedrag import embedded
from mmedrag.cli.main import main
from mmedrag.domain import open_domain, outliers
from mmedrag.pipeline import real_domain_model
from mmedrag.runtime import numpy_rng

pytestmark = pytest.mark.model
SPEC = "embedded:domain-real"
FOLDER = embedded.path("domain-real")


def call(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, args), "--json"])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return json.loads(out)


def test_the_folder_holds_weights_and_their_origin_alone() -> None:
    assert real_domain_model() == SPEC
    model = open_domain(SPEC)
    assert model.labels == ["ophthalmology", "pathology", "radiology"] and model.encoder is None
    names = {"README.md", "config.json", "head.safetensors", "train_ids.jsonl"}
    assert {p.name for p in FOLDER.iterdir()} == names
    rows = [json.loads(line) for line in (FOLDER / "train_ids.jsonl").read_text().splitlines()]
    assert len(rows) == 829 and all(len(row["image_sha256"]) == 64 for row in rows)
    assert {row["id"].split("/")[0] for row in rows} == {
        "vqa-rad",
        "covid-chestxray",
        "idrid",
        "nct-crc-he",
        "dsb2018",
        "bccd",
    }  # and none of dtr-histology
    card = (FOLDER / "README.md").read_text()
    for source in ("idrid (CC-BY-4.0)", "nct-crc-he (CC-BY-4.0)", "covid-chestxray (CC-BY-3.0)"):
        assert source in card


def test_what_is_no_such_picture_is_flagged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise, blanks and other drawings through the command; a seed that no fit has seen."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(120):
        rng = numpy_rng(9_000_000 + number)
        kind = ("noise", "blank", "drawn")[number % 3]
        if kind == "noise":
            high, wide = rng.integers(64, 400, 2)
            pixels = np.clip(rng.normal(128, rng.uniform(10, 90), (high, wide, 3)), 0, 255)
            picture = Image.fromarray(pixels.astype(np.uint8))
        elif kind == "blank":
            picture = Image.new("RGB", (200, 150), tuple(int(v) for v in rng.integers(0, 256, 3)))
        else:
            picture = outliers.outlier(rng)
        picture.save(tmp_path / f"images/{number}.png")
        row = {"id": f"{kind}-{number}", "image": f"images/{number}.png", "text": ""}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    out = tmp_path / "found.jsonl"
    call(capsys, "domain", "predict", tmp_path, "--model", SPEC, "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for kind in ("noise", "blank", "drawn"):
        labels = [row["label"] for row in found if row["id"].startswith(kind)]
        assert len(labels) == 40 and labels.count("unknown") >= 38
    assert "six public collections" in next(r["reason"] for r in found if r["label"] == "unknown")


@pytest.mark.data
def test_pictures_that_no_fit_saw(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that were not fitted on: another collection, and other clinics of a known one."""
    data, out = tmp_path / "data", tmp_path / "found.jsonl"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("covid-chestxray", "dtr-histology"):
        lines = (sample_data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        held = [line for line in lines if "-NC" in json.loads(line)["licence"]]
        (source / f"{name}.jsonl").write_text("\n".join(held) + "\n", encoding="utf-8")
    call(capsys, "data", "import", "manifest", source, data, "--image-root", sample_data)
    call(capsys, "domain", "predict", data, "--model", SPEC, "--out", out)
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    pictures = {row["id"] for row in corpus}  # reports of the same pictures are predicted too
    found = [row for row in map(json.loads, out.open()) if row["id"] in pictures]
    measured = json.loads((FOLDER / "config.json").read_text())["metrics"]
    for name, told in (
        ("covid-chestxray", measured["other pictures of covid-chestxray"]),
        ("dtr-histology", measured["never fitted on: dtr-histology"]),
    ):
        rows = [row for row in found if row["id"].startswith(name)]
        assert len(rows) == told["n"]
        right = [max(row["scores"], key=row["scores"].get) == row["domain"] for row in rows]
        lost = [row["label"] == "unknown" for row in rows]
        assert np.mean(right) == pytest.approx(told["right"], abs=0.02) and np.mean(right) >= 0.98
        assert np.mean(lost) == pytest.approx(told["lost"], abs=0.03)
