"""Evaluation of run folders: traces -> metrics with intervals, controls and marks.

Place in the picture: Trace -> metrics -> Score -> summary + interval + controls -> report. No
model is needed. One *arm* is one system under one condition, the unit of a table row; a run
folder whose traces have several conditions gives several arms.

A score is *marked* when it cannot be told apart from its best control: the 95 % interval of
the paired difference to that control reaches 0 or below.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag import controls as ctrl
from mmedrag import metrics, metrics_text
from mmedrag.arms import OVERALL, TASKS, Arm, load_arms, system_groups
from mmedrag.compare import compare_arms, steps
from mmedrag.controls import TrainingData
from mmedrag.metrics_stats import RESAMPLES, AnyStat, clean, intervals
from mmedrag.reliance import label, missing, reliance, truth
from mmedrag.retrieval_metrics import usage
from mmedrag.runs import environment
from mmedrag.scoring import Common, Facts, Scored, Scorer, said_by, score_all, tables
from mmedrag.subgroups import subgroup_tables
from mmedrag.types import DataFolder, Score, Trace, UserError, write_jsonl

log = logging.getLogger(__name__)


def control_predictions(
    arm: Arm, task: str, arms: Sequence[Arm], train: TrainingData | None, seed: int
) -> ctrl.Controls:
    """All controls of an arm: from data and hits, and from other runs of the same system."""
    traces = arm.of_task(task)
    make = {"vqa_closed": ctrl.closed_controls, "vqa_open": ctrl.open_controls,
            "report": ctrl.report_controls}[task]  # fmt: skip
    found, missing_ = make(traces, train, seed)
    if not arm.plain:  # itself a control, or a probe, of the plain arms
        return found, missing_
    references = arm.references
    missing_ |= {"noise_image": "needs a run of this system with --noise",
                 "blank_image": "needs a run of this system with --noise blank"}  # fmt: skip
    if references in ("selected", "all"):
        missing_["run_shuffled"] = "needs a run of this system with --references shuffled"
        missing_["run_random"] = "needs a run of this system with --references random"
    for other in arms:
        if other is arm or not arm.belongs(other):
            continue
        noise, theirs, name = other.image, other.references, None
        if noise != "clean" and theirs == references:
            name = "blank_image" if noise == "noise:blank" else "noise_image"
        elif noise == "clean" and theirs in ("shuffled", "random") and references != theirs:
            name = f"run_{theirs}" if references in ("selected", "all") else None
        if not name or name in found:
            continue
        rows = {t.example_id: t for t in other.of_task(task)}
        covered = sum(t.example_id in rows for t in traces)
        if covered == len(traces):
            found[name] = said_by([rows[t.example_id] for t in traces])
            missing_.pop(name, None)
        elif covered:
            missing_[name] = f"{other.name} covers {covered} of {len(traces)} rows"
    return found, missing_


def evaluate(
    runs: Sequence[str | Path],
    data: DataFolder | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    subgroups: Sequence[str] = (),
    clinical: bool = False,
    not_run: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score run folders: the content of ``metrics.json``.

    Args:
        runs: run folders; the first is the baseline of the paired tests.
        data: the DATA folder of the runs: gives the train controls and the benchmark's truth.
        out: where to write ``metrics.json``; the per-example scores go beside it as
            ``<stem>.scores.jsonl``. Nothing is written by default.
        seed, resamples: of the bootstrap and of the seeded controls.
        subgroups: trace fields to break scores down by (``source``, ``meta.sex``, ...).
        clinical: also compute RadEval's clinical metrics (needs the extra and its weights).
        not_run: what should have been run and could not -> why; listed as not computed.

    Returns:
        ``runs`` {arm: {title, condition, plain, n, tasks {task: {overall|domain: {n, patients,
        failed, metrics {name: {value, low, high, n}}, controls {name: {metric: {...,
        difference}}}, not_computed {control: why}, marked {metric: control}}}},
        retrieval {overall|domain: the same, with rules}, and of plain arms ``confusion``,
        ``routing``, ``reliability`` (see :func:`classification`)}},
        ``reliance`` {system: {title, model, metrics {name: {value, low, high, n, denominator}},
        not_computed}}, ``comparisons``,
        ``subgroups``, ``signatures``, ``environment``. Equal inputs and seed, equal bytes.

    Raises:
        UserError: an unreadable run folder, or nothing in it to score.
    """
    arms = load_arms(runs)
    train, facts, common = TrainingData.of(data), Facts.of(data), Common()
    scores: list[Score] = []
    kept: dict[str, dict[str, Scored]] = {}
    result: dict[str, Any] = {"schema": 1, "seed": seed, "resamples": resamples, "runs": {}}
    log.info("scoring %d runs", len(arms))
    for arm in arms:
        tasks = [task for task in TASKS if arm.of_task(task)]
        kept[arm.name] = {}
        result["runs"][arm.name] = {
            "title": arm.title, "condition": arm.condition, "plain": arm.plain,
            "n": len(arm.traces),
            "failed": sum(t.error is not None for t in arm.traces), "tasks": {},
            "retrieval": retrieval(arm, facts, resamples, seed) if arm.plain else {},
            **(classification(arm, resamples, seed) if arm.plain else {}),
        }  # fmt: skip
        for task in tasks:
            log.debug("scoring %s: %s", arm.name, task)
            traces = arm.of_task(task)
            said, why = control_predictions(arm, task, arms, train, seed)
            scored = score_all(task, traces, Scorer(task, traces, facts, clinical), said, why,
                               common)  # fmt: skip
            if task == "report" and "finding_f1" not in scored.stats["model"]:
                why["finding_f1"] = "needs the benchmark's truth: give --data"
            kept[arm.name][task] = scored
            result["runs"][arm.name]["tasks"][task] = tables(scored, resamples, seed, common)
            scores += example_scores(arm.name, scored)
    if not any(kept.values()):
        raise UserError(f"{', '.join(map(str, runs))}: no trace has a target, nothing to score")
    systems = system_groups(arms)
    result["reliance"] = {}
    for name, own in systems.items():
        found = reliance([t for a in own for t in a.traces], resamples, seed)
        system = own[0].config.get("system")
        title = system.get("title") if isinstance(system, dict) else None
        result["reliance"][name] = {
            "title": str(title or name), "model": own[0].model, "metrics": found,
            "not_computed": missing(found),
        }  # fmt: skip
    plain = [a for a in arms if a.plain]
    result["comparisons"] = compare_arms(kept, steps(plain), resamples, seed)
    result["subgroups"] = {
        name: {task: subgroup_tables(scored, subgroups, resamples, seed)
               for task, scored in tasks.items()}
        for name, tasks in kept.items() if subgroups and name in {a.name for a in plain}
    }  # fmt: skip
    result["signatures"] = metrics_text.signatures()
    lacking = dict(not_run or {})
    if not metrics_text.meteor_ready():
        lacking["meteor"] = metrics_text.METEOR_HELP
    if lacking:
        result["not_computed"] = lacking
    result["environment"] = environment() | {
        "runs": {a.name: a.config.get("environment", {}).get("commit") for a in arms}
    }
    if out is not None:
        write_metrics(result, scores, Path(out))
    return result


