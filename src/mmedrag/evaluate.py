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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag import controls as ctrl
from mmedrag import metrics, metrics_text
from mmedrag.arms import OVERALL, TASKS, Arm, load_arms, system_groups
from mmedrag.compare import compare_arms, marked, subgroup_tables
from mmedrag.controls import Prediction, TrainingData, group_of
from mmedrag.metrics_clinical import clinical as clinical_metrics
from mmedrag.metrics_stats import (
    RESAMPLES,
    AnyStat,
    clean,
    clusters,
    difference,
    interval,
    resample,
)
from mmedrag.reliance import missing, reliance
from mmedrag.runs import environment
from mmedrag.types import DataFolder, Score, Trace, Truth, UserError, write_jsonl

log = logging.getLogger(__name__)


@dataclass
class Facts:
    """What a DATA folder says about test rows: findings of each study, study of each reference."""

    truth: Mapping[str, Truth] = field(default_factory=dict)
    study: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataFolder | None) -> Facts:
        if data is None:
            return cls()
        return cls(data.truth(), {r.id: r.meta.get("study") for r in data.corpus()})


class Scorer:
    """Turns predictions for one list of traces into metrics, for the model and every control."""

    def __init__(
        self, task: str, traces: Sequence[Trace], facts: Facts, clinical: bool = False
    ) -> None:
        self.clinical, self.missing = clinical and task == "report", dict[str, str]()
        self.task, self.traces = task, traces
        self.targets = [t.target for t in traces]
        self.meteor = task == "report" and metrics_text.meteor_ready()
        self.truth = [facts.truth.get(str(t.meta.get("study"))) for t in traces]

    def __call__(self, said: Prediction) -> dict[str, AnyStat]:
        if self.task == "vqa_closed":
            asked = [t.question for t in self.traces]
            return metrics.closed(said.texts, self.targets, said.p_yes, asked)
        if self.task == "vqa_open":
            return metrics.open_answers(said.texts, self.targets)
        out = metrics_text.reports(said.texts, self.targets, self.meteor)
        if self.traces and all(self.truth):
            out |= self.finding_level(said.texts)
        if self.clinical:
            found, self.missing = clinical_metrics(said.texts, [t or "" for t in self.targets])
            out |= found
        return out

    def finding_level(self, texts: Sequence[str]) -> dict[str, AnyStat]:
        """Exact finding-level scores on the benchmark."""
        from mmedrag.phantom.grammar import label_report

        wanted, said, unreadable = [], [], []
        for truth, text in zip(self.truth, texts, strict=True):
            assert truth is not None
            wanted.append({n for n, state in truth.findings.items() if state.present})
            said.append(ctrl.present_in(truth.domain, text))
            read = label_report(truth.domain, text)
            unreadable.append(len(read["unreadable"]) / max(read["sentences"], 1))
        found = metrics.findings(said, wanted)
        return found | {"unreadable_rate": metrics.average(unreadable)}


def said_by(traces: Sequence[Trace]) -> Prediction:
    """The model's own answers; a failed row says nothing."""
    return Prediction(
        [t.answer.text if t.answer and not t.error else "" for t in traces],
        [t.answer.p_yes if t.answer and not t.error else None for t in traces],
    )


