"""``mmedrag domain``: which domain an image belongs to."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command, count
from mmedrag.domain import DomainTraining

ENCODER = click.option(
    "--domain-encoder",
    metavar="DIR|SPEC",
    help="Encoder of the domain model, where it is one of your own.",
)


@click.group("domain")
def noun() -> None:
    """Identify domains, and measure how well that works."""


@command("predict", table="domain", group=noun, shares=DomainTraining)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="File to write (JSON Lines).")
@click.option("--model", default="embedded:domain", show_default=True, help="Domain model.")
@ENCODER
@click.option("--split", help="Only rows of this split.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def predict(
    call: Call,
    data: Path,
    out: Path,
    model: str,
    domain_encoder: str | None,
    split: str | None,
    device: str | None,
) -> None:
    """Write the domain of every row of DATA that has an image, with confidence."""
    from collections import Counter

    from mmedrag.domain import open_domain, predict_domain
    from mmedrag.runtime import DataFolder, check_own, write_jsonl

    check_own(out)
    folder = DataFolder(data)
    pictured = [r for r in [*folder.corpus(split), *folder.examples(split)] if r.images]
    count(pictured, f"rows with a picture of split {split or 'any'}", [folder])
    rows = predict_domain(folder, open_domain(model, device, domain_encoder), split)
    write_jsonl(out, rows, own=True)
    call.finish({"out": out, "rows": len(rows), "labels": dict(Counter(r["label"] for r in rows))})


@command("eval", table="domain", group=noun, shares=DomainTraining)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--model", default="embedded:domain", show_default=True, help="Domain model.")
@ENCODER
@click.option("--split", default="test", show_default=True, help="Rows to measure on.")
@click.option("--no-outliers", is_flag=True, help="Skip pictures that belong to no domain.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def eval_(
    call: Call,
    data: tuple[Path, ...],
    model: str,
    domain_encoder: str | None,
    split: str,
    no_outliers: bool,
    device: str | None,
) -> None:
    """Accuracy, recall, calibration, unknown pictures, and accuracy on sources left out."""
    from mmedrag.domain import labelled_rows, open_domain
    from mmedrag.evaluation import evaluate_domain
    from mmedrag.runtime import DataFolder

    folders = [DataFolder(path) for path in data]
    what = f"pictures whose domain is stated, of split {split}"
    count(labelled_rows(folders, split), what, folders)
    opened = open_domain(model, device, domain_encoder)
    call.finish(evaluate_domain(opened, folders, split, outliers=not no_outliers, seed=call.seed))
