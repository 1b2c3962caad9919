"""Figures of the report: calibration, similarity, reliance, hubness, confusion, training.

Place in the picture: system runs and :class:`mmedrag.evaluation.EvaluationResult` -> SVG for the
template.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.embedded import located
from mmedrag.evaluation import (
    EvaluationResult,
    ReliabilityPoint,
    SystemReliance,
    SystemRun,
    best_control,
    by_domain,
    one_per_image,
)
from mmedrag.evaluation.metrics import LABELS, Estimate
from mmedrag.records import UserError, label_of, target_of
from mmedrag.report import svg
from mmedrag.report.tables import LEADING, SECOND, TASK_NAMES, Table

log = logging.getLogger(__name__)
RELIANCE_BARS = (
    "excess_copying",
    "copy_reference_rate",
    "over_reliance_rate",
    "follow_rate",
    "reference_gain",
    "reference_harm",
    "image_sensitivity",
    "image_sensitivity_refs",
)
MOST_LINES = 6  # series a chart can hold apart


Figure = tuple[str, str]  # caption, svg


@dataclass
class Section:
    """One part of the page."""

    id: str
    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    details: list[Table] = field(default_factory=list)  # folded away

    def __bool__(self) -> bool:
        return bool(self.figures or self.tables or self.details)


def score_dots(result: EvaluationResult, task: str, names: Sequence[str]) -> list[Figure]:
    """Dot plots of the leading metrics: row values with intervals and best controls."""
    out = []
    for metric in (LEADING[task], SECOND[task]):
        rows = []
        for name in names:
            group = result.runs[name].scores(task)
            found = group and group.known(metric)
            if not group or not found or found.value is None:
                continue
            best = best_control(group.controls, metric)
            rows.append(
                svg.Dot(
                    result.runs[name].title,
                    found.value,
                    found.low,
                    found.high,
                    best.value if best else None,
                    metric in group.marked,
                )
            )
        if rows:
            words = metric.replace("_", " ")
            caption = (
                f"{words} of each row with its 95 % interval; the diamond is "
                "the best control, a hollow dot with † is not clearly above it."
            )
            out.append((caption, svg.dots(rows, f"{TASK_NAMES[task]}: {metric}", words)))
    return out


def calibration(result: EvaluationResult) -> list[Figure]:
    """Reliability diagram of the closed questions: the first row and the last ones."""
    found = [run for run in result.runs.values() if run.reliability]
    shown = found if len(found) <= MOST_LINES else [found[0], *found[1 - MOST_LINES :]]
    series = [(run.title, [_point(bin_) for bin_ in run.reliability or ()]) for run in shown]
    if not series:
        return []
    drawn = svg.lines(
        series, "Reliability diagram", "predicted P(yes)", "share of yes", diagonal=True, unit=True
    )
    caption = (
        "How often the truth is yes where the model says P(yes); on the dashed line the "
        "probabilities can be taken at their word."
    )
    return [(caption, drawn)]


def _point(found: ReliabilityPoint) -> tuple[float, float]:
    x, y = found.p_yes.value, found.share_yes.value
    assert x is not None and y is not None  # a bin holds at least one question
    return x, y


def similarity(runs: Sequence[SystemRun]) -> list[Figure]:
    """Similarity by rank with the mean cut, per domain, of the last run that selects."""
    chosen = [r for r in runs if any(t.hits and t.selection for t in r.traces)]
    return _similarity_chart(chosen[-1]) if chosen else []


def _similarity_chart(run: SystemRun) -> list[Figure]:
    series, bands, cuts = [], [], []
    deepest = 0
    for i, (domain, traces) in enumerate(by_domain(run.traces).items()):
        rows = [t for t in one_per_image(traces) if t.hits and t.selection]
        depth = max((len(t.hits) for t in rows), default=0)
        if depth < 2 or i >= MOST_LINES:
            continue
        at_rank = [[t.hits[r].score for t in rows if len(t.hits) > r] for r in range(depth)]
        deepest = max(deepest, depth)
        series.append((domain, [(r + 1.0, float(np.median(s))) for r, s in enumerate(at_rank)]))
        edges = [np.percentile(s, [10, 90]) for s in at_rank]
        bands.append([(r + 1.0, float(e[0]), float(e[1])) for r, e in enumerate(edges)])
        kept = float(np.mean([len(t.selection.kept) for t in rows if t.selection]))
        if kept < depth:
            cuts.append((len(series) - 1, min(max(kept + 0.5, 1.0), float(depth))))
    if not series:
        return []
    drawn = svg.lines(
        series,
        "Similarity of retrieved references by rank",
        "rank",
        "cosine similarity",
        bands=bands,
        cuts=cuts,
        x_ticks=range(1, deepest + 1),
    )
    return [
        (
            f"{run.title}: median similarity by rank, with the 10th to 90th percentile. A dashed "
            "line is the mean cut: what stands right of it is left out. Without one, every "
            "reference is kept.",
            drawn,
        )
    ]


def reliance_bars(result: EvaluationResult) -> list[Figure]:
    """Reliance metrics of every system side by side: before and after tuning."""
    every = list(result.reliance.values())
    found = [system for system in every if set(system.metrics) & set(RELIANCE_BARS[:-2])] or every
    systems = _before_and_after(found)
    shown = [m for m in RELIANCE_BARS if any(m in system.metrics for system in systems)]
    if not shown:
        return []
    values = [[_bar(system.metrics.get(metric)) for system in systems] for metric in shown]
    names = [m.replace("_", " ") for m in shown]
    drawn = svg.bars(
        names, [s.title for s in systems], values, "Reliance on references and on the image"
    )
    caption = (
        "Reliance of each system with 95 % intervals. Lower is better for excess copying, "
        "over-reliance, follow rate and reference harm; higher for reference gain and image "
        "sensitivity."
    )
    return [(caption, drawn)]


def _bar(rate: Estimate | None) -> tuple[float, float | None, float | None] | None:
    return (rate.value, rate.low, rate.high) if rate and rate.value is not None else None


def _before_and_after(systems: Sequence[SystemReliance]) -> list[SystemReliance]:
    """As many systems as a chart can hold apart: of more, the last one of the first model
    (everything but the tuning) and the last ones."""
    if len(systems) <= MOST_LINES:
        return list(systems)
    before = [s for s in systems[: 1 - MOST_LINES] if s.model == systems[0].model][-1]
    return [before, *systems[1 - MOST_LINES :]]


def hubness(runs: Sequence[SystemRun]) -> list[Figure]:
    """How few references answer how many images."""
    series: list[tuple[str, list[tuple[float, float]]]] = []
    seen: set[str] = set()
    for run in runs:
        for domain, traces in by_domain(run.traces).items():
            rows = [t for t in one_per_image(traces) if t.hits]
            if not rows:
                continue
            used = [n for _, n in Counter(t.hits[0].id for t in rows).most_common()]
            shares = np.cumsum(used) / len(rows)
            key = f"{domain}{shares.tolist()}"
            if key not in seen:  # rows that share their retrieval draw one line
                seen.add(key)
                points = [((i + 1) / len(used), float(s)) for i, s in enumerate(shares)]
                series.append((f"{domain}, {run.title}", thin([(0.0, 0.0), *points], 60)))
    if not series:
        return []
    drawn = svg.lines(
        series[:MOST_LINES],
        "Hubness of retrieval",
        "share of the references that are ever first",
        "share of images served",
        unit=True,
        diagonal=True,
    )
    return [
        (
            "Share of images whose first reference is among the most used; on the dashed line "
            "every reference serves as many images as any other.",
            drawn,
        )
    ]


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` of the points, evenly, both ends kept."""
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.unique(np.linspace(0, len(points) - 1, most).astype(int))]


