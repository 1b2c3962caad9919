"""What the embedded models can do, measured on a benchmark that none of them has seen.

Writes ``scores.json`` and the model card beside the weights. The figures are the claims of the
README about the embedded system; nothing else states them.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, PackageLoader

from mmedrag.evaluation import EvaluationResult, evaluate
from mmedrag.phantom import DOMAINS, findings_in
from mmedrag.pipeline import RunSettings, run_conditions
from mmedrag.records import ConditionSpec, Trace, is_right, label_of, target_of
from mmedrag.runtime import DataFolder, as_dict, read_json, read_jsonl, write_text
from training.embedded import preference
from training.embedded.stages import Build

CHECK_SEED = 4000
NOISE = "gaussian_clip"
PLANS = {
    "none": ConditionSpec("none"),
    "noise": ConditionSpec("none", NOISE),
    "references": ConditionSpec("selected"),
    "noise-references": ConditionSpec("selected", NOISE),
    "own": ConditionSpec("own"),
    "noise-own": ConditionSpec("own", NOISE),
    "contradicting": ConditionSpec("contradicting"),
}
FULL = tuple(PLANS)
# What sets the adapters apart.
BRIEF = ("none", "noise", "references", "noise-references", "contradicting")


def balanced(traces: Sequence[Trace]) -> float | None:
    """Balanced accuracy of closed answers under the strict parser; unclear counts as wrong."""
    sides = [[is_right(t) for t in traces if target_of(t) == side] for side in ("yes", "no")]
    return round(float(np.mean([np.mean(s) for s in sides])), 4) if all(sides) else None


def closed(traces: Sequence[Trace], form: str | None = None) -> list[Trace]:
    return [
        t
        for t in traces
        if t.answer_type == "closed"
        and not t.meta.get("twin_of")
        and form in (None, t.meta.get("form"))
    ]


def mentioned(traces: Sequence[Trace]) -> list[Trace]:
    """Presence questions whose finding the study's own report states."""
    kept = []
    for trace in closed(traces, "presence"):
        if trace.hits and trace.target_domain:
            state = findings_in(trace.target_domain, trace.hits[0].text).get(trace.meta["finding"])
            if state and not state["uncertain"]:
                kept.append(trace)
    return kept


def flips(traces: Sequence[Trace]) -> dict[str, float]:
    """How often the answer flips between a study and its image twin, by what flipped."""
    rows = {t.example_id: t for t in traces}
    found: dict[str, list[bool]] = {"asked": [], "other": []}
    for twin in traces:
        base = rows.get(twin.meta.get("twin_of", ""))
        if base is not None and twin.answer_type == "closed":
            kind = "asked" if twin.meta["flipped"] == twin.meta["finding"] else "other"
            found[kind].append(label_of(twin) != label_of(base))
    return {kind: round(float(np.mean(v)), 4) for kind, v in found.items() if v}


def measure(folders: dict[str, Path]) -> dict[str, Any]:
    """The targets' figures per domain, from the traces of every condition."""
    traces = {name: list(read_jsonl(f / "traces.jsonl", Trace)) for name, f in folders.items()}
    out: dict[str, Any] = {}
    for domain in DOMAINS:
        own = {n: [t for t in rows if t.target_domain == domain] for n, rows in traces.items()}
        out[domain] = {
            "questions": len(closed(own["none"])),
            **{f"balanced_accuracy/{n}": balanced(closed(rows)) for n, rows in own.items()},
            "flips": flips(own["none"]),
        }
        if "noise-own" in own:
            score = balanced(mentioned(own["noise-own"]))
            out[domain]["balanced_accuracy/noise-own, mentioned"] = score
    return out


def _some(data: DataFolder, count: int) -> tuple[str, ...]:
    """Ids of so many closed questions of test patients, twins aside; the same at each call."""
    rows = [
        e.id
        for e in data.examples()
        if e.split == "test" and e.answer_type == "closed" and not e.meta.get("twin_of")
    ]
    return tuple(rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count])


def report_scores(evaluation: EvaluationResult) -> dict[str, Any]:
    """Finding F1 of the reports per condition and domain, beside the best constant report's."""
    out: dict[str, Any] = {}
    for name, run in evaluation.runs.items():
        for domain, found in run.tasks.get("report", {}).items():
            own = found.metrics.get("finding_f1")
            if own:
                constant = found.controls.get("constant_findings", {}).get("finding_f1")
                out.setdefault(domain, {})[name] = as_dict({"model": own, "constant": constant})
    return out


def check(build: Build, adapter: str | None = None, plans: Sequence[str] = FULL) -> dict[str, Any]:
    """Answer unseen test patients under ``plans``; unless all: some of their questions."""
    sizes = build.sizes
    data = preference.benchmark(build, CHECK_SEED, sizes.check_studies, twins="image")
    system, name = preference.pipeline(build, data, adapter), adapter or "untuned"
    out = build.work / "check" / name
    ids = () if plans == FULL else _some(data, sizes.questions)
    settings = RunSettings(split="test", chunk=512, ids=ids)
    described = {"row": name, "generator": {"model": "vlm", "adapter": adapter}}
    run_conditions(system, data, {n: PLANS[n] for n in plans}, out, settings, 0, described)
    folders = {plan: out / plan for plan in plans}
    evaluation = evaluate(list(folders.values()), data, resamples=sizes.resamples)
    return {
        "figures": measure(folders),
        "reports": report_scores(evaluation),
        "reliance": as_dict(evaluation.reliance),
    }


def write_card(build: Build, found: dict[str, Any]) -> None:
    """``scores.json`` and README.md (the model card) beside the weights."""
    times, models = build.work / "times.json", build.out
    sizes = {
        folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        for folder in sorted(models.iterdir())
        if folder.is_dir() and not folder.name.startswith("__")
    }
    scores = {
        "benchmark": {
            "seed": CHECK_SEED,
            "studies_per_domain": build.sizes.check_studies,
            "split": "test",
            "similarity": preference.SIMILARITY,
        },
        "seconds": read_json(times) if times.exists() else {},
        "bytes": sizes,
        "machine": platform.machine(),
        "models": found,
    }
    (models / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True) + "\n")
    write_text(models / "README.md", card(scores))


def card(scores: dict[str, Any]) -> str:
    """The model card: Markdown of the figures in ``scores.json``."""
    environment = Environment(
        loader=PackageLoader("training.embedded", "."),
        undefined=ChainableUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    environment.tests["startswith"] = str.startswith
    return environment.get_template("card.md.jinja").render(scores)
