"""Evaluation of run folders: traces -> metrics with intervals, controls and marks.

Place in the picture: Trace -> metrics -> Score -> summary + interval + controls -> report. No
model is needed. One *arm* is one system under one condition, the unit of a table row; a run
folder whose traces have several conditions gives several arms.

A score is *marked* when it cannot be told apart from its best control: the 95 % interval of
the paired difference to that control reaches 0 or below.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedrag.evaluation.arms import TASKS, load_arms, system_groups
from mmedrag.evaluation.classification import classification
from mmedrag.evaluation.compare import compare_arms, planned_comparisons
from mmedrag.evaluation.controls import TrainingData, control_predictions
from mmedrag.evaluation.metrics import text as metrics_text
from mmedrag.evaluation.metrics.statistics import RESAMPLES, clean
from mmedrag.evaluation.of_retrieval import retrieval
from mmedrag.evaluation.reliance import missing, reliance
from mmedrag.evaluation.scoring import Common, Facts, Scored, Scorer, score_all, tables
from mmedrag.evaluation.subgroups import subgroup_tables
from mmedrag.records import Score, UserError
from mmedrag.runtime import DataFolder, environment, write_json, write_jsonl

log = logging.getLogger(__name__)


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
            "title": arm.title,
            "condition": arm.condition,
            "plain": arm.plain,
            "n": len(arm.traces),
            "failed": sum(t.error is not None for t in arm.traces),
            "tasks": {},
            "retrieval": retrieval(arm, facts, resamples, seed) if arm.plain else {},
            **(classification(arm, resamples, seed) if arm.plain else {}),
        }
        for task in tasks:
            log.debug("scoring %s: %s", arm.name, task)
            traces = arm.of_task(task)
            said, why = control_predictions(arm, task, arms, train, seed)
            scored = score_all(
                task, traces, Scorer(task, traces, facts, clinical), said, why, common
            )
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
            "title": str(title or name),
            "model": own[0].model,
            "metrics": found,
            "not_computed": missing(found),
        }
    plain = [a for a in arms if a.plain]
    result["comparisons"] = compare_arms(kept, planned_comparisons(plain), resamples, seed)
    result["subgroups"] = {
        name: {
            task: subgroup_tables(scored, subgroups, resamples, seed)
            for task, scored in tasks.items()
        }
        for name, tasks in kept.items()
        if subgroups and name in {a.name for a in plain}
    }
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


def example_scores(arm: str, scored: Scored) -> list[Score]:
    """One row per example and metric; metrics that share a per-example value are all listed."""
    return [
        Score(example_id=t.example_id, metric=name, value=v, run=arm, task=scored.task)
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
    write_json(out, result)
