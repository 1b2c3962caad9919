"""``mmedrag report``: run folders to one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command


@command("report")
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Folder of report.html and its tables.")
@click.option("--data", type=FOLDER, help="DATA folder; default: the one the runs name.")
@click.option("--metrics", type=FILE, help="metrics.json of the same runs; else it is computed.")
@click.option("--title", default="Evaluation report", show_default=True, help="Of the page.")
@click.option(
    "--cases",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="How many cases the gallery shows.",
)
@click.option("--subgroup", "subgroups", multiple=True, help="Repeatable: source, meta.sex, ...")
def noun(
    call: Call,
    runs: tuple[Path, ...],
    out: Path,
    data: Path | None,
    metrics: Path | None,
    title: str,
    cases: int,
    subgroups: tuple[str, ...],
) -> None:
    """Write OUT/report.html from run folders, with tables as CSV and LaTeX beside it."""
    from mmedrag.pipeline import missing
    from mmedrag.report import write_report
    from mmedrag.runtime import DataFolder, check_own

    check_own(out / "report.html", out / "metrics.json")
    page = write_report(
        runs,
        out,
        DataFolder(data) if data else None,
        metrics=metrics,
        title=title,
        cases=cases,
        seed=call.seed,
        subgroups=subgroups,
    )
    call.finish({"out": out, "page": page}, ok=not missing(runs).get("nothing"))
