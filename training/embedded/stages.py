"""The stages of ``make tiny``: what each trains, from what, and how much of it.

Each is a function of a :class:`Build`. Vision tower → answering model (``vqa_easy``, ``vqa_full``,
``references_only``, ``vqa_with_references``) → ``encoders`` → ``regime_retrievers`` →
``domain_model`` → ``adapters`` → ``model_card``.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmedrag import embedded
from mmedrag.experiments import PAIRWISE, SETS
from mmedrag.phantom import DOMAINS, Knobs, build_benchmark
from mmedrag.runtime import DataFolder
from training.embedded import vision, vlm, vqa
from training.embedded.data import PROBE_SEED, TRAIN_SEEDS, StudySet, study_set
from training.embedded.dialogue import Writer
from training.embedded.text import train_tokenizer

if TYPE_CHECKING:
    from mmedrag.retrieval import RetrieverTraining

log = logging.getLogger(__name__)
PLAIN = 1.1  # contrast of the pictures from which it is learned what to look for
DOMAIN_SEED = 1800
NOTE = (
    "; what their reports say of some findings is another patient's. The towers are those of the "
    "generic encoder, frozen; trained are the two maps, from random values"
)
SHIPPED = Path(embedded.__path__[0])  # where the package holds its models


@dataclass(frozen=True)
class Sizes:
    """How much is trained on and measured; studies are per domain and seed.

    A stage's name counts its steps. ``probes`` are studies, ``samples`` dialogues of a domain for
    the tokenizer, ``questions`` those that the single sets' adapters are measured on.
    """

    seeds: tuple[int, ...] = TRAIN_SEEDS
    studies: int = 600
    probes: int = 150
    samples: int = 1000
    vision_tower: int = 3000
    vqa_easy: int = 800
    vqa_full: int = 1000
    references_only: int = 1000
    vqa_with_references: int = 1300
    dialogues: int = 30  # in a step
    retriever_seeds: tuple[int, ...] = TRAIN_SEEDS[:8]
    retriever_studies: int = 500
    retriever_epochs: int = 8
    retriever_batch: int = 192
    regime_seeds: tuple[int, ...] = TRAIN_SEEDS[:3]
    regime_retrievers: int = 1080  # at most
    domain_studies: int = 600
    domain_outliers: int = 2500  # drawn pictures
    domain_trees: int = 300
    pair_seeds: tuple[int, ...] = tuple(range(3000, 3006))
    pair_studies: int = 1500
    adapter: int = 0  # 0: one pass over the pairs
    validation_studies: int = 1200
    check_studies: int = 1200  # a quarter of them are test studies
    questions: int = 600
    resamples: int = 2000


FULL = Sizes()
REHEARSAL = Sizes(
    seeds=TRAIN_SEEDS[:1],
    studies=24,
    probes=3,
    samples=40,
    vision_tower=6,
    vqa_easy=24,
    vqa_full=3,
    references_only=3,
    vqa_with_references=6,
    dialogues=6,
    retriever_seeds=TRAIN_SEEDS[:1],
    retriever_studies=24,
    retriever_epochs=1,
    retriever_batch=16,
    regime_seeds=TRAIN_SEEDS[:1],
    regime_retrievers=3,
    domain_studies=30,
    domain_outliers=40,
    domain_trees=10,
    pair_seeds=(3000,),
    pair_studies=12,
    adapter=1,
    validation_studies=8,
    check_studies=8,
    questions=6,
    resamples=20,
)


@dataclass
class Build:
    """One run of the stages: where it works, where models go, and what stages share.

    ``work`` holds what can be made again (``work/NAME.pt``: state of an unfinished stage).
    """

    work: Path
    out: Path = SHIPPED
    sizes: Sizes = FULL

    @property
    def ships(self) -> bool:
        """Do models go into the package? They then name each other by their places in it."""
        return self.out.resolve() == SHIPPED.resolve()

    @cached_property
    def train_sets(self) -> dict[str, list[StudySet]]:
        """Per domain the training studies at the benchmark's contrast and at ``PLAIN``."""
        knobs, sizes = [Knobs(), Knobs(contrast=PLAIN)], self.sizes
        return {
            name: [
                study_set(name, sizes.seeds, sizes.studies, k, self.work / "data") for k in knobs
            ]
            for name in DOMAINS
        }

    @cached_property
    def probe_sets(self) -> dict[str, StudySet]:
        """Per domain unseen studies, to look at while training."""
        cache = self.work / "data"
        return {n: study_set(n, [PROBE_SEED], self.sizes.studies, cache=cache) for n in DOMAINS}

    @cached_property
    def tower(self) -> vision.CLIPVisionModel:
        """The vision tower of the small LLaVA, trained if it is not there yet."""
        state, steps = self.work / "vision_tower.pt", self.sizes.vision_tower
        easy = lambda done: max(0.0, 1 - done / 0.7)  # noqa: E731
        return vision.train(self.train_sets, steps, self.probe_sets, state, easy)

    @cached_property
    def tokenizer(self) -> vlm.PreTrainedTokenizerFast:
        path = self.work / "tokenizer"
        if not (path / "tokenizer.json").exists():
            writers = {name: Writer(found) for name, found in self.probe_sets.items()}
            train_tokenizer(vqa.texts(writers, self.sizes.samples)).save_pretrained(path)
        return vlm.PreTrainedTokenizerFast.from_pretrained(path)

    @cached_property
    def features(self) -> tuple[vlm.Scale, dict[str, list[torch.Tensor]]]:
        """The tower's patch features of the training pictures, standardised, and by what."""
        sets = self.train_sets
        raw = {n: [vlm.features(self.tower, s.pixels) for s in found] for n, found in sets.items()}
        scale = vlm.Scale.of([f for found in raw.values() for f in found])
        return scale, {n: [scale(f) for f in found] for n, found in raw.items()}


