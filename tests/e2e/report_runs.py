"""Run folders for the report's tests: benchmark data, answers from a seeded dice.

No model: a row's answers are right with a given chance, so that the page shows every kind of
case. Not a test itself.
"""

import json
from pathlib import Path

import numpy as np

from mmedrag.phantom.build import build_benchmark
from mmedrag.phantom.grammar import DOMAINS, load_domain
from mmedrag.records.records import (
    Answer,
    Condition,
    Domain,
    Hit,
    Noise,
    Prompt,
    Selection,
    Trace,
    UserError,
)
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import write_jsonl

NOISE = Noise(kind="gaussian_clip", seed=1)
# row -> condition -> chance that a closed answer is right
ROWS = {
    ("base", "base model"): {"none": 0.7, "noise-none": 0.5},
    ("naive", "+ naive RAG (one generic retriever, top-k)"): {
        "references": 0.74,
        "noise-references": 0.66,
    },
    ("pt-all", "+ RAG-PT (full method)"): {
        "none": 0.72,
        "references": 0.85,
        "noise-none": 0.5,
        "noise-references": 0.52,
        "contradicting": 0.7,
    },
}


def available_domains() -> list[str]:
    found = []
    for name in DOMAINS:
        try:
            load_domain(name)
        except (UserError, ImportError, AttributeError):
            continue
        found.append(name)
    return found


def make(folder: Path, studies: int = 60) -> tuple[DataFolder, list[Path]]:
    """A DATA folder and the run folders of three ablation rows."""
    build_benchmark(
        folder / "data",
        studies=studies,
        domains=available_domains(),
        seed=3,
        size=64,
        closed=3,
        open=1,
        workers=1,
        twins="image",
    )
    data = DataFolder(folder / "data")
    corpus = {d: data.corpus("train", d) for d in available_domains()}
    log = folder / "adapter" / "training_log.jsonl"
    log.parent.mkdir()
    log.write_text(
        "".join(
            json.dumps(
                {
                    "step": i,
                    "loss": 0.69 * 0.97**i,
                    "rewards/margins": 0.02 * i,
                    "rewards/accuracies": min(1, 0.5 + i / 60),
                }
            )
            + "\n"
            for i in range(40)
        )
    )
    runs = []
    for (row, title), conditions in ROWS.items():
        for name, chance in conditions.items():
            rng = np.random.default_rng([len(runs), 9])
            traces = [_trace(e, name, chance, corpus[e.domain], rng) for e in data.examples("test")]
            run = folder / "runs" / row / name
            write_jsonl(run / "traces.jsonl", traces)
            config = {
                "system": {
                    "row": row,
                    "title": title,
                    "generator": {
                        "model": "scripted",
                        "adapter": str(log.parent) if row == "pt-all" else None,
                    },
                },
                "inputs": {str(data.path / "examples.jsonl"): "0" * 64},
            }
            (run / "config.json").write_text(json.dumps(config))
            runs.append(run)
    return data, runs


def _trace(example, name, chance, corpus, rng) -> Trace:
    references = name.removeprefix("noise-").replace("references", "selected")
    noise = NOISE if name.startswith("noise") else None
    trace = Trace.of(
        example, Condition(image="noise" if noise else "clean", noise=noise, references=references)
    )
    trace.domain = Domain(label=example.domain, confidence=round(float(rng.uniform(0.9, 1)), 3))
    if references != "none":
        chosen = rng.choice(len(corpus), size=6, replace=False)
        scores = np.sort(rng.uniform(0.3, 0.9, size=6))[::-1]
        trace.hits = [
            Hit(id=corpus[i].id, text=corpus[i].text, score=round(float(s), 4), rank=r)
            for r, (i, s) in enumerate(zip(chosen, scores, strict=True))
        ]
        kept = [h.id for h in trace.hits[: int(rng.integers(0, 5))]]
        trace.selection = Selection(
            rule="log_ratio",
            params={"gamma": 0.2},
            kept=kept,
            reason=f"log ratio 0.31 > 0.2 after {len(kept)}",
        )
        trace.prompt = Prompt(template="t", text="q", references=kept)
    right = rng.random() < chance
    if example.task == "report":
        said = example.answer if right else corpus[int(rng.integers(len(corpus)))].text
    elif example.answer_type == "open":
        said = example.answer if right else "unknown"
    else:
        other = "No." if example.answer == "yes" else "Yes."
        said = example.answer.capitalize() + "." if right else other
        if rng.random() < 0.03:
            said = "It is hard to say."
    p = float(np.clip(rng.normal(0.7 if said.lower().startswith("y") else 0.3, 0.15), 0.01, 0.99))
    closed = example.answer_type == "closed"
    trace.answer = Answer(text=said, model="scripted", p_yes=round(p, 4) if closed else None)
    if rng.random() < 0.01:
        trace.answer, trace.error = None, "cannot decode image"
    return trace
