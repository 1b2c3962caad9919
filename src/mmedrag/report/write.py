"""The HTML report: one self-contained file with tables, figures and a gallery of cases.

Place in the picture: the end of it. Run folders -> evaluation -> ``OUT/report.html``, with
``OUT/tables/*.csv`` and ``*.tex`` beside it. The page loads nothing from anywhere (a content
security policy in it says so), works without script, in dark mode, on paper and on a phone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from mmedrag.evaluation import EvaluationResult, SystemRun, evaluate, load_runs
from mmedrag.evaluation.metrics import RESAMPLES
from mmedrag.records import UserError
from mmedrag.report import gallery, tables, view
from mmedrag.report.view import Section
from mmedrag.runtime import DataFolder, check_own, write_text

log = logging.getLogger(__name__)


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    data: DataFolder | None = None,
    *,
    metrics: EvaluationResult | str | Path | None = None,
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
        metrics: an evaluation of the same runs (or its file); computed, and written to
            ``out/metrics.json``, when not given.
        curves: name -> training log; by default those beside the models that the runs name.
        cases: how many cases the gallery shows. note: what the page says first, such as the sample.

    Returns:
        The page's path.

    Raises:
        UserError: unreadable runs, or ``metrics`` of other runs.
    """
    out = Path(out)
    systems = load_runs(runs)
    data = data or data_of(systems)
    if metrics is None:
        out.mkdir(parents=True, exist_ok=True)
        result = evaluate(
            runs,
            data,
            out=out / "metrics.json",
            seed=seed,
            resamples=resamples,
            subgroups=subgroups,
        )
    elif isinstance(metrics, EvaluationResult):
        result = metrics
    else:
        result = EvaluationResult.read(metrics)
    unknown = [run.name for run in systems if run.name not in result.runs]
    if unknown:
        raise UserError(f"metrics: no run {unknown[0]!r}, expected an evaluation of these runs")
    logs = {k: Path(v) for k, v in curves.items()} if curves else view.find_curves(systems)
    shown = [run for run in systems if run.plain] or systems
    page = render(
        title=title,
        note=note,
        result=result,
        sections=sections(systems, result, logs),
        cases=gallery.cases(shown, data, cases, seed),
    )
    return save(page, out)


def data_of(runs: Sequence[SystemRun]) -> DataFolder | None:
    """The DATA folder whose examples.jsonl the runs' configurations name as input."""
    for run in runs:
        named = run.config.get("inputs")
        for path in map(Path, named if isinstance(named, Mapping) else ()):
            if path.name == "examples.jsonl" and path.is_file():
                return DataFolder(path.parent)
    return None


def sections(
    runs: Sequence[SystemRun], result: EvaluationResult, logs: Mapping[str, Path]
) -> list[Section]:
    """Every part of the page that has something to show, in reading order."""
    plain = [run for run in runs if run.plain]
    others = [run.name for run in runs if not run.plain]
    parts = [_scores(result, task, [r.name for r in plain], others) for task in tables.HEADLINE]
    parts += [
        Section(
            "reliance",
            "Reliance",
            "Does the answer come from the image or from the references?",
            view.reliance_bars(result),
            details=[tables.reliance(result)],
        ),
        Section("comparisons", "Tests between rows", details=[tables.comparisons(result)]),
        Section(
            "calibration",
            "Calibration and confusion",
            figures=[*view.calibration(result), *view.confusion_chart(plain)],
            details=tables.classification(result),
        ),
        Section(
            "retrieval",
            "Retrieval",
            figures=[*view.similarity(plain), *view.hubness(plain)],
            details=tables.retrieval(result),
        ),
        Section("training", "Training curves", figures=view.training(logs)),
        Section("subgroups", "Subgroups", details=[tables.subgroups(result)]),
        Section("not-computed", "Not computed", details=[tables.not_computed(result)]),
    ]
    for part in parts:
        part.tables = [t for t in part.tables if t.rows]
        part.details = [t for t in part.details if t.rows]
    return [part for part in parts if part]


def _scores(
    result: EvaluationResult, task: str, plain: Sequence[str], others: Sequence[str]
) -> Section:
    """The scores of one task: of the plain rows, folded away those of other conditions."""
    found = result.of_task(task)
    part = Section(f"scores-{task}", tables.TASK_NAMES[task])
    if any(name in found for name in plain):
        part.figures = view.score_dots(result, task, plain)
        part.tables = [tables.headline(result, task, plain), tables.by_domain(result, task, plain)]
        part.details = [tables.controls(result, task, plain)]
    if any(name in found for name in others):
        more = tables.headline(result, task, others, "-conditions")
        more.caption = f"{tables.TASK_NAMES[task]} under other conditions"
        part.details.append(more)
    return part


def render(
    title: str,
    note: str,
    result: EvaluationResult,
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
    files = [folder / f"{table.id}.{kind}" for table in made for kind in ("csv", "tex")]
    check_own(out / "report.html", *files)
    for table in made:
        write_text(folder / f"{table.id}.csv", table.csv(), own=True)
        write_text(folder / f"{table.id}.tex", table.latex(), own=True)
    write_text(out / "report.html", html, own=True)
    return out / "report.html"