def vision_tower(build: Build) -> None:
    """Findings and attributes of a picture, by multi-label classification."""
    log.info("vision tower: %d parameters", build.tower.num_parameters())


def vqa_easy(build: Build) -> None:
    """Simple questions, plain pictures first.

    Nothing but these until it looks at all: with a fifth of the steps on reports and references
    that took three times as long.
    """
    mix = vqa.TrainingMix(
        build.sizes.vqa_easy,
        rate=2e-3,
        seed=0,
        easy=lambda done: min(1.0, max(0.0, 1.6 - 2 * done)),
        simple=lambda done: 1.0 if done < 0.35 else 0.25,
        reports=lambda done: 0.0 if done < 0.35 else 0.2,
        references=lambda done: 0.0 if done < 0.35 else 0.3,
        batch=build.sizes.dialogues,
    )
    _answering(build, "vqa_easy", mix)


def vqa_full(build: Build) -> None:
    """Questions of every form about pictures as they are; references are ignored still."""
    mix = vqa.TrainingMix(
        build.sizes.vqa_full,
        rate=1e-3,
        seed=1,
        references=lambda done: 0.65,
        batch=build.sizes.dialogues,
    )
    _answering(build, "vqa_full", mix, "vqa_easy")


def references_only(build: Build) -> None:
    """Reading alone: beside a stray image there is nothing to go by but the report."""
    mix = vqa.TrainingMix(
        build.sizes.references_only,
        rate=1.5e-3,
        seed=1,
        reports=lambda done: 0.0,
        references=lambda done: 0.85,
        stray=lambda done: 1.0,
        batch=build.sizes.dialogues,
    )
    _answering(build, "references_only", mix, "vqa_full")


def vqa_with_references(build: Build) -> None:
    """Picture and references together; gives the answering model."""
    mix = vqa.TrainingMix(
        build.sizes.vqa_with_references,
        rate=1.2e-3,
        seed=3,
        reports=lambda done: 0.3,
        references=lambda done: 0.75,
        stray=lambda done: 0.4,
        batch=build.sizes.dialogues,
    )
    trained = _answering(build, "vqa_with_references", mix, "references_only")
    shutil.copytree(trained, build.out / "vlm", dirs_exist_ok=True)


def _answering(build: Build, name: str, mix: vqa.TrainingMix, start: str = "") -> Path:
    """Train the small LLaVA by a mix, from stage ``start``; saves it whole in ``work/name``."""
    work, words, eyes = build.work, build.tokenizer, build.tower
    scale, feats = build.features
    torch.manual_seed(mix.seed)
    model = vlm.new_model(eyes, words)
    if start:
        model.load_state_dict(torch.load(work / f"{start}.pt", weights_only=True)["model"])
    writers = {n: Writer(s) for n, s in build.probe_sets.items()}
    seen = {n: scale(vlm.features(eyes, s.pixels)) for n, s in build.probe_sets.items()}
    noise, count = scale(vlm.noise_features(eyes)), build.sizes.probes

    def check() -> str:
        found = {n: vqa.probe(model, words, w, seen[n], noise, count) for n, w in writers.items()}
        return json.dumps(found)

    batches = vqa.Batches({n: Writer(s[0]) for n, s in build.train_sets.items()}, words, mix)
    vqa.train(model, batches, feats, work / f"{name}.pt", check)
    scale.fold(model.model.multi_modal_projector.linear_1)
    model.half().save_pretrained(work / name)
    vlm.processor(words).save_pretrained(work / name)
    return work / name


def encoders(build: Build) -> None:
    """A generic image-text encoder, and from it one per domain."""
    from mmedrag.retrieval import RetrieverTraining, train_retriever
    from training.embedded import clip

    work, sizes = build.work, build.sizes
    data, start = _retriever_data(build, sizes.retriever_seeds), work / "encoder-start"
    if not (start / "config.json").exists():
        clip.new_encoder(build.tower, build.tokenizer, start)
    rows = _rows(sizes.retriever_seeds, sizes.retriever_studies)
    steps: list[tuple[str, str | None, Path]] = [("encoder", None, start)]
    steps += [(f"retriever-{name}", name, work / "encoder") for name in DOMAINS]
    for name, label, source in steps:
        if not (work / name / "training.json").exists():
            batch = sizes.retriever_batch
            settings = RetrieverTraining(
                encoder=str(source),
                epochs=sizes.retriever_epochs,
                batch_size=batch,
                chunk=batch,
                lr=8e-4,
                dtype="auto",
            )
            log.info("%s: %s", name, train_retriever(data, work / name, label, settings))
        clip.ship(work / name, build.out / name, rows)


