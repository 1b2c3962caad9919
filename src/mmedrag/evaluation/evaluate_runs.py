"""Evaluation of run folders: traces -> metrics with intervals, controls and marks.

Place in the picture: Trace -> metrics -> Score -> summary + interval + controls -> report. No
model is needed. A :class:`SystemRun` is one system under one condition, the unit of a table row;
a run folder whose traces have several conditions gives several.

A score is *marked* when it cannot be told apart from the best control that is a system: the 95 %
interval of the paired difference to that control reaches 0 or below.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmedrag.evaluation.compare import compare_runs, planned_comparisons
from mmedrag.evaluation.controls import TrainingData, control_predictions
from mmedrag.evaluation.metrics import text as metrics_text
from mmedrag.evaluation.metrics.statistics import RESAMPLES, clean
from mmedrag.evaluation.plain_runs import confusion, reliability, retrieval, routing
from mmedrag.evaluation.reliance import missing, reliance
from mmedrag.evaluation.result import (
    SCHEMA,
    Environment,
    EvaluationResult,
    RunResult,
    SystemReliance,
)
from mmedrag.evaluation.runs import TASKS, SystemRun, load_runs, system_groups
from mmedrag.evaluation.scoring import Common, GroundTruth, Scored, score_all, tables
from mmedrag.evaluation.subgroups import subgroup_tables
from mmedrag.records import Score, UserError
from mmedrag.runtime import DataFolder, check_own, environment, write_jsonl

log = logging.getLogger(__name__)


def evaluate(
    runs: Sequence[str | Path],
    data: DataFolder | str | Path | None = None,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    subgroups: Sequence[str] = (),
    clinical: bool = False,
    not_run: Mapping[str, str] | None = None,
) -> EvaluationResult:
    """Score run folders.

    Args:
        runs: run folders; the first is the baseline of the paired tests.
        data: the DATA folder of the runs: gives the train controls and the benchmark's truth.
        out: where to write ``metrics.json``; the per-example scores go beside it as
            ``<stem>.scores.jsonl``. Nothing is written by default.
        seed, resamples: of the bootstrap and of the seeded controls.
        subgroups: trace fields to break scores down by (``source``, ``meta.sex``, ...).
        clinical: also compute RadEval's clinical metrics (needs the extra and its weights).
        not_run: what should have been run and could not -> why; listed as not computed.

    Raises:
        UserError: an unreadable run folder, or nothing in it to score.

    Example::

        result = evaluate(["alone", "references"], "data", out="metrics.json")
        result.runs["alone"].scores("vqa_closed").metrics["accuracy"].value
    """
    systems = load_runs(runs)
    data = DataFolder(data) if isinstance(data, (str, Path)) else data
    train, common = TrainingData.of(data), Common(GroundTruth.of(data), resamples, seed)
    if out is not None:
        check_own(out, scores_path(Path(out)))
    log.info("scoring %d runs", len(systems))
    scored: dict[str, dict[str, Scored]] = {}
    results: dict[str, RunResult] = {}
    for run in systems:
        scored[run.name] = {
            task: _score(run, task, systems, train, common, clinical)
            for task in TASKS
            if run.of_task(task)
        }
        results[run.name] = _result(run, scored[run.name], common)
    if not any(scored.values()):
        raise UserError(f"{', '.join(map(str, runs))}: no trace has a target, nothing to score")
    plain = [run for run in systems if run.plain]
    lacking = dict(not_run or {})
    if not metrics_text.meteor_ready():
        lacking["meteor"] = metrics_text.METEOR_HELP
    result = EvaluationResult(
        schema=SCHEMA,
        seed=seed,
        resamples=resamples,
        runs=results,
        reliance={
            name: _reliance(name, own, resamples, seed)
            for name, own in system_groups(systems).items()
        },
        comparisons=compare_runs(scored, planned_comparisons(plain), common),
        subgroups={
            run.name: {
                task: subgroup_tables(found, subgroups, common)
                for task, found in scored[run.name].items()
            }
            for run in plain
            if subgroups
        },
        signatures=metrics_text.signatures(),
        not_computed=lacking,
        environment=Environment(**environment(), runs={run.name: run.commit for run in systems}),
    )
    if out is not None:
        write_jsonl(scores_path(Path(out)), example_scores(scored), own=True)
        result.write(out)
    return result


def _score(
    run: SystemRun,
    task: str,
    runs: Sequence[SystemRun],
    train: TrainingData | None,
    common: Common,
    clinical: bool,
) -> Scored:
    """Every metric of the run's answers to a task, and of its controls."""
    log.debug("scoring %s: %s", run.name, task)
    controls, why = control_predictions(run, task, runs, train, common.seed)
    found = score_all(task, run.of_task(task), controls, why, common, clinical)
    if task == "report" and "finding_f1" not in found.model:
        found.not_computed["finding_f1"] = "needs the benchmark's truth: give --data"
    if task == "vqa_closed" and "auroc" not in found.model:
        found.not_computed |= dict.fromkeys(("auroc", "ece"), "no answer has a p(yes)")
    return found


def _result(run: SystemRun, scored: Mapping[str, Scored], common: Common) -> RunResult:
    """One run, resampled: its tasks, and where it is a plain one its references and classes."""
    return RunResult(
        title=run.title,
        condition=run.condition,
        plain=run.plain,
        n=len(run.traces),
        failed=sum(t.error is not None for t in run.traces),
        tasks={task: tables(found, common) for task, found in scored.items()},
        retrieval=retrieval(run, common) if run.plain else {},
        confusion=confusion(run, common) if run.plain else None,
        routing=routing(run, common) if run.plain else None,
        reliability=reliability(run, common) if run.plain else None,
    )


def _reliance(name: str, runs: Sequence[SystemRun], resamples: int, seed: int) -> SystemReliance:
    """Reliance of one system, from all its conditions."""
    found = reliance([t for run in runs for t in run.traces], resamples, seed)
    return SystemReliance(
        title=runs[0].system_title or name,
        model=runs[0].model,
        metrics=found,
        not_computed=missing(found),
    )


def example_scores(scored: Mapping[str, Mapping[str, Scored]]) -> Iterator[Score]:
    """One row per run, example and metric; metrics that share a per-example value are all
    listed."""
    for run, tasks in scored.items():
        for task, found in tasks.items():
            for metric, stat in found.model.items():
                for trace, value in zip(found.traces, stat.values, strict=True):
                    if (known := clean(value)) is not None:
                        yield Score(
                            example_id=trace.example_id,
                            metric=metric,
                            value=known,
                            run=run,  # type: ignore[call-arg]
                            task=task,
                        )


def scores_path(out: Path) -> Path:
    """The per-example sibling of a ``metrics.json``."""
    return out.with_name(f"{out.stem}.scores.jsonl")
