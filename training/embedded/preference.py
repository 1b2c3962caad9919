"""The last stage: RAG-PT of the small model, and the confidence under which it abstains.

Its patients are of six benchmarks that nothing else was trained on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from mmedrag.answering.generators import load_generator
from mmedrag.domain import open_domain
from mmedrag.phantom import DOMAINS, build_benchmark
from mmedrag.pipeline import CORPUS, Pipeline, Plan, RunSettings, interactive, run_plans
from mmedrag.preference.dpo import DpoTraining, train_dpo
from mmedrag.preference.pairs import PairSettings, even_answers, make_pairs, read_pairs
from mmedrag.records import PAPER_KINDS, Pair
from mmedrag.retrieval import RuleSpec, build_index, open_retriever
from mmedrag.runtime import DataFolder, read_json, write_json

log = logging.getLogger(__name__)
PAIR_SEEDS, PAIR_STUDIES = tuple(range(3000, 3006)), 1500  # benchmarks that pairs come from
# No model was trained on these benchmarks, so all but their test patients are held out. Two of
# them give more cross-modal pairs than are used.
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
VALIDATION_SEED, VALIDATION_STUDIES = 3500, 1200  # settings and thresholds are chosen on these
ANSWERED = 0.85  # accuracy that answers above the abstention threshold shall reach
# Pairs: with more cross-modal ones answers on noise images become unreadable, with more copy pairs
# references are followed more, and are right more often (docs/log.md).
MOST = {"cross_modal": 6000, "copy": 1500, "unaided": 6000}
K = 4
BASE = "src/mmedrag/embedded/vlm"  # the base model's place in the repository


def data_folder(work: Path, seed: int, studies: int = PAIR_STUDIES) -> DataFolder:
    path = work / f"phantom-{seed}"
    build_benchmark(path, studies=studies, seed=seed, similarity=SIMILARITY)
    return DataFolder(path)


def pipeline(work: Path, weights: Path, data: DataFolder) -> Pipeline:
    """The embedded system over an index of the pairs' own training studies."""
    retrievers = {}
    for name in DOMAINS:
        index = work / f"index-{data.path.name}-{name}"
        if not (index / "manifest.json").exists():
            encoder = str((weights / f"retriever-{name}").resolve())
            build_index([data], index, domain=name, encoder=encoder)
        retrievers[name] = open_retriever(index)
    return Pipeline(
        domain=open_domain(weights / "domain"),
        retrievers=retrievers,
        rule=RuleSpec(),
        k=K,
        generator=load_generator("hf", weights / "vlm", batch_size=64),
    )


def make(work: Path, weights: Path) -> list[Pair]:
    """Preference pairs of all kinds; their traces stay beside them."""
    pairs = []
    for seed in PAIR_SEEDS:
        data, out = data_folder(work, seed), work / f"pairs-{seed}"
        if not (out / "pairs.jsonl").exists():
            assemble = partial(pipeline, work, weights, data)
            settings = PAIRS if seed in PAIR_SEEDS[:2] else FEWER
            log.info("pairs %s", make_pairs(assemble, data, out, settings))
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


def tune(
    work: Path, weights: Path, name: str, kinds: Sequence[str], settings: DpoTraining = SETTINGS
) -> dict:
    """Tune one adapter on the pairs of ``kinds`` into ``weights/name``."""
    chosen = choose(make(work, weights), kinds)
    found = train_dpo(chosen, weights / "vlm", work / name, settings, cache=work / "dpo")
    ship(work / name, weights / name)
    return found


def abstention(work: Path, weights: Path) -> dict:
    """Fit the tuned system's abstention threshold on validation patients, beside the model."""
    data, out = data_folder(work, VALIDATION_SEED, VALIDATION_STUDIES), work / "validation"
    system = pipeline(work, weights, data)
    system.generator = load_generator("hf", weights / "vlm", weights / "adapter", batch_size=64)
    settings = RunSettings(split="test", task="vqa", chunk=512)
    run_plans(system, data, {"references": Plan("selected")}, out, settings, 0, {"row": "tuned"})
    fitted = interactive.fit_abstention([out / "references"], ANSWERED)
    write_json(weights / "vlm" / interactive.SIDECAR, fitted)
    return fitted


def ship(trained: Path, folder: Path) -> None:
    """Copy an adapter in half precision, without the list of ids, which is larger than it is."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = "adapter_model.safetensors"
    tensors = {key: value.half() for key, value in load_file(trained / weights).items()}
    save_file(tensors, folder / weights, {"format": "pt"})
    for name in ("result.json", "training_log.jsonl"):
        shutil.copy(trained / name, folder / name)
    config = read_json(trained / "adapter_config.json")  # peft notes where the base lay when tuned
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": BASE})
    card = (trained / "README.md").read_text()
    seeds = f"{PAIR_SEEDS[0]} to {PAIR_SEEDS[-1]}"
    rows = f"train patients of benchmark seeds {seeds}, {PAIR_STUDIES} studies a domain each"
    (folder / "README.md").write_text(card.replace("`train_ids.jsonl`", rows))
