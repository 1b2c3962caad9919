"""The stages of ``make tiny``, each a function of (work folder, output folder)."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from mmedrag.experiments import PAIRWISE, SETS
from mmedrag.phantom import DOMAINS, Knobs, build_benchmark
from mmedrag.runtime import DataFolder
from training.embedded import vision, vlm
from training.embedded.data import CHECK_SEED, TRAIN_SEEDS, StudySet, study_set
from training.embedded.dialogue import Writer
from training.embedded.text import train_tokenizer

log = logging.getLogger(__name__)
EACH = 600  # studies per seed and domain
RETRIEVER_SEEDS, RETRIEVER_STUDIES = TRAIN_SEEDS[:8], 500  # studies per domain
PLAIN = 1.1  # contrast of the pictures from which it is learned what to look for
VISION_STEPS, LOOK_STEPS, MIX_STEPS, SPELL_STEPS, READ_STEPS = 3000, 800, 1000, 1000, 1300


@lru_cache(maxsize=1)
def train_sets(work: Path) -> dict[str, list[StudySet]]:
    """Per domain the training studies at the benchmark's contrast and at ``PLAIN``."""
    knobs = [Knobs(), Knobs(contrast=PLAIN)]
    return {
        name: [study_set(name, TRAIN_SEEDS, EACH, k, cache=work / "data") for k in knobs]
        for name in DOMAINS
    }


@lru_cache(maxsize=1)
def check_sets(work: Path) -> dict[str, StudySet]:
    return {name: study_set(name, [CHECK_SEED], EACH, cache=work / "data") for name in DOMAINS}


def tower(work: Path) -> vision.CLIPVisionModel:
    """The vision tower of the small LLaVA, trained if it is not there yet."""
    path = work / "vision"
    path.mkdir(parents=True, exist_ok=True)
    return vision.train(
        train_sets(work),
        VISION_STEPS,
        check_sets(work),
        path,
        easy=lambda done: max(0.0, 1 - done / 0.7),
    )


def tokenizer(work: Path) -> vlm.PreTrainedTokenizerFast:
    path = work / "tokenizer"
    if not (path / "tokenizer.json").exists():
        writers = {name: Writer(found) for name, found in check_sets(work).items()}
        train_tokenizer(vlm.texts(writers, 1000)).save_pretrained(path)
    return vlm.PreTrainedTokenizerFast.from_pretrained(path)


def _dialogues(work: Path, name: str, plan: vlm.Plan, start: str = "") -> Path:
    """Train the small LLaVA by a plan, from ``start``; saves it whole in ``work/name``."""
    words, eyes = tokenizer(work), tower(work)
    sets, checks = train_sets(work), check_sets(work)
    torch.manual_seed(plan.seed)
    model = vlm.new_model(eyes, words)
    if start:
        model.load_state_dict(torch.load(work / start, weights_only=True)["model"])
    raw = {n: [vlm.features(eyes, s.pixels) for s in found] for n, found in sets.items()}
    scale = vlm.Scale.of([f for found in raw.values() for f in found])
    feats = {n: [scale(f) for f in found] for n, found in raw.items()}
    probes = {n: Writer(s) for n, s in checks.items()}
    seen = {n: scale(vlm.features(eyes, s.pixels)) for n, s in checks.items()}
    noise = scale(vlm.noise_features(eyes))

    def check(model: vlm.LlavaForConditionalGeneration) -> str:
        return json.dumps({n: vlm.probe(model, words, probes[n], seen[n], noise) for n in probes})

    batches = vlm.Batches({n: Writer(found[0]) for n, found in sets.items()}, words, plan)
    vlm.train(model, batches, feats, work / f"{name}.pt", check)
    scale.fold(model.model.multi_modal_projector.linear_1)
    model.half().save_pretrained(work / name)
    vlm.processor(words).save_pretrained(work / name)
    return work / name


def see(work: Path, out: Path) -> None:
    tower(work)


def look(work: Path, out: Path) -> None:
    # Nothing but simple questions about plain pictures until it looks at all: with a fifth of
    # the steps on reports and references that took three times as long.
    plan = vlm.Plan(
        LOOK_STEPS,
        rate=2e-3,
        seed=0,
        easy=lambda done: min(1.0, max(0.0, 1.6 - 2 * done)),
        simple=lambda done: 1.0 if done < 0.35 else 0.25,
        reports=lambda done: 0.0 if done < 0.35 else 0.2,
        reading=lambda done: 0.0 if done < 0.35 else 0.3,
    )
    _dialogues(work, "look", plan)


