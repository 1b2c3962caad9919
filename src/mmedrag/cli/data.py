"""``mmedrag data``: make, import, check and count DATA folders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import ANY, FILE, FOLDER, Call, command, lines
from mmedrag.cli.options import options_of
from mmedrag.phantom import Knobs

log = logging.getLogger(__name__)
REFUSALS = 20  # refused rows that are printed; the file and --json have all


@click.group("data")
def noun() -> None:
    """Make, import, check and count data folders."""


@command("phantom", settings=Knobs, group=noun)
@click.argument("out", type=FOLDER)
@click.option("--studies", type=click.IntRange(1), default=200, help="Studies per domain.")
@click.option("--domain", "domains", multiple=True, help="Repeatable; default: every domain.")
@options_of(Knobs, "size", "regime")
@click.option("--twins", type=click.Choice(["image", "report"]), help="Add twins of test studies.")
def phantom(
    call: Call, out: Path, studies: int, domains: tuple[str, ...], twins: str | None
) -> None:
    """Draw the benchmark: images, reports, questions and exact truth in OUT.

    Twins are the same studies with one finding flipped in the image, or in the report, only.
    Other knobs are settings, such as --set similarity=0.9 --set prior=natural. OUT/benchmark.json
    says how far the references of a similar case shall agree with the case, and do.
    """
    from mmedrag.phantom import build_benchmark

    rows = build_benchmark(
        out,
        studies=studies,
        domains=domains or None,
        seed=call.seed,
        twins=twins,
        progress=call.progress("studies"),
        **call.settings(Knobs).turned(),
    )
    call.finish({"out": out, **rows})


@command("import", group=noun, open_table=True)
@click.argument("format")
@click.argument("src", type=ANY)
@click.argument("out", type=FOLDER)
@click.option(
    "--image-root",
    "roots",
    type=FOLDER,
    multiple=True,
    help="Folder that image paths start from. Repeatable.",
)
@click.option(
    "--column",
    "column",
    metavar="NAME=SOURCE",
    multiple=True,
    help="table: which column is id, image, text, question, answer, ... "
    "Repeatable; NAME= for none.",
)
def import_(
    call: Call, format: str, src: Path, out: Path, roots: tuple[Path, ...], column: tuple[str, ...]
) -> None:
    """Import SRC, in FORMAT, into the data folder OUT.

    FORMAT is manifest, released, llava, vqa, table, dicom, data (joins the data folders below
    SRC), or package.module:function. A bad row goes to OUT/rejected.jsonl and never stops the
    others. Other options of a format are settings, such as --set domain=radiology.
    """
    from mmedrag.data import import_data

    options: dict[str, Any] = call.rest()
    if column:
        options["columns"] = {**(options.get("columns") or {}), **_columns(column)}
    if roots:
        options["image_root"] = _roots(roots)
    shares = options.pop("shares", None)
    result = import_data(
        format, src, out, seed=call.seed, shares=shares, progress=call.progress("rows"), **options
    )
    found = result.to_dict()
    found["rows by split"] = found.pop("splits")  # questions, reports to write, and references
    shown = [f"refused: {reason}" for reason in found.pop("refusals")]
    if len(shown) > REFUSALS:
        more = f"{len(shown) - REFUSALS} more are in {out / 'rejected.jsonl'}"
        shown = [*shown[:REFUSALS], more]
    notes = [f"note: {note}" for note in found.pop("notes")]
    if warning := found.pop("warning"):
        log.warning(warning)
    if nothing := found.pop("nothing"):
        log.error("error: %s", nothing)
    text = "\n".join([*shown, lines(found), *notes])
    call.finish(result.to_dict(), text, ok=not result.exit_code)


def _roots(given: tuple[Path, ...]) -> Path | list[Path] | None:
    """One folder as itself: a mapping or a single root of a recipe is of another kind."""
    return None if not given else given[0] if len(given) == 1 else list(given)


def _columns(given: tuple[str, ...]) -> dict[str, list[str]]:
    """``NAME=SOURCE`` → {name: sources}; a name given again takes one more column."""
    found: dict[str, list[str]] = {}
    for one in given:
        name, sign, source = one.partition("=")
        if not sign or not name:
            raise click.UsageError(f"--column: got {one!r}, expected NAME=SOURCE")
        found.setdefault(name, []).append(source)
    return found


@command("check", table="data", group=noun)
@click.argument("data", type=ANY, nargs=-1, required=True)
@click.option("--html", type=FILE, help="Also write a page with thumbnails of the worst.")
@click.option(
    "--image-root",
    type=FOLDER,
    multiple=True,
    help="Where images of released files lie. Repeatable.",
)
@click.option("--no-images", is_flag=True, help="Leave pictures unread: rows and texts only.")
@click.option(
    "--most",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Findings of one kind that are listed; totals count all.",
)
def check(
    call: Call,
    data: tuple[Path, ...],
    html: Path | None,
    image_root: tuple[Path, ...],
    no_images: bool,
    most: int,
) -> None:
    """Find leakage, wrong or damaged images, duplicates and doubtful rows, with file and line.

    DATA are data folders or released files; several are also checked against each other.
    """
    from mmedrag.data import check as check_data
    from mmedrag.data.checks import FINDINGS

    report = check_data(
        data,
        html=html,
        image_root=_roots(image_root),
        images=not no_images,
        most=most,
        progress=call.progress("rows and images"),
    )
    shown = [str(finding) for finding in report.findings]
    shown += [f"{FINDINGS[code][0]} {code}: {count}" for code, count in report.totals.items()]
    shown += [
        f"{b.source} {b.split or ''}: always yes {b.yes:.3f}, always no {b.no:.3f}, "
        f"question only {b.question_only:.3f} (n={b.n})"
        for b in report.baselines
    ] + report.notes
    warnings = report.total("warning")
    text = "\n".join(
        [*shown, f"{sum(report.rows.values())} rows, {report.errors} errors, {warnings} warnings"]
    )
    call.finish(report.to_dict(), text, ok=not report.errors)


@command("stats", table="data", group=noun)
@click.argument("data", type=FOLDER)
def stats(call: Call, data: Path) -> None:
    """Count rows by split, domain, source and task, with patients, images and baselines."""
    from mmedrag.data import stats as count

    call.finish(count(data))


@command("export", table="data", group=noun)
@click.argument("data", type=FOLDER)
@click.argument("out", type=FOLDER)
def export(call: Call, data: Path, out: Path) -> None:
    """Write DATA back in the released formats."""
    from mmedrag.data import export_released

    call.finish(export_released(data, out))
