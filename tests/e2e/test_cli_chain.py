"""The commands one after the other, on a small benchmark, with a random model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmedrag.cli.main import main

pytestmark = pytest.mark.model

ENCODER = '''
"""An encoder of a third party: mean colours of an 8 x 8 grid, hashed words."""
import zlib
import numpy as np
from mmedrag.images import load_image
from mmedrag.records import Answer

class Grid:
    dim, fingerprint, spec = 192, "grid-1", "grid_encoder:Grid"

    def __init__(self, spec, device=None):
        self.spec = spec

    def images(self, images):
        rows = [(i if hasattr(i, "resize") else load_image(i)).convert("RGB").resize((8, 8))
                for i in images]
        return unit(np.array([np.asarray(r, np.float32).ravel() - 127 for r in rows]))

    def texts(self, texts):
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % self.dim] += 1
        return unit(rows)

class Teller:
    """Says yes as soon as it is given a reference."""
    name, image_size, context = "teller", 32, 4096

    def __init__(self, model=None, adapter=None, **options):
        self.options = options

    def generate(self, requests):
        return [Answer(text="Yes." if r.prompt.references else "No.", model=self.name)
                for r in requests]

    def logprobs(self, requests, texts):
        return [0.0] * len(texts)

    def count_tokens(self, prompt, images=1):
        return len(prompt.text.split())

def best(scores, share=0.5):
    return max(1, round(len(scores) * share)), f"the best {share:g}"

def unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
'''
Run = Callable[..., Any]
OWN = ("--retriever", "grid_encoder:Grid")  # an index names no code: the user does, each time


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A benchmark, a random model, an encoder, and a system file that names them."""
    from mmedrag.answering.generators.random_model import random_llava
    from mmedrag.phantom.build import build_benchmark

    at = tmp_path_factory.mktemp("chain")
    (at / "grid_encoder.py").write_text(ENCODER)
    sys.path.insert(0, str(at))
    build_benchmark(at / "data", studies=48, domains=["radiology", "pathology"], size=32, closed=2)
    random_llava(at / "model")
    (at / "system.toml").write_text(
        '[domain]\nmodel = "domain"\n[domains.radiology]\nindex = "index-radiology"\n'
        'retriever = "grid_encoder:Grid"\n'
        '[generator]\nmodel = "model"\nbatch_size = 8\n[selection]\nrule = "fixed_k"\nk = 2\n'
    )
    return SimpleNamespace(path=at, data=at / "data", system=at / "system.toml")