def control_predictions(
    arm: Arm, task: str, arms: Sequence[Arm], train: TrainingData | None, seed: int
) -> ctrl.Controls:
    """All controls of an arm: from data and hits, and from other runs of the same system."""
    traces = arm.of_task(task)
    make = {"vqa_closed": ctrl.closed_controls, "vqa_open": ctrl.open_controls,
            "report": ctrl.report_controls}[task]  # fmt: skip
    found, missing_ = make(traces, train, seed)
    references = arm.references
    if arm.image == "clean":
        missing_ |= {"noise_image": "needs a run of this system with --noise",
                     "blank_image": "needs a run of this system with --noise blank"}  # fmt: skip
        if references in ("selected", "all"):
            missing_["run_shuffled"] = "needs a run of this system with --references shuffled"
            missing_["run_random"] = "needs a run of this system with --references random"
    for other in arms:
        if other is arm or not arm.belongs(other) or arm.image != "clean":
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

    Returns:
        ``runs`` {arm: {title, condition, n, tasks {task: {overall|domain: {n, patients,
        failed, metrics {name: {value, low, high, n}}, controls {name: {metric: {...,
        difference}}}, not_computed {control: why}, marked {metric: control}}}},
        retrieval {overall|domain: the same}}},
        ``reliance`` {system: {title, metrics {name: {value, low, high, n, denominator}},
        not_computed}}, ``comparisons``,
        ``subgroups``, ``signatures``, ``environment``. Equal inputs and seed, equal bytes.

    Raises:
        UserError: an unreadable run folder, or nothing in it to score.
    """
    arms = load_arms(runs)
    train, facts = TrainingData.of(data), Facts.of(data)
    scores: list[Score] = []
    kept: dict[str, dict[str, Scored]] = {}
    result: dict[str, Any] = {"schema": 1, "seed": seed, "resamples": resamples, "runs": {}}
    for arm in arms:
        tasks = [task for task in TASKS if arm.of_task(task)]
        kept[arm.name] = {}
        result["runs"][arm.name] = {
            "title": arm.title, "condition": arm.condition, "n": len(arm.traces),
            "failed": sum(t.error is not None for t in arm.traces), "tasks": {},
            "retrieval": retrieval(arm, facts, resamples, seed) if arm.plain else {},
        }  # fmt: skip
        for task in tasks:
            log.info("scoring %s: %s", arm.name, task)
            scored = score(arm, task, arms, train, facts, seed, clinical)
            kept[arm.name][task] = scored
            result["runs"][arm.name]["tasks"][task] = tables(scored, resamples, seed)
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
            "title": str(title or name), "metrics": found, "not_computed": missing(found)
        }  # fmt: skip
    plain = {a.name for a in arms if a.plain}
    result["comparisons"] = compare_arms(
        {name: tasks for name, tasks in kept.items() if name in plain}, resamples, seed
    )
    result["subgroups"] = {
        name: {task: subgroup_tables(scored, subgroups, resamples, seed)
               for task, scored in tasks.items()}
        for name, tasks in kept.items() if subgroups and name in plain
    }  # fmt: skip
    result["signatures"] = metrics_text.signatures()
    if not metrics_text.meteor_ready():
        result["not_computed"] = {"meteor": metrics_text.METEOR_HELP}
    result["environment"] = environment() | {
        "runs": {a.name: a.config.get("environment", {}).get("commit") for a in arms}
    }
    if out is not None:
        write_metrics(result, scores, Path(out))
    return result


@dataclass
class Scored:
    """Metrics of one arm and task, for the model ("model") and each control, over its rows."""

    task: str
    traces: list[Trace]
    stats: dict[str, dict[str, AnyStat]]
    not_computed: dict[str, str]

    @property
    def domains(self) -> list[str]:
        return sorted({group_of(t) for t in self.traces})

    def rows(self, domain: str) -> np.ndarray:
        keep = [domain in (OVERALL, group_of(t)) for t in self.traces]
        return np.flatnonzero(keep)


def score(
    arm: Arm, task: str, arms: Sequence[Arm], train: TrainingData | None,
    facts: Facts, seed: int, clinical: bool = False,
) -> Scored:  # fmt: skip
    """All metrics of one arm and task, and of its controls, before any resampling."""
    traces = arm.of_task(task)
    scorer = Scorer(task, traces, facts, clinical)
    if arm.plain or not any(a.plain for a in arms):
        found, why = control_predictions(arm, task, arms, train, seed)
    else:
        found, why = {}, {}  # a degraded condition is itself a control of the plain ones
    stats = {"model": scorer(said_by(traces))}
    stats |= {name: scorer(said) for name, said in found.items()}
    if task == "report" and "finding_f1" not in stats["model"]:
        why["finding_f1"] = "needs the benchmark's truth: give --data"
    return Scored(task, traces, stats, why | scorer.missing)


def retrieval(arm: Arm, facts: Facts, resamples: int, seed: int) -> dict[str, Any]:
    """What the references of an arm are worth, per domain, one row per distinct image.

    ``label_agreement``: share of findings that the top-1 reference's study has in common with
    the image's (present in both or absent in both); ``label_agreement_kept``: mean over the
    kept references; both on the benchmark, beside shuffled references. ``recall@k``, ``mrr``:
    of the image's own report, where that may be retrieved at all.
    """
    seen: dict[str, Trace] = {}
    for trace in arm.traces:
        if trace.hits and not trace.meta.get("twin_of"):
            seen.setdefault(str(trace.image or trace.example_id), trace)
    traces = list(seen.values())
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
    if not stats["model"]:
        return {}
    return tables(Scored("retrieval", traces, stats, {}), resamples, seed)


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


def tables(scored: Scored, resamples: int, seed: int) -> dict[str, Any]:
    """Overall and per domain: metrics, controls, paired differences and marks."""
    domains = scored.domains
    return {
        domain: table(scored, scored.rows(domain), resamples, seed)
        for domain in (OVERALL, *domains)
    }


def table(scored: Scored, rows: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """One group of rows: every metric with interval, each control with its difference."""
    shared: dict[int, np.ndarray] = {}
    groups = clusters([scored.traces[i].patient for i in rows])
    names = [(who, name) for who, own in scored.stats.items() for name in own]
    stats = [scored.stats[who][name].take(rows, shared) for who, name in names]
    draws = dict(zip(names, resample(stats, groups, resamples, seed), strict=True))
    by_name = dict(zip(names, stats, strict=True))
    values = {key: interval(by_name[key], draws[key], groups) for key in names}
    controls: dict[str, dict[str, Any]] = {}
    for who, name in names:
        if who == "model" or ("model", name) not in values:
            continue
        sign = -1 if name in metrics.LOWER_IS_BETTER else 1
        own, theirs = ("model", name), (who, name)
        gap = difference(
            sign * (values[own].value - values[theirs].value),
            sign * draws[own], sign * draws[theirs], len(rows), int(groups.max()) + 1,
        )  # fmt: skip
        controls.setdefault(who, {})[name] = {
            **values[theirs].as_dict(), "difference": gap.as_dict(),
        }  # fmt: skip
    failed = sum(scored.traces[i].error is not None or scored.traces[i].answer is None
                 for i in rows)  # fmt: skip
    return {
        "n": len(rows), "patients": int(groups.max()) + 1, "failed": failed,
        "metrics": {name: values["model", name].as_dict() for name in scored.stats["model"]},
        "controls": controls,
        "not_computed": scored.not_computed,
        "marked": marked({n: values["model", n].low for n in scored.stats["model"]}, controls),
    }  # fmt: skip


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
