"""The stages of ``make tiny``, each a function of (work folder, output folder)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from mmedrag.phantom.build import build
from mmedrag.phantom.grammar import DOMAINS, DomainSpec, fill
from mmedrag.phantom.questions import cells
from mmedrag.tiny import vision, vlm
from mmedrag.tiny.data import CHECK_SEED, TRAIN_SEEDS, StudySet, study_set
from mmedrag.tiny.dialogue import Writer
from mmedrag.tiny.text import train_tokenizer
from mmedrag.types import DataFolder, Finding

log = logging.getLogger(__name__)
EACH = 600  # studies per seed and domain
VISION_SCHEDULE, VISION_STEPS = 2100, 1500  # stopped early: a harder picture, by choice
LOOK_STEPS, READ_STEPS = 500, 1000


@lru_cache(maxsize=1)
def train_sets(work: Path) -> dict[str, StudySet]:
    return {name: study_set(name, TRAIN_SEEDS, EACH, cache=work / "data") for name in DOMAINS}


@lru_cache(maxsize=1)
def check_sets(work: Path) -> dict[str, StudySet]:
    return {name: study_set(name, [CHECK_SEED], EACH, cache=work / "data") for name in DOMAINS}


def tower(work: Path) -> vision.CLIPVisionModel:
    """The trained vision tower, trained if it is not there yet."""
    path = work / "vision"
    path.mkdir(parents=True, exist_ok=True)
    return vision.train(
        train_sets(work), VISION_STEPS, check_sets(work), path, schedule_steps=VISION_SCHEDULE
    )


def early_tower(work: Path) -> vision.CLIPVisionModel:
    """The tower as it was at step ``vision.EARLY``."""
    path = work / "vision" / "early.pt"
    if not path.exists():
        tower(work)
    early = vision.CLIPVisionModel(vision.config())
    early.load_state_dict(torch.load(path, weights_only=True)["tower"])
    return early.eval()


def tokenizer(work: Path) -> vlm.PreTrainedTokenizerFast:
    path = work / "tokenizer"
    if not (path / "tokenizer.json").exists():
        writers = {name: Writer(found) for name, found in check_sets(work).items()}
        train_tokenizer(vlm.texts(writers, 3000)).save_pretrained(path)
    return vlm.PreTrainedTokenizerFast.from_pretrained(path)


def _dialogues(work: Path, out: Path, name: str, steps: int, reading: float, start: str) -> None:
    words, eyes = tokenizer(work), tower(work)
    sets, checks = train_sets(work), check_sets(work)
    model = vlm.new_model(eyes, words)
    if start:
        model.load_state_dict(torch.load(work / start, weights_only=True)["model"])
    else:
        heads = torch.load(work / "vision" / "vision.pt", weights_only=True)["heads"]
        vlm.start_projector(
            model, heads, {n: asked_words(s.domain) for n, s in sets.items()}, words
        )
    feats = {n: vlm.features(eyes, s.pixels) for n, s in sets.items()}
    seen = {n: vlm.features(eyes, s.pixels) for n, s in checks.items()}
    writers = {n: Writer(s) for n, s in sets.items()}
    probes = {n: Writer(s) for n, s in checks.items()}

    def check(model: vlm.LlavaForConditionalGeneration) -> str:
        found = {n: vlm.probe(model, words, probes[n], seen[n]) for n in probes}
        return json.dumps(found)

    vlm.train(
        model, words, writers, feats, steps, reading, work / name, check=check,
        seed=1 if start else 0, rate=8e-4 if start else 1e-3,
    )  # fmt: skip
    folder = out / "vlm"
    model.half().save_pretrained(folder)
    vlm.processor(words).save_pretrained(folder)


def asked_words(domain: DomainSpec) -> list[str]:
    """For each cell, everything that asks about it or states it."""
    texts = []
    for name, side in cells(domain):
        spec = domain.by_name[name]
        state = Finding(present=True, side=side, count=1, severity=(spec.grades or (None,))[0])
        templates = (*spec.questions, *spec.positive)
        texts.append(" ".join(" " + fill(domain, spec, t, state).lower() for t in templates))
    return texts


def see(work: Path, out: Path) -> None:
    tower(work)


def look(work: Path, out: Path) -> None:
    _dialogues(work, work, "look.pt", LOOK_STEPS, 0.0, "")


def read(work: Path, out: Path) -> None:
    _dialogues(work, out, "read.pt", READ_STEPS, 0.7, "look.pt")


def retriever_data(work: Path) -> list[DataFolder]:
    """Benchmarks of several seeds on disk, as any user's data would be."""
    folders = [work / f"phantom-{seed}" for seed in TRAIN_SEEDS[:8]]
    for seed, folder in zip(TRAIN_SEEDS, folders, strict=False):
        if not (folder / "examples.jsonl").exists():
            build(folder, studies=500, seed=seed)
    return [DataFolder(folder) for folder in folders]


def encoders(work: Path, out: Path) -> None:
    """A generic image-text encoder, and from it one per domain."""
    from mmedrag.retriever_settings import RetrieverTraining
    from mmedrag.tiny import clip
    from mmedrag.train_retriever import train_retriever

    data, start = retriever_data(work), work / "encoder-start"
    if not (start / "config.json").exists():
        clip.new_encoder(early_tower(work), tokenizer(work), start)
    plan = [("encoder", None, start, 3)]
    plan += [(f"retriever-{name}", name, work / "encoder", 4) for name in DOMAINS]
    for name, label, source, epochs in plan:
        if not (work / name / "training.json").exists():
            settings = RetrieverTraining(
                encoder=str(source), epochs=epochs, batch_size=192, chunk=192, lr=6e-4
            )
            log.info("%s: %s", name, train_retriever(data, work / name, label, settings))
        if not (out / name / "config.json").exists():
            clip.ship(work / name, out / name)


def domain(work: Path, out: Path) -> None:
    """The domain model: a head on the generic encoder, from a benchmark of its own."""
    from mmedrag.train_domain import train_domain

    data = work / "phantom-domain"
    build(data, studies=600, seed=1800)
    train_domain(
        [DataFolder(data)], out / "domain", encoder="embedded:encoder", copy_encoder=False,
        notice="a benchmark model: it has seen drawn pictures only",
    )  # fmt: skip


def adapter(work: Path, out: Path) -> None:
    """RAG-PT on all pairs, and on each set alone."""
    from mmedrag.tiny import preference

    preference.tune(work, out, "adapter", preference.SETS)
    for kind in preference.SETS:
        preference.tune(work, out, f"adapter-{kind}", (kind,))


def card(work: Path, out: Path) -> None:
    """Measure everything on unseen patients and write the model card."""
    from mmedrag.tiny import check

    names = [None, *sorted(f.name for f in out.glob("adapter*"))]
    check.write_card(work, out, {n or "untuned": check.check(work, out, n) for n in names})


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "vision": see, "look": look, "read": read, "encoders": encoders, "domain": domain,
    "adapter": adapter, "card": card,
}  # fmt: skip
