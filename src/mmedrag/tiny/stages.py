"""The stages of ``make tiny``, each a function of (work folder, output folder)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from mmedrag.phantom.grammar import DOMAINS
from mmedrag.tiny import vision, vlm
from mmedrag.tiny.data import CHECK_SEED, TRAIN_SEEDS, StudySet, study_set
from mmedrag.tiny.dialogue import Writer
from mmedrag.tiny.text import train_tokenizer

log = logging.getLogger(__name__)
EACH = 600  # studies per seed and domain
VISION_STEPS, LOOK_STEPS, READ_STEPS = 2100, 600, 1200


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
    return vision.train(train_sets(work), VISION_STEPS, check_sets(work), path)


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


def see(work: Path, out: Path) -> None:
    tower(work)


def look(work: Path, out: Path) -> None:
    _dialogues(work, work, "look.pt", LOOK_STEPS, 0.0, "")


def read(work: Path, out: Path) -> None:
    _dialogues(work, out, "read.pt", READ_STEPS, 0.7, "look.pt")


def domain(work: Path, out: Path) -> None:
    """The domain model: a head on the generic encoder, from a benchmark of its own."""
    from mmedrag.phantom.build import build
    from mmedrag.train_domain import train_domain
    from mmedrag.types import DataFolder

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


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "vision": see, "look": look, "read": read, "domain": domain, "adapter": adapter,
}  # fmt: skip
