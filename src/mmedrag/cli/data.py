"""``mmedrag data``: make, import, check and count DATA folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import ANY, FOLDER, Call, command

FORMATS = ("manifest", "released", "llava", "vqa", "table", "dicom")


@click.group("data")
def noun() -> None:
    """Make, import, check and count data folders."""


@command("phantom", group=noun, settings=True)
@click.argument("out", type=FOLDER)
@click.option("--studies", type=click.IntRange(1), default=200, help="Studies per domain.")
@click.option("--domain", "domains", multiple=True, help="Repeatable; default: every domain.")
@click.option("--size", type=click.IntRange(32), help="Picture side in pixels.")
@click.option("--twins", type=click.Choice(["image", "report"]), help="Add twins of test studies.")
def phantom(
    call: Call,
    out: Path,
    studies: int,
    domains: tuple[str, ...],
    size: int | None,
    twins: str | None,
) -> None:
    """Draw the benchmark: images, reports, questions and exact truth in OUT.

    Twins are the same studies with one finding flipped in the image, or in the report, only.
    Other knobs are settings, such as --set similarity=0.9 --set prior=natural.
    """
    from dataclasses import asdict

    from mmedrag.phantom.build import build
    from mmedrag.phantom.sample import Knobs

    knobs = asdict(call.settings(Knobs, size=size))
    rows = build(
        out, studies=studies, domains=domains or None, seed=call.seed, twins=twins,
        progress=call.progress("studies"), **knobs,
    )  # fmt: skip
    call.finish({"out": out, **rows})


@command("import", group=noun, settings=True)
@click.argument("format")
@click.argument("src", type=ANY)
@click.argument("out", type=FOLDER)
@click.option("--image-root", type=FOLDER, help="Folder that image paths start from.")
def import_(call: Call, format: str, src: Path, out: Path, image_root: Path | None) -> None:
    """Import SRC, in FORMAT, into the data folder OUT.

    FORMAT is manifest, released, llava, vqa, table, dicom, or package.module:function. A bad
    row goes to OUT/rejected.jsonl and never stops the others. Other options of a format are
    settings, such as --set domain=radiology.
    """
    from mmedrag.datasets import import_data

    options: dict[str, Any] = call.rest()
    shares = options.pop("shares", None)
    result = import_data(
        format, src, out, seed=call.seed, shares=shares, image_root=image_root,
        progress=call.progress("rows"), **options,
    )  # fmt: skip
    call.finish(result.to_dict(), ok=not result.rejected)