@pytest.fixture
def mm(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; its JSON result (exit code 0 expected unless told)."""

    def run(*args: object, code: int = 0) -> Any:
        capsys.readouterr()
        try:
            main([*map(str, args), "--json"])
        except SystemExit as done:
            shown = capsys.readouterr()
            assert done.code == code, shown.err
            return json.loads(shown.out) if shown.out else shown.err
        raise AssertionError("main() did not exit")

    return run


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_domain_and_index(mm: Run, place: SimpleNamespace) -> None:
    at, data = place.path, place.data
    quick = ("--set", "trees=20", "--set", "outliers=100")
    mm("train", "domain", data, "--out", at / "domain", "--encoder", "none", *quick)
    found = mm("domain", "predict", data, "--model", at / "domain", "--out", at / "labels.jsonl")
    assert found["rows"] == len(rows(at / "labels.jsonl")) > 28
    for domain in ("radiology", "pathology"):
        out = at / f"index-{domain}"
        made = mm(
            "index",
            "build",
            data,
            "--domain",
            domain,
            "--retriever",
            "grid_encoder:Grid",
            "--out",
            out,
        )
        assert (made["domain"], made["dim"]) == (domain, 192)
        assert mm("index", "info", out)["count"] == made["count"] > 3
        assert mm("index", "verify", out)["sound"]
    # a copy: add nothing new, remove one, find damage
    copy = at / "copy"
    shutil.copytree(at / "index-radiology", copy)
    assert mm("index", "add", copy, data, *OWN)["added"] == 0
    first = rows(data / "corpus.jsonl")
    gone = next(r["id"] for r in first if r["split"] == "train" and r["domain"] == "radiology")
    assert mm("index", "remove", copy, "--id", gone)["removed"] == 1
    assert mm("index", "remove", copy, "--id", gone, code=1)["missing"] == [gone]
    assert mm("index", "update", copy, data, *OWN)["added"] == 1
    file = next(copy.glob("vectors-*"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert not mm("index", "verify", copy, code=1)["sound"]


def test_retrieve(mm: Run, place: SimpleNamespace) -> None:
    at = place.path
    index = ("--index", at / "index-radiology", "--index", at / "index-pathology", *OWN)
    common = ("retrieve", place.data, "--split", "test", "--domain-model", at / "domain", *index)
    result = mm(*common, "--out", at / "hits.jsonl", "--rule", "fixed_k")
    native = rows(at / "hits.jsonl")
    assert result["rows"] == len(native)
    assert all(len(r["selection"]["kept"]) <= 1 and "prompt" not in r for r in native)
    assert any(r["hits"] for r in native)
    mm(
        *common,
        "--out",
        at / "released.jsonl",
        "--format",
        "released",
        "--set",
        "selection.k=3",
        "--rule",
        "fixed_k",
    )
    counts = {row["retrieve_k"] for row in rows(at / "released.jsonl")}
    assert counts <= {0, 3} and 3 in counts
    for row in rows(at / "released.jsonl"):
        assert row["retrieve_k"] == len(row["reference_reports"])
    mm(
        *common,
        "--out",
        at / "own.jsonl",
        "--rule",
        "grid_encoder:best",
        "--set",
        "selection.share=0.5",
    )
    kept = {len(row["selection"]["kept"]) for row in rows(at / "own.jsonl") if row["hits"]}
    assert kept == {4}
    assert "has one already" in mm(*common, *index[:2], "--out", at / "x", code=2)


def test_run_eval_report(mm: Run, place: SimpleNamespace) -> None:
    at, data = place.path, place.data
    common = ("run", data, "--system", place.system, "--split", "test", "--limit", 18)
    whole = mm(*common, "--out", at / "run")
    assert whole["failed"] == 0
    traces = rows(at / "run" / "traces.jsonl")
    assert {t["condition"]["references"] for t in traces} == {"selected"}
    assert all(len(t["selection"]["kept"]) <= 2 for t in traces)
    config = json.loads((at / "run" / "config.json").read_text())
    assert config["system"]["generator"]["batch_size"] == 8
    assert config["dtype"] == "float32"
    assert str(data / "examples.jsonl") in config["inputs"]
    assert any(name.endswith("index-radiology") for name in config["inputs"])
    for part in (1, 2):
        mm(*common, "--out", at / f"part{part}", "--shard", f"{part}/2", "--set", "chunk=4")
    mm(*common, "--out", at / "chunked", "--set", "chunk=4")
    mm("run", "merge", at / "part1", at / "part2", "--out", at / "merged")
    merged, chunked = (at / name / "traces.jsonl" for name in ("merged", "chunked"))
    assert merged.read_bytes() == chunked.read_bytes()
    mm(*common, "--out", at / "alone", "--no-rag", "--task", "vqa")
    mm(*common, "--out", at / "own", "--references", "own", "--noise", "blank", "--task", "vqa")
    own = rows(at / "own" / "traces.jsonl")
    assert all(t["selection"]["kept"] == [t["meta"]["study"]] for t in own)
    assert "exclude each other" in mm(
        *common, "--out", at / "x", "--no-rag", "--references", "own", code=2
    )
    runs = (at / "run", at / "alone", at / "own")
    scored = mm("eval", *runs, "--data", data, "--out", at / "m.json", "--resamples", 200)
    assert set(scored["runs"]) == {"run", "alone", "own"}
    assert json.loads((at / "m.json").read_text()) == scored
    page = mm("report", *runs, "--data", data, "--metrics", at / "m.json", "--out", at / "page")
    assert Path(page["page"]).read_text().startswith("<!")


def test_same_answers_whatever_the_batch_size(mm: Run, place: SimpleNamespace) -> None:
    at = place.path
    said = []
    for size in (1, 5):
        out = at / f"batch{size}"
        mm(
            "run",
            place.data,
            "--system",
            place.system,
            "--split",
            "test",
            "--task",
            "vqa",
            "--limit",
            30,
            "--out",
            out,
            "--set",
            f"generator.batch_size={size}",
            "--set",
            "generator.dtype=float32",
        )
        said.append([(t["example_id"], t["answer"]["text"]) for t in rows(out / "traces.jsonl")])
    assert said[0] == said[1]


def test_a_bad_row_is_listed_and_the_rest_goes_on(
    mm: Run, place: SimpleNamespace, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    study = next(r for r in rows(data / "examples.jsonl") if r["split"] == "test")
    (data / study["image"]).write_bytes(b"not a picture")
    out = tmp_path / "run"
    few = ("--split", "test", "--limit", 12)
    result = mm("run", data, "--system", place.system, *few, "--out", out, code=1)
    bad = [t for t in rows(out / "traces.jsonl") if "error" in t]
    assert result["failed"] == len(bad) > 0
    assert {t["image"] for t in bad} == {study["image"]}
    assert all(Path(study["image"]).name in t["error"] for t in bad)


def test_ask(mm: Run, place: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    at = place.path
    row = next(r for r in rows(place.data / "examples.jsonl") if r["domain"] == "radiology")
    image, asked = place.data / row["image"], ("--system", place.system, "--domain", "radiology")
    found = mm("ask", image, "Is there a nodule?", *asked)
    assert found["answer_type"] == "closed"
    assert found["domain"]["label"] == "radiology"
    assert len([r for r in found["references"] if r["used"]]) == 2
    assert all(r["why"] for r in found["references"])
    sure = mm("ask", image, "Is there a nodule?", *asked, "--min-confidence", 1)
    assert sure["abstained"]
    report = mm("ask", image, "--report", *asked, "--no-rag")
    assert (report["task"], report["references"]) == ("report", [])
    grey = at / "noise.png"
    Image.effect_noise((64, 64), 90).save(grey)
    unknown = mm("ask", grey, "Is there a nodule?", "--system", place.system)
    assert unknown["domain"]["label"] == "unknown" and unknown["abstained"]
    assert unknown["references"] == []
    assert "no such image" in mm("ask", at / "none.png", "Is it?", *asked, code=2)
    assert "QUESTION or --report" in mm("ask", image, *asked, code=2)
    with pytest.raises(SystemExit):
        main([str(a) for a in ("ask", image, "Is there a nodule?", *asked)])
    shown = capsys.readouterr().out
    assert "kept by the rule fixed_k" in shown and "not a medical device" in shown


def test_pairs(mm: Run, place: SimpleNamespace) -> None:
    at = place.path
    teller = (
        "--index",
        at / "index-radiology",
        *OWN,
        "--domain",
        "radiology",
        "--task",
        "vqa",
        "--set",
        "generator.kind=grid_encoder:Teller",
        "--rule",
        "fixed_k",
    )
    args = ("pairs", place.data, "--out", at / "pairs", *teller)
    found = mm(*args)
    pairs = rows(at / "pairs" / "pairs.jsonl")
    assert {p["kind"] for p in pairs} == {"cross_modal", "copy", "resist"}
    assert sum(found["pairs"].values()) == len(pairs)
    assert sorted(p.name for p in (at / "pairs" / "traces").iterdir() if p.is_dir()) == [
        "clean",
        "clean-references",
        "noise-references",
    ]
    examples = {r["id"]: r for r in rows(place.data / "examples.jsonl")}
    assert {examples[p["trace_ids"][0].split("@")[0]]["split"] for p in pairs} == {"val"}
    before = (at / "pairs" / "pairs.jsonl").read_bytes()
    mm(*args)
    assert (at / "pairs" / "pairs.jsonl").read_bytes() == before
    for format in ("released", "ms-swift"):
        made = mm("pairs", "export", at / "pairs", "--format", format, "--out", at / format)
        assert made["rows"] == len(pairs)
    again = mm(
        "pairs",
        "import",
        at / "released" / "pairs.json",
        "--out",
        at / "again",
        "--images",
        place.data,
        code=1,
    )
    assert again["faults"]
    assert len(rows(at / "again" / "pairs.jsonl")) == len(pairs)