def retrieval(arm: Arm, facts: Facts, resamples: int, seed: int) -> dict[str, Any]:
    """What the references of an arm are worth and which are used, per domain, one row per
    distinct image.

    ``label_agreement``: share of findings that the top-1 reference's study has in common with
    the image's (present in both or absent in both); ``label_agreement_kept``: mean over the
    kept references; both on the benchmark, beside shuffled references. ``recall@k``, ``mrr``:
    of the image's own report, where that may be retrieved at all. Selection, hubness and
    similarity: see :func:`mmedrag.retrieval_metrics.usage`. ``rules``: that selected.
    """
    traces = [t for t in one_per_image(arm.traces) if t.hits]
    if not traces:
        return {}
    agree = [[_agreement(t, h.id, facts) for h in t.hits] for t in traces]
    kept = [{i for i in t.selection.kept} if t.selection else set() for t in traces]
    first = ctrl.shuffled(traces, [t.hits[0].id for t in traces], seed)
    stats: dict[str, dict[str, AnyStat]] = {"model": {}, "shuffled_references": {}}
    if any(np.isfinite(row).any() for row in map(np.array, agree)):
        chosen = [[v for h, v in zip(t.hits, row, strict=True) if h.id in ids]
                  for t, row, ids in zip(traces, agree, kept, strict=True)]  # fmt: skip
        stats["model"] = {
            "label_agreement": metrics.average([row[0] for row in agree]),
            "label_agreement_kept": metrics.average(
                [float(np.mean(row)) if row else np.nan for row in chosen]
            ),
        }
        others = [_agreement(t, other, facts) for t, other in zip(traces, first, strict=True)]
        stats["shuffled_references"]["label_agreement"] = metrics.average(others)
    ranks = [next((h.rank for h in t.hits if _own(t, h.id, facts)), None) for t in traces]
    if any(rank is not None for rank in ranks):
        stats["model"] |= metrics.retrieval(ranks)
    stats["model"] |= usage(traces)
    scored = Scored("retrieval", traces, stats, {})
    return {
        group: {**found, "rules": sorted({_rule(traces[i]) for i in scored.rows(group)} - {""})}
        for group, found in tables(scored, resamples, seed).items()
    }