def mix(work: Path, out: Path) -> None:
    """Questions of every form about pictures as they are; references are ignored still."""
    plan = vlm.Plan(MIX_STEPS, rate=1e-3, seed=1, reading=lambda done: 0.65)
    _dialogues(work, "mix", plan, "look.pt")


def spell(work: Path, out: Path) -> None:
    """Reading alone: beside a stray image there is nothing to go by but the report."""
    plan = vlm.Plan(
        SPELL_STEPS,
        rate=1.5e-3,
        seed=1,
        reports=lambda done: 0.0,
        reading=lambda done: 0.85,
        practice=lambda done: 1.0,
    )
    _dialogues(work, "spell", plan, "mix.pt")


def read(work: Path, out: Path) -> None:
    plan = vlm.Plan(
        READ_STEPS,
        rate=1.2e-3,
        seed=3,
        reports=lambda done: 0.3,
        reading=lambda done: 0.75,
        practice=lambda done: 0.4,
    )
    trained = _dialogues(work, "read", plan, "spell.pt")
    shutil.copytree(trained, out / "vlm", dirs_exist_ok=True)


def retriever_data(work: Path) -> list[DataFolder]:
    """Benchmarks of several seeds on disk, as any user's data would be."""
    folders = [work / f"phantom-{seed}" for seed in RETRIEVER_SEEDS]
    for seed, folder in zip(RETRIEVER_SEEDS, folders, strict=True):
        if not (folder / "examples.jsonl").exists():
            build_benchmark(folder, studies=RETRIEVER_STUDIES, seed=seed)
    return [DataFolder(folder) for folder in folders]


def encoders(work: Path, out: Path) -> None:
    """A generic image-text encoder, and from it one per domain."""
    from mmedrag.retrieval import RetrieverTraining, train_retriever
    from training.embedded import clip

    data, start = retriever_data(work), work / "encoder-start"
    if not (start / "config.json").exists():
        clip.new_encoder(tower(work), tokenizer(work), start)
    rows = f"benchmark seeds {RETRIEVER_SEEDS[0]} to {RETRIEVER_SEEDS[-1]}"
    rows += f", {RETRIEVER_STUDIES} studies a domain each"
    plan: list[tuple[str, str | None, Path, int]] = [("encoder", None, start, 8)]
    plan += [(f"retriever-{name}", name, work / "encoder", 8) for name in DOMAINS]
    for name, label, source, epochs in plan:
        if not (work / name / "training.json").exists():
            settings = RetrieverTraining(
                encoder=str(source), epochs=epochs, batch_size=192, chunk=192, lr=8e-4, dtype="auto"
            )
            log.info("%s: %s", name, train_retriever(data, work / name, label, settings))
        clip.ship(work / name, out / name, rows)


def domain(work: Path, out: Path) -> None:
    """The domain model: a head on the generic encoder, from a benchmark of its own."""
    from mmedrag.domain import train_domain

    data = work / "phantom-domain"
    build_benchmark(data, studies=600, seed=1800)
    train_domain(
        [DataFolder(data)],
        out / "domain",
        encoder="embedded:encoder",
        copy_encoder=False,
        notice="a benchmark model: it has seen drawn pictures only",
    )


def adapter(work: Path, out: Path) -> None:
    """RAG-PT on all pairs, and for the ablation on each of its sets alone and on two at a time."""
    from training.embedded import preference

    preference.tune(work, out, "adapter", (*SETS, "unaided"))
    for name in (*SETS, *PAIRWISE):
        preference.tune(work, out, f"adapter-{name}", name.split("+"))
    log.info("abstention: %s", preference.abstention(work, out))


def card(work: Path, out: Path) -> None:
    """Measure everything on unseen patients and write the model card."""
    from training.embedded import check

    found = {"untuned": check.check(work, out)}
    for name in ("adapter", *(f"adapter-{kinds}" for kinds in (*SETS, *PAIRWISE))):
        plans = check.FULL if name == "adapter" else check.BRIEF
        found[name] = check.check(work, out, name, plans)
    check.write_card(work, out, found)


STAGES: dict[str, Callable[[Path, Path], None]] = {
    "vision": see,
    "look": look,
    "mix": mix,
    "spell": spell,
    "read": read,
    "encoders": encoders,
    "domain": domain,
    "adapter": adapter,
    "card": card,
}