def _rows(seeds: Sequence[int], studies: int) -> str:
    return f"benchmark seeds {seeds[0]} to {seeds[-1]}, {studies} studies a domain each"


def _retriever_data(build: Build, seeds: Sequence[int]) -> list[DataFolder]:
    """Benchmarks of several seeds on disk, as any user's data would be."""
    folders = [build.work / f"phantom-{seed}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        if not (folder / "examples.jsonl").exists():
            build_benchmark(folder, studies=build.sizes.retriever_studies, seed=seed)
    return [DataFolder(folder) for folder in folders]


def regime_retrievers(build: Build) -> None:
    """The retrievers of regimes ``released`` and ``strong``, each one for all domains.

    They are trained on reports that name other findings (``reports``): the first looks for
    appearance alone, the second for the pattern findings too. The first is as weak as its schedule
    makes it: the released code warms up over 10,000 steps and stops after 1,080 (radiology), so
    that the rate ends at a ninth of its peak; all else of the schedule is as released too.
    """
    from mmedrag.retrieval import RetrieverTraining
    from training.embedded.reports import pattern

    steps = build.sizes.regime_retrievers
    common = RetrieverTraining(
        encoder="embedded:encoder", batch_size=512, chunk=512, epochs=360, crop=1.0, evaluate=10
    )
    weak = replace(
        common,
        max_steps=min(steps, 1080),
        lr=1e-4,
        weight_decay=0.2,
        beta2=0.999,
        eps=1e-8,
        warmup=10_000,
        max_grad_norm=0.0,
        mask_identical=False,
        keep="last",
    )
    strong = replace(common, max_steps=min(steps, 800), lr=1e-3, evaluate=4)
    _over_maps(build, "retriever-released", weak, {})
    _over_maps(build, "retriever-strong", strong, {name: pattern(name) for name in DOMAINS})


def _over_maps(
    build: Build, name: str, settings: RetrieverTraining, kept: Mapping[str, Collection[str]]
) -> None:
    """Train two maps over the generic encoder's towers, and ship the whole as an encoder."""
    from mmedrag.retrieval import train_retriever
    from training.embedded import clip, maps
    from training.embedded.reports import OtherReports

    seeds, studies = build.sizes.regime_seeds, build.sizes.retriever_studies
    drawn = zip(_retriever_data(build, seeds), seeds, strict=True)
    data = [OtherReports(folder.path, seed, studies, kept) for folder, seed in drawn]
    if not (build.work / name / "training.json").exists():
        towers = maps.trainable(str(build.out / "encoder"))
        found = train_retriever(data, build.work / name, None, settings, towers=towers)
        log.info("%s: %s", name, found)
    clip.ship(build.work / name, build.out / name, _rows(seeds, studies) + NOTE)


def domain_model(build: Build) -> None:
    """The domain model: a head on the generic encoder, from a benchmark of its own."""
    from mmedrag.domain import DomainTraining, train_domain

    data, sizes = build.work / "phantom-domain", build.sizes
    build_benchmark(data, studies=sizes.domain_studies, seed=DOMAIN_SEED)
    train_domain(
        [DataFolder(data)],
        build.out / "domain",
        settings=DomainTraining(outliers=sizes.domain_outliers, trees=sizes.domain_trees),
        encoder="embedded:encoder" if build.ships else str((build.out / "encoder").resolve()),
        copy_encoder=not build.ships,
        notice="a benchmark model: it has seen drawn pictures only",
    )


def adapters(build: Build) -> None:
    """RAG-PT on all pairs, and for the ablation on each of its sets alone and on two at a time."""
    from training.embedded import preference

    preference.tune(build, "adapter", (*SETS, "unaided"))
    for name in (*SETS, *PAIRWISE):
        preference.tune(build, f"adapter-{name}", name.split("+"))
    log.info("abstention: %s", preference.abstention(build))


def model_card(build: Build) -> None:
    """Measure everything on unseen patients and write the model card."""
    from training.embedded import check

    found = {"untuned": check.check(build)}
    for name in ("adapter", *(f"adapter-{kinds}" for kinds in (*SETS, *PAIRWISE))):
        plans = check.FULL if name == "adapter" else check.BRIEF
        found[name] = check.check(build, name, plans)
    check.write_card(build, found)


STAGES: dict[str, Callable[[Build], None]] = {
    stage.__name__: stage
    for stage in (
        vision_tower,
        vqa_easy,
        vqa_full,
        references_only,
        vqa_with_references,
        encoders,
        regime_retrievers,
        domain_model,
        adapters,
        model_card,
    )
}
