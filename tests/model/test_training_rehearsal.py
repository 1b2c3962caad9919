"""All stages of the embedded models' training through the command, a few steps each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training.embedded.stages import STAGES

import mmedrag
from mmedrag.answering.generators import load_generator
from mmedrag.domain import open_domain
from mmedrag.experiments import PAIRWISE, SETS
from mmedrag.phantom import DOMAINS
from mmedrag.pipeline.system import SIDECAR
from mmedrag.records import Prompt, Request
from mmedrag.retrieval.encoders.load import load_encoder

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]
VQA = ("vqa_easy", "vqa_full", "references_only", "vqa_with_references")


def command(*args: object) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(Path(mmedrag.__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "training.embedded", *map(str, args)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    done = command("--rehearse", "--work", folder, "--threads", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pictures(work: Path) -> list[Path]:
    return sorted((work / "phantom-4000" / "images").glob("*.png"))[:6]


def answer(work: Path, name: Path, picture: Path, adapter: str | None = None) -> float | None:
    weights = work / "models" / adapter if adapter else None
    generator = load_generator("hf", name, weights)
    prompt = Prompt(template="t", text="Question: Is there cardiomegaly?\nAnswer yes or no.")
    (given,) = generator.generate([Request(prompt, (picture,), closed=True, max_new_tokens=4)])
    return given.p_yes


def test_every_stage_ran_and_left_its_state(work: Path) -> None:
    assert list(json.loads((work / "times.json").read_text())) == list(STAGES)
    for name in ("vision_tower", *VQA):
        assert (work / f"{name}.pt").stat().st_size > 100_000
    assert (work / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize("stage", VQA)
def test_every_answering_stage_loads_and_answers(work: Path, pictures, stage: str) -> None:
    p_yes = answer(work, work / stage, pictures[0])
    assert p_yes is not None and 0 < p_yes < 1


def test_the_model_that_ships_is_the_last_stages(work: Path, pictures) -> None:
    shipped = work / "models" / "vlm"
    assert answer(work, shipped, pictures[0]) == answer(work, work / VQA[-1], pictures[0])
    assert answer(work, shipped, pictures[0]) != answer(work, work / VQA[0], pictures[0])
    assert "min_confidence" in json.loads((shipped / SIDECAR).read_text())


@pytest.mark.parametrize("name", ["encoder", *(f"retriever-{domain}" for domain in DOMAINS)])
def test_encoders_embed_pictures_and_texts(work: Path, pictures, name: str) -> None:
    encoder = load_encoder(str(work / "models" / name))
    images = encoder.images(pictures)
    texts = encoder.texts(["No pleural effusion.", "A nodule on the left."])
    assert images.shape == (len(pictures), encoder.dim) and texts.shape == (2, encoder.dim)
    assert np.isfinite(images).all() and np.isfinite(texts).all()
    assert np.abs(images[0] - images[1]).max() > 1e-4


def test_the_domain_model_names_a_domain(work: Path, pictures) -> None:
    model = open_domain(work / "models" / "domain")
    found = model.identify([[picture] for picture in pictures])
    assert {domain.label for domain in found} <= {*DOMAINS, "unknown"}
    assert all(0 <= domain.scores[label] <= 1 for domain in found for label in DOMAINS)


@pytest.mark.parametrize("kinds", ["", *SETS, *PAIRWISE])
def test_every_adapter_loads_and_answers(work: Path, pictures, kinds: str) -> None:
    adapter = f"adapter-{kinds}" if kinds else "adapter"
    p_yes = answer(work, work / "models" / "vlm", pictures[0], adapter)
    assert p_yes is not None and 0 < p_yes < 1
    card = (work / "models" / adapter / "README.md").read_text()
    assert "train_ids.jsonl" not in card and "benchmark seeds 3000" in card


def test_scores_and_card_cover_every_model(work: Path) -> None:
    models = work / "models"
    scores = json.loads((models / "scores.json").read_text())
    assert set(scores["models"]) == {"untuned", "adapter"} | {
        f"adapter-{kinds}" for kinds in (*SETS, *PAIRWISE)
    }
    assert set(scores["seconds"]) == set(STAGES) - {"model_card"}
    assert set(scores["models"]["untuned"]["figures"]) == set(DOMAINS)
    text = (models / "README.md").read_text()
    assert all(f"\n## {name}\n" in text for name in scores["models"])


def test_a_second_call_trains_nothing_again(work: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in work.glob("*.pt")}
    done = command("--rehearse", "--work", work, "--threads", 1, "vision_tower", "vqa_easy")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in work.glob("*.pt")} == before


def test_a_rehearsal_never_writes_into_the_package(monkeypatch, capsys) -> None:
    from training.embedded.__main__ import main

    package = str(Path(mmedrag.__file__).parent / "embedded")
    monkeypatch.setattr(sys, "argv", ["training.embedded", "--rehearse", "--out", package])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--out is the package, expected another folder" in capsys.readouterr().err
