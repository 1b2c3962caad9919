"""``mmedrag domain``: which domain an image belongs to."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command


@click.group("domain")
def noun() -> None:
    """Identify domains, and measure how well that works."""


@command("predict", table="domain", group=noun, settings=True)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="File to write (JSON Lines).")
@click.option("--model", default="embedded:domain", show_default=True, help="Domain model.")
@click.option("--split", help="Only rows of this split.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def predict(
    call: Call, data: Path, out: Path, model: str, split: str | None, device: str | None
) -> None:
    """Write the domain of every row of DATA that has an image, with confidence."""
    from collections import Counter

    from mmedrag.domain import open_domain, predict_domain
    from mmedrag.runs import write_rows
    from mmedrag.types import DataFolder

    rows = predict_domain(DataFolder(data), open_domain(model, device), split)
    write_rows(out, rows)
    call.finish({"out": out, "rows": len(rows), "labels": dict(Counter(r["label"] for r in rows))})