def confusion_chart(runs: Sequence[SystemRun]) -> list[Figure]:
    """Truth against answer by domain of the last run that has closed questions."""
    asked = [r for r in runs if r.of_task("vqa_closed")]
    if not asked:
        return []
    blocks = []
    for domain, traces in list(by_domain(asked[-1].of_task("vqa_closed")).items())[:MOST_LINES]:
        cells: Counter[tuple[str, str]] = Counter((target_of(t), label_of(t)) for t in traces)
        table = [[cells[side, answer] for answer in LABELS] for side in ("yes", "no")]
        blocks.append((domain, table))
    drawn = svg.counts(
        blocks,
        ("truth yes", "truth no"),
        [f"said {answer}" if answer != "unclear" else answer for answer in LABELS],
        "Confusion of closed questions by domain",
    )
    return [
        (
            f"{asked[-1].title}: truth against answer by domain (strict parser); the darker, the "
            "larger the share of its line.",
            drawn,
        )
    ]


def training(curves: Mapping[str, Path]) -> list[Figure]:
    """Curves of logged trainings: losses, then rewards and accuracies."""
    out = []
    for name, file in curves.items():
        rows = read_log(file)
        for what, wanted in (
            ("loss", ("loss", "eval_loss", "train_loss", "val_loss")),
            ("accuracy", ("rewards/accuracies", "accuracy", "val_accuracy", "recall@1")),
            ("margin", ("rewards/margins",)),
        ):
            series = [
                (key, thin(points, 120)) for key in wanted if len(points := _series(rows, key)) > 1
            ]
            if series:
                drawn = svg.lines(series, f"{name}: {what}", "step", what)
                out.append((f"Training of {name}: {what} by step.", drawn))
    return out


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (float(r["step"]), float(r[key]))
        for r in rows
        if isinstance(r.get("step"), int | float) and isinstance(r.get(key), int | float)
    ]


def read_log(file: Path) -> list[dict[str, Any]]:
    """Rows of a training log: JSON Lines, or ``log_history`` of a trainer_state.json."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found = json.loads(text)
            rows = found.get("log_history", []) if isinstance(found, dict) else found
        else:
            rows = [json.loads(row) for row in text.splitlines() if row.strip()]
    except (OSError, ValueError) as error:
        log.warning("%s: training curve left out: %s", file, error)
        return []
    return [row for row in rows if isinstance(row, dict)]


LOGS = ("training_log.jsonl", "log.jsonl", "history.jsonl", "trainer_state.json")


def find_curves(runs: Sequence[SystemRun]) -> dict[str, Path]:
    """Training logs beside the models that the runs' configurations name."""
    found: dict[str, Path] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)
        elif isinstance(value, str) and value and len(value) < 500:
            try:
                folder = located(value)
            except UserError:  # an embedded model that this installation lacks
                return
            for name in LOGS:
                if folder.name not in found and (folder / name).is_file():
                    found[folder.name] = folder / name

    for run in runs:
        visit(run.config.get("system"))
    return dict(sorted(found.items()))
