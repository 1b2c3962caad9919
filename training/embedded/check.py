"""What the embedded models can do, measured on a benchmark that none of them has seen.

Writes ``scores.json`` and the model card beside the weights. The figures are the claims of the
README about the embedded system; nothing else states them.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.answering.generators import load_generator
from mmedrag.evaluation import EvaluationResult, evaluate, label, right, truth
from mmedrag.phantom import DOMAINS, build_benchmark, label_report
from mmedrag.pipeline import Plan, RunSettings, run_plans
from mmedrag.records import Trace
from mmedrag.runtime import DataFolder, as_dict, read_jsonl
from training.embedded import preference

log = logging.getLogger(__name__)
CHECK_SEED, STUDIES = 4000, 1200  # per domain; a quarter of them are test studies
SOME = 600  # closed questions that the single sets are measured on
NOISE = "gaussian_clip"
PLANS = {
    "none": Plan("none"),
    "noise": Plan("none", NOISE),
    "references": Plan("selected"),
    "noise-references": Plan("selected", NOISE),
    "own": Plan("own"),
    "noise-own": Plan("own", NOISE),
    "contradicting": Plan("contradicting"),
}
FULL = tuple(PLANS)
BRIEF = (
    "none",
    "noise",
    "references",
    "noise-references",
    "contradicting",
)  # what sets are told by


def balanced(traces: Sequence[Trace]) -> float | None:
    """Balanced accuracy of closed answers under the strict parser; unclear counts as wrong."""
    sides = [[right(t) for t in traces if truth(t) == side] for side in ("yes", "no")]
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
            told = label_report(trace.target_domain, trace.hits[0].text)["findings"]
            if trace.meta["finding"] in told and not told[trace.meta["finding"]]["uncertain"]:
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
            found[kind].append(label(twin) != label(base))
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
            told = balanced(mentioned(own["noise-own"]))
            out[domain]["balanced_accuracy/noise-own, mentioned"] = told
    return out


def _some(data: DataFolder) -> tuple[str, ...]:
    """Ids of ``SOME`` closed questions of test patients, twins aside; the same at each call."""
    rows = [
        e.id
        for e in data.examples()
        if e.split == "test" and e.answer_type == "closed" and not e.meta.get("twin_of")
    ]
    return tuple(rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:SOME])


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


def check(
    work: Path, weights: Path, adapter: str | None = None, plans: Sequence[str] = FULL
) -> dict[str, Any]:
    """Answer unseen test patients under ``plans``; unless all: ``SOME`` of their questions."""
    data = DataFolder(_data(work))
    system = preference.pipeline(work, weights, data)
    if adapter:
        system.generator = load_generator("hf", weights / "vlm", weights / adapter, batch_size=64)
    name = adapter or "untuned"
    out = work / "check" / name
    ids = () if plans == FULL else _some(data)
    settings = RunSettings(split="test", chunk=512, ids=ids)
    described = {"row": name, "generator": {"model": "vlm", "adapter": adapter}}
    run_plans(system, data, {n: PLANS[n] for n in plans}, out, settings, 0, described)
    folders = {plan: out / plan for plan in plans}
    evaluation = evaluate(list(folders.values()), data, resamples=2000)
    return {
        "figures": measure(folders),
        "reports": report_scores(evaluation),
        "reliance": as_dict(evaluation.reliance),
    }


def write_card(work: Path, weights: Path, found: dict[str, Any]) -> None:
    """``scores.json`` and README.md (the model card) beside the weights."""
    times = json.loads((work / "times.json").read_text())
    sizes = {
        folder.name: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        for folder in sorted(weights.iterdir())
        if folder.is_dir() and not folder.name.startswith("__")
    }
    scores = {
        "benchmark": {
            "seed": CHECK_SEED,
            "studies_per_domain": STUDIES,
            "split": "test",
            "similarity": preference.SIMILARITY,
        },
        "seconds": times,
        "bytes": sizes,
        "machine": platform.machine(),
        "models": found,
    }
    (weights / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True) + "\n")
    lines = [
        "# Embedded models",
        "",
        "Small models that make every command run anywhere, at once and offline. They were trained",
        "on the drawn benchmark alone (`python -m training.embedded`, docs/benchmark.md) and know",
        "nothing of real images. Not a medical device. Apache-2.0.",
        "",
        f"Measured on unseen patients: benchmark seed {CHECK_SEED}, {STUDIES} studies a domain, "
        f"similarity {preference.SIMILARITY}, test split; closed questions, balanced accuracy, "
        "strict parser; reports, finding F1.",
        "",
    ]
    for name, result in found.items():
        lines += [f"## {name}", "", *_accuracy_table(result["figures"]), ""]
        if result["reports"]:
            lines += [*_report_table(result["reports"]), ""]
        lines += [*_reliance_table(result["reliance"]), ""]
    lines += [
        "Seconds of training by stage (one thread of a shared machine): "
        + ", ".join(f"{k} {v}" for k, v in times.items())
        + ".",
        "",
    ]
    (weights / "README.md").write_text("\n".join(lines))


def _accuracy_table(figures: dict[str, Any]) -> list[str]:
    told = "balanced_accuracy/"
    plans = [k.removeprefix(told) for k in next(iter(figures.values())) if k.startswith(told)]
    rows = [["domain", "n", *plans, "flips asked / other"]]
    for domain, f in figures.items():
        flip = [_cell(f["flips"].get(kind)) for kind in ("asked", "other")]
        rows.append(
            [
                domain,
                str(f["questions"]),
                *(_cell(f[told + p]) for p in plans),
                " / ".join(filter(None, flip)),
            ]
        )
    return _markdown(rows)


def _report_table(reports: dict[str, Any]) -> list[str]:
    plans = list(next(iter(reports.values())))
    rows = [["reports: finding F1", *plans, "best constant report", "above it (none)"]]
    for domain, own in reports.items():
        constant = own["none"]["constant"]
        gap = constant["difference"]
        rows.append(
            [
                domain,
                *(_cell(own[p]["model"]["value"]) for p in plans),
                _cell(constant["value"]),
                f"{_cell(gap['value'])} [{_cell(gap['low'])}, {_cell(gap['high'])}]",
            ]
        )
    return _markdown(rows)


def _reliance_table(reliance: dict[str, Any]) -> list[str]:
    rows = [["reliance", "value", "95 % interval", "n"]]
    for system in reliance.values():
        for name, f in system["metrics"].items():
            low_high = f"[{_cell(f['low'])}, {_cell(f['high'])}]"
            rows.append([name, _cell(f["value"]), low_high, str(f["n"])])
    return _markdown(rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *body]


def _data(work: Path) -> Path:
    path = work / f"phantom-{CHECK_SEED}"
    build_benchmark(
        path, studies=STUDIES, seed=CHECK_SEED, twins="image", similarity=preference.SIMILARITY
    )
    return path
