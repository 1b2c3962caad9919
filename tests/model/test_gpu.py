"""On a GPU: answers as on the CPU, recovery from its own out-of-memory error, both trainings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_tools import losses, make_model, make_pairs, quick
from mmedrag.answering.generators.hf import HFGenerator
from mmedrag.answering.prompts import TemplateSet
from mmedrag.embedded import available, path
from mmedrag.phantom.build import build_benchmark
from mmedrag.preference.dpo.train import train_dpo
from mmedrag.records import Domain, Hit, Noise, Request, Trace
from mmedrag.retrieval.encoders.load import load_encoder
from mmedrag.retrieval.settings import RetrieverTraining
from mmedrag.retrieval.train import train_retriever
from mmedrag.runtime.data_folder import DataFolder
from retrieval_tools import make_data, tiny_clip

DEVICE = "cuda"
MIB = 2**20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "vlm" in available():
        return path("vlm")
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """Closed questions of 24 studies: with references, and on noise without."""
    folder = tmp_path_factory.mktemp("phantom") / "data"
    build_benchmark(folder, studies=24, domains=["radiology"], size=128, workers=1)
    data, templates = DataFolder(folder), TemplateSet()
    corpus = data.corpus()
    found = []
    for n, example in enumerate(data.examples(task="vqa")):
        if example.answer_type != "closed":
            continue
        trace = Trace.of(example)
        trace.domain = Domain(label="radiology")
        row = corpus[n % len(corpus)]
        hits = [Hit(id=row.id, text=row.text, score=0.5, rank=1)]
        for refs, noise in ((hits, None), ([], Noise(kind="gaussian_clip", seed=n))):
            prompt = templates.render(trace, refs, None)
            found.append(Request(prompt, tuple(example.images), noise, True, 4))
    return found


@pytest.fixture
def full_memory() -> Iterator[None]:
    """The memory limit of the process is lifted again, whatever the test does."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_labels_are_those_of_the_cpu(model: Path, requests: list[Request]) -> None:
    """Where the model is undecided (p_yes within 0.02 of a half) rounding may decide."""
    on_cpu = HFGenerator(model, device="cpu").generate(requests)
    generator = HFGenerator(model, device=DEVICE)
    on_gpu = generator.generate(requests)
    assert str(generator.device).startswith(DEVICE) and generator.facts()["vision_encoded"]
    apart = [abs(a.p_yes - b.p_yes) for a, b in zip(on_cpu, on_gpu, strict=True)]
    assert max(apart) < 0.02
    sure = [i for i, a in enumerate(on_cpu) if abs(a.p_yes - 0.5) > 0.02]
    assert len(sure) > 0.8 * len(requests)
    assert {on_cpu[i].text.lower() for i in sure} == {"yes", "no"} or "vlm" not in available()
    assert [on_cpu[i].text for i in sure] == [on_gpu[i].text for i in sure]


def test_log_probabilities_are_those_of_the_cpu(model: Path, requests: list[Request]) -> None:
    texts = ["yes", "no, it is not there"] * 20
    on_cpu = HFGenerator(model, device="cpu").logprobs(requests[:40], texts)
    on_gpu = HFGenerator(model, device=DEVICE).logprobs(requests[:40], texts)
    assert on_gpu == pytest.approx(on_cpu, abs=0.02, rel=1e-3)
    assert len(set(on_gpu)) > 30


@pytest.mark.usefixtures("full_memory")
def test_a_real_out_of_memory_error_halves_the_batch(model: Path, requests: list[Request]) -> None:
    """The card is made so small that the batch does not fit; the answers are the same."""
    few = requests[:64]
    whole = HFGenerator(model, device=DEVICE, batch_size=4)
    wanted = whole.generate(few)
    generator = HFGenerator(model, device=DEVICE, batch_size=4096)
    many = few * (1024 // len(few))
    free_memory(whole, generator)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    generator.generate(many)
    needed = torch.cuda.max_memory_reserved() - before
    assert generator.backoffs == [] and needed > 64 * MIB
    free_memory(whole, generator)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * needed) / total)
    found = generator.generate(many)
    assert generator.backoffs and generator.batch_size < len(many)
    sure = [i for i, a in enumerate(wanted) if abs(a.p_yes - 0.5) > 0.02]
    for start in range(0, len(many), len(few)):
        assert [found[start + i].text for i in sure] == [wanted[i].text for i in sure]


def free_memory(*generators: HFGenerator) -> None:
    for generator in generators:
        for kept in (generator.inputs.features, generator.inputs.prefixes):
            if kept is not None:
                kept.clear()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_preference_tuning_lowers_the_loss(tmp_path: Path, checkpointing: bool) -> None:
    """Three steps over the same four pairs; the first loss is ln 2, as policy = reference."""
    small = make_model(tmp_path / "m")
    settings = quick(batch_size=4, epochs=3, gradient_checkpointing=checkpointing)
    result = train_dpo(
        make_pairs(tmp_path / "d", 4), small, tmp_path / "out", settings, cache=tmp_path / "cache"
    )
    seen = losses(tmp_path / "out")
    assert result["steps"] == 3 and len(seen) == 3
    assert seen[0] == pytest.approx(math.log(2), abs=0.02)
    assert seen[2] < seen[0] - 0.01 and all(map(math.isfinite, seen))
    tuned = HFGenerator(small, tmp_path / "out", device=DEVICE)
    assert tuned.name.endswith("+out")


def test_a_retriever_trains(tmp_path: Path) -> None:
    """Three steps on the device; the encoder that they leave gives vectors as on the CPU."""
    data = make_data(tmp_path / "data", 48)
    settings = RetrieverTraining(
        encoder=str(tiny_clip(tmp_path / "clip")),
        batch_size=16,
        chunk=8,
        epochs=1,
        max_steps=3,
        lr=3e-3,
        weight_decay=0.0,
        dtype="float32",
    )
    result = train_retriever([data], tmp_path / "out", "radiology", settings, device=DEVICE)
    assert result["steps"] == 3
    pictures = [row.images[0] for row in data.corpus()[:8]]
    before: Any = load_encoder(settings.encoder, device=DEVICE)
    vectors = [
        load_encoder(str(tmp_path / "out"), device=d).images(pictures) for d in (DEVICE, "cpu")
    ]
    assert vectors[0] == pytest.approx(vectors[1], abs=2e-3)
    assert abs(vectors[0] - before.images(pictures)).max() > 1e-3