def one_per_image(traces: Sequence[Trace]) -> list[Trace]:
    """The first trace of each image, twins aside: retrieval sees images, not questions."""
    seen: dict[str, Trace] = {}
    for trace in traces:
        if not trace.meta.get("twin_of"):
            seen.setdefault(str(trace.image or trace.example_id), trace)
    return list(seen.values())


def _rule(trace: Trace) -> str:
    if trace.selection is None:
        return ""
    params = ", ".join(f"{k} {v}" for k, v in sorted(trace.selection.params.items()))
    return f"{trace.selection.rule} {params}".strip()


def classification(arm: Arm, resamples: int, seed: int) -> dict[str, Any]:
    """Which class each thing was put into, as shares with intervals.

    ``confusion``: overall or domain -> truth -> answer -> share, of the closed questions (strict
    parser); ``routing``: domain -> identified domain -> share of images; ``reliability``: points
    of the reliability diagram, {p_yes, share_yes}.
    """
    closed = arm.of_task("vqa_closed")
    groups = {OVERALL: closed} | {d: [] for d in sorted({ctrl.group_of(t) for t in closed})}
    for trace in closed:
        groups[ctrl.group_of(trace)].append(trace)
    routed = [t for t in one_per_image(arm.traces) if t.target_domain and t.domain]
    said = sorted({t.domain.label for t in routed if t.domain})
    patients = [t.patient for t in closed]
    points = metrics.reliability(
        [t.answer.p_yes if t.answer else None for t in closed], [truth(t) for t in closed]
    )
    return {
        "confusion": {
            group: {side: _shares([t for t in own if truth(t) == side], label, metrics.LABELS,
                                  resamples, seed) for side in metrics.LABELS[:2]}
            for group, own in groups.items() if own
        },
        "routing": {
            domain: _shares([t for t in routed if t.target_domain == domain],
                            lambda t: t.domain.label if t.domain else "", said, resamples, seed)
            for domain in sorted({str(t.target_domain) for t in routed})
        },
        "reliability": [
            {name: cell.as_dict()
             for name, cell in intervals(point, patients, resamples, seed).items()}
            for point in points
        ],
    }  # fmt: skip


def _shares(
    traces: Sequence[Trace], of: Callable[[Trace], str], names: Sequence[str], resamples: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Share of the traces in each of the named classes."""
    found = [of(t) for t in traces]
    stats = {name: metrics.proportion([f == name for f in found]) for name in names}
    made = intervals(stats, [t.patient for t in traces], resamples, seed)
    return {name: cell.as_dict() for name, cell in made.items()}


def _own(trace: Trace, reference: str, facts: Facts) -> bool:
    study = trace.meta.get("study")
    return study is not None and facts.study.get(reference) == study


def _agreement(trace: Trace, reference: str, facts: Facts) -> float:
    """Share of findings in common; NaN where the truth of either study is not known."""
    mine = facts.truth.get(str(trace.meta.get("study")))
    theirs = facts.truth.get(str(facts.study.get(reference)))
    if mine is None or theirs is None or mine.findings.keys() != theirs.findings.keys():
        return float("nan")
    same = [f.present == theirs.findings[n].present for n, f in mine.findings.items()]
    return sum(same) / len(same)


def example_scores(arm: str, scored: Scored) -> list[Score]:
    """One row per example and metric; metrics that share a per-example value are all listed."""
    return [
        Score(example_id=t.example_id, metric=name, value=v, run=arm, task=scored.task)  # type: ignore[call-arg]
        for name, stat in scored.stats["model"].items()
        for t, value in zip(scored.traces, stat.values, strict=True)
        if (v := clean(value)) is not None
    ]


def scores_path(out: Path) -> Path:
    """The per-example sibling of a ``metrics.json``."""
    return out.with_name(f"{out.stem}.scores.jsonl")


def write_metrics(result: Mapping[str, Any], scores: Sequence[Score], out: Path) -> None:
    """Write ``metrics.json`` (atomically) and its per-example sibling."""
    write_jsonl(scores_path(out), scores)
    part = out.with_name(out.name + ".part")
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, out)
