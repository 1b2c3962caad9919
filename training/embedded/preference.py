"""RAG-PT of the small model, and the confidence under which it abstains.

Its pairs are of patients that nothing else was trained on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from mmedrag.answering.generators import load_generator
from mmedrag.domain import open_domain
from mmedrag.phantom import DOMAINS, build_benchmark
from mmedrag.pipeline import CORPUS, SIDECAR, Pipeline, RunSettings, interactive, run_conditions
from mmedrag.preference.dpo import DpoTraining, train_dpo
from mmedrag.preference.pairs import PairSettings, even_answers, make_pairs, read_pairs
from mmedrag.records import PAPER_KINDS, ConditionSpec, Pair
from mmedrag.retrieval import RuleSpec, build_index, open_retriever
from mmedrag.runtime import DataFolder, read_json, write_json, write_text
from training.embedded.stages import Build

log = logging.getLogger(__name__)
# No model was trained on the benchmarks that pairs come from, so all but their test patients are
# held out. Two of them give more cross-modal pairs than are used.
PAIRS = PairSettings(
    split="train", task="vqa", chunk=512, kinds=(*PAPER_KINDS, "unaided"), drawn=("copy", "resist")
)
FEWER = replace(PAIRS, kinds=("copy", "resist", "unaided"))
SIMILARITY = CORPUS["similarity"]
# One pass over many pairs: three over a few are learned by heart and help nobody. Answers of one
# word: an end token that counts satisfies cross-modal pairs by itself (docs/log.md).
SETTINGS = DpoTraining(
    lora_r=16,
    lora_alpha=32,
    learning_rate=1e-3,
    epochs=1,
    beta=0.3,
    sft_weight=1.0,
    count_end=False,
    log_steps=50,
)
VALIDATION_SEED = 3500  # of the patients on which settings and thresholds are chosen
ANSWERED = 0.85  # accuracy that answers above the abstention threshold shall reach
# Pairs: with more cross-modal ones answers on noise images become unreadable, with more copy pairs
# references are followed more, and are right more often (docs/log.md).
MOST = {"cross_modal": 6000, "copy": 1500, "unaided": 6000}
K = 4
BASE = "src/mmedrag/embedded/vlm"  # the base model's place in the repository


def benchmark(build: Build, seed: int, studies: int, twins: str | None = None) -> DataFolder:
    path = build.work / f"phantom-{seed}"
    build_benchmark(path, studies=studies, seed=seed, twins=twins, similarity=SIMILARITY)
    return DataFolder(path)


def pipeline(build: Build, data: DataFolder, adapter: str | None = None) -> Pipeline:
    """The embedded system over an index of ``data``'s own training studies."""
    weights, retrievers = build.out, {}
    for name in DOMAINS:
        index = build.work / f"index-{data.path.name}-{name}"
        if not (index / "manifest.json").exists():
            encoder = str((weights / f"retriever-{name}").resolve())
            build_index([data], index, domain=name, encoder=encoder)
        retrievers[name] = open_retriever(index)
    tuned = weights / adapter if adapter else None
    return Pipeline(
        domain=open_domain(weights / "domain"),
        retrievers=retrievers,
        rule=RuleSpec(),
        k=K,
        generator=load_generator("hf", weights / "vlm", tuned, batch_size=64),
    )


def make(build: Build) -> list[Pair]:
    """Preference pairs of all kinds; their traces stay beside them."""
    pairs: list[Pair] = []
    seeds = build.sizes.pair_seeds
    for seed in seeds:
        data, out = benchmark(build, seed, build.sizes.pair_studies), build.work / f"pairs-{seed}"
        if not (out / "pairs.jsonl").exists():
            settings = PAIRS if seed in seeds[:2] else FEWER
            log.info("pairs %s", make_pairs(partial(pipeline, build, data), data, out, settings))
        pairs += read_pairs(out)
    return pairs


def choose(pairs: Sequence[Pair], kinds: Sequence[str]) -> list[Pair]:
    """The pairs of ``kinds`` that are tuned on, drawn so that their answers give nothing away.

    As they come, yes is the right answer of 58 % of ``resist`` and 47 % of ``copy`` pairs.
    """
    shuffle = np.random.default_rng(0).permutation
    drawn = even_answers([pairs[i] for i in shuffle(len(pairs)) if pairs[i].kind in kinds])
    drawn = [drawn[i] for i in shuffle(len(drawn))]  # the rarer answer of a kind is kept to the end
    chosen = []
    for kind in kinds:
        own = [pair for pair in drawn if pair.kind == kind]
        chosen += own[: MOST.get(kind)]
    return chosen


def tune(build: Build, name: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Tune one adapter on the pairs of ``kinds`` into ``out/name``."""
    settings = replace(SETTINGS, max_steps=build.sizes.adapter)
    cache, trained = build.work / "dpo", build.work / name
    found = train_dpo(choose(make(build), kinds), build.out / "vlm", trained, settings, cache=cache)
    ship(build, trained, build.out / name)
    return found


def abstention(build: Build) -> dict[str, Any]:
    """Fit the tuned system's abstention threshold on validation patients, beside the model."""
    data = benchmark(build, VALIDATION_SEED, build.sizes.validation_studies)
    system, out = pipeline(build, data, "adapter"), build.work / "validation"
    settings = RunSettings(split="test", task="vqa", chunk=512)
    run_conditions(
        system, data, {"references": ConditionSpec("selected")}, out, settings, 0, {"row": "tuned"}
    )
    fitted = interactive.fit_abstention([out / "references"], ANSWERED)
    write_json(build.out / "vlm" / SIDECAR, fitted)
    return fitted


def ship(build: Build, trained: Path, folder: Path) -> None:
    """Copy an adapter in half precision, without the list of ids, which is larger than it is."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = "adapter_model.safetensors"
    tensors = {key: value.half() for key, value in load_file(trained / weights).items()}
    save_file(tensors, folder / weights, {"format": "pt"})
    for name in ("result.json", "training_log.jsonl"):
        shutil.copy(trained / name, folder / name)
    config = read_json(trained / "adapter_config.json")  # peft notes where the base lay when tuned
    base = BASE if build.ships else str((build.out / "vlm").resolve())
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": base})
    card, sizes = (trained / "README.md").read_text(), build.sizes
    seeds = f"{sizes.pair_seeds[0]} to {sizes.pair_seeds[-1]}"
    rows = f"train patients of benchmark seeds {seeds}, {sizes.pair_studies} studies a domain each"
    write_text(folder / "README.md", card.replace("`train_ids.jsonl`", rows))
