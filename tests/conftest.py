"""Shared by all tests: where the sample data is, and one small data folder made by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network must fail
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real images that MMEDRAG_SAMPLE_DATA names."""
    name = os.environ.get("MMEDRAG_SAMPLE_DATA")
    if not name or not Path(name).is_dir():
        pytest.skip("MMEDRAG_SAMPLE_DATA names no folder: no real images to test on")
    return Path(name).resolve()


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """A DATA folder: 12 studies of 6 patients in two domains, three rows each, with truth."""
    return make_small_data(tmp_path / "data")


def make_small_data(path: Path) -> Path:
    """Also used by tests that need the folder in a child process."""
    from PIL import Image

    from mmedrag.records.records import Example, Finding, Reference, Truth
    from mmedrag.runtime.files import write_jsonl

    (path / "images").mkdir(parents=True, exist_ok=True)
    examples, corpus, truth = [], [], []
    for number in range(12):
        study, patient = f"s{number:02d}", f"p{number // 2}"
        domain = "radiology" if number % 4 < 2 else "ophthalmology"
        image = f"images/{study}.png"
        Image.new("RGB", (32, 32), (20 * number, 100, 255 - 20 * number)).save(path / image)
        meta = {"study": study, "finding": "cardiomegaly", "side": None, "form": "presence"}
        shared = dict(image=image, domain=domain, patient=patient, split="test")
        answer = "yes" if number % 2 else "no"
        examples += [
            Example(
                id=f"{study}-q{i}",
                task="vqa",
                question=f"Is finding {i} present?",
                answer=answer,
                answer_type="closed",
                meta=meta,
                **shared,
            )
            for i in range(2)
        ] + [
            Example(id=f"{study}-r", task="report", answer=f"Report {study}.", meta=meta, **shared)
        ]
        said = "The heart is enlarged." if number % 2 else "The heart is not enlarged."
        corpus.append(Reference(id=study, text=said, meta={"study": study}, **shared))
        findings = {"cardiomegaly": Finding(present=bool(number % 2))}
        truth.append(Truth(study=study, patient=patient, domain=domain, findings=findings))
    write_jsonl(path / "examples.jsonl", examples)
    write_jsonl(path / "corpus.jsonl", corpus)
    write_jsonl(path / "truth.jsonl", truth)
    return path
