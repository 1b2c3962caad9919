"""The HTML report: one self-contained file with tables, figures and a gallery of cases.

Place in the picture: the end of it. Run folders -> evaluation -> ``OUT/report.html``, with
``OUT/tables/*.csv`` and ``*.tex`` beside it. The page loads nothing from anywhere (a content
security policy in it says so), works without script, in dark mode, on paper and on a phone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmedrag.evaluation import Arm, evaluate, load_arms
from mmedrag.evaluation.metrics import RESAMPLES
from mmedrag.records import UserError
from mmedrag.report import gallery, tables, view
from mmedrag.report.view import Section
from mmedrag.runtime import DataFolder, write_text

log = logging.getLogger(__name__)


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    data: DataFolder | None = None,
    *,
    metrics: Mapping[str, Any] | str | Path | None = None,
    title: str = "Evaluation report",
    curves: Mapping[str, str | Path] | None = None,
    cases: int = 60,
    seed: int = 0,
    resamples: int = RESAMPLES,
    subgroups: Sequence[str] = (),
    note: str = "",
) -> Path:
    """Write ``out/report.html`` and its tables.

    Args:
        runs: run folders, as for :func:`mmedrag.evaluation.evaluate_runs.evaluate`.
        data: DATA folder for images and train controls; by default the one that the runs'
            ``config.json`` names, where it still exists.
        metrics: an evaluation of the same runs (its dict or its file); computed, and written to
            ``out/metrics.json``, when not given.
        curves: name -> training log; by default those beside the models that the runs name.
        cases: how many cases the gallery shows. note: what the page says first, such as the sample.

    Returns:
        The page's path.

    Raises:
        UserError: unreadable runs, or ``metrics`` of other runs.
    """
    out = Path(out)
    arms = load_arms(runs)
    data = data or data_of(arms)
    if metrics is None:
        out.mkdir(parents=True, exist_ok=True)
        result: Mapping[str, Any] = evaluate(
            runs,
            data,
            out=out / "metrics.json",
            seed=seed,
            resamples=resamples,
            subgroups=subgroups,
        )
    else:
        result = metrics if isinstance(metrics, Mapping) else read_metrics(Path(metrics))
    unknown = [a.name for a in arms if a.name not in result["runs"]]
    if unknown:
        raise UserError(f"metrics: no run {unknown[0]!r}, expected an evaluation of these runs")
    logs = {k: Path(v) for k, v in curves.items()} if curves else view.find_curves(arms)
    page = render(
        title=title,
        note=note,
        result=result,
        sections=sections(arms, result, logs),
        cases=gallery.cases([a for a in arms if a.plain] or arms, data, cases, seed),
    )
    return save(page, out)


def read_metrics(path: Path) -> dict[str, Any]:
    """A ``metrics.json`` of this package."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or "runs" not in found:
        raise UserError(f"{path}: no 'runs' in it, expected a metrics.json of mmedrag eval")
    return found


def data_of(arms: Sequence[Arm]) -> DataFolder | None:
    """The DATA folder whose examples.jsonl the runs' configurations name as input."""
    for arm in arms:
        named = arm.config.get("inputs")
        for path in map(Path, named if isinstance(named, Mapping) else ()):
            if path.name == "examples.jsonl" and path.is_file():
                return DataFolder(path.parent)
    return None


def sections(
    arms: Sequence[Arm], result: Mapping[str, Any], logs: Mapping[str, Path]
) -> list[Section]:
    """Every part of the page that has something to show, in reading order."""
    plain = [a for a in arms if a.plain]
    names, others = [a.name for a in plain], [a.name for a in arms if not a.plain]
    parts = []
    for task in tables.HEADLINE:
        found = tables.of_task(result, task)
        part = Section(f"scores-{task}", tables.TASK_NAMES[task])
        if any(name in found for name in names):
            part.figures = view.score_dots(result, task, names)
            part.tables = [
                tables.headline(result, task, names),
                tables.by_domain(result, task, names),
            ]
            part.details = [tables.controls(result, task, names)]
        if any(name in found for name in others):
            more = tables.headline(result, task, others, "-conditions")
            more.caption = f"{tables.TASK_NAMES[task]} under other conditions"
            part.details.append(more)
        parts.append(part)
    parts.append(
        Section(
            "reliance",
            "Reliance",
            "Does the answer come from the image or from the references?",
            view.reliance_bars(result),
            [],
            [tables.reliance(result)],
        )
    )
    parts.append(
        Section("comparisons", "Tests between rows", "", [], [], [tables.comparisons(result)])
    )
    parts.append(
        Section(
            "calibration",
            "Calibration and confusion",
            "",
            [*view.calibration(result), *view.confusion_chart(plain)],
            [],
            tables.classification(result),
        )
    )
    parts.append(
        Section(
            "retrieval",
            "Retrieval",
            "",
            [*view.similarity(plain), *view.hubness(plain)],
            [],
            tables.retrieval(result),
        )
    )
    parts.append(Section("training", "Training curves", "", view.training(logs)))
    parts.append(Section("subgroups", "Subgroups", "", [], [], [tables.subgroups(result)]))
    parts.append(Section("not-computed", "Not computed", "", [], [], [tables.not_computed(result)]))
    for part in parts:
        part.tables = [t for t in part.tables if t.rows]
        part.details = [t for t in part.details if t.rows]
    return [part for part in parts if part]


def render(
    title: str,
    note: str,
    result: Mapping[str, Any],
    sections: Sequence[Section],
    cases: Sequence[gallery.Case],
) -> tuple[str, list[tables.Table]]:
    """The page as HTML, and its tables."""
    from jinja2 import Environment, StrictUndefined

    here = files(__package__)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((here / "page.html").read_text(encoding="utf-8"))
    html = template.render(
        title=title,
        note=note,
        result=result,
        sections=sections,
        cases=cases,
        style=(here / "page.css").read_text(encoding="utf-8"),
        script=(here / "page.js").read_text(encoding="utf-8"),
        domains=sorted({c.domain for c in cases}),
        tasks=sorted({c.task for c in cases}),
        outcomes=sorted({o for c in cases for o in c.outcomes}),
    )
    return html, [t for s in sections for t in (*s.tables, *s.details)]


def save(page: tuple[str, Sequence[tables.Table]], out: Path) -> Path:
    """Write the page and its tables atomically; returns the page's path."""
    html, made = page
    folder = out / "tables"
    for table in made:
        write_text(folder / f"{table.id}.csv", table.csv())
        write_text(folder / f"{table.id}.tex", table.latex())
    write_text(out / "report.html", html)
    return out / "report.html"
