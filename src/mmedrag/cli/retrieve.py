"""``mmedrag retrieve``: the references of every example, without answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command, with_system


@command("retrieve")
@click.argument("data", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="File to write (JSON Lines).")
@with_system
@click.option("--format", type=click.Choice(["native", "released"]), default="native")
@click.option("--split", help="Only examples of this split.")
@click.option("--task", type=click.Choice(["vqa", "report"]), help="Only this task.")
@click.option("--limit", type=click.IntRange(1), help="At most so many examples.")
@click.option(
    "--views",
    type=click.Choice(["mean", "first"]),
    default="mean",
    help="Of several images: the mean of their embeddings, or the first (released).",
)
def noun(
    call: Call, data: Path, out: Path, format: str, split: str | None, task: str | None,
    limit: int | None, views: str, **flags: Any,
) -> None:  # fmt: skip
    """Write the hits and the selection of every example of DATA to OUT."""
    from mmedrag import system
    from mmedrag.retrieve import retrieve
    from mmedrag.run import RunSettings, choose
    from mmedrag.types import DataFolder

    chosen = RunSettings(split=split, task=task, limit=limit)
    examples = choose(DataFolder(data).examples(), chosen)
    pipeline = system.build(call.system(flags), answers=False, views=views)
    result = retrieve(pipeline, examples, out, format, call.progress("examples"))
    call.finish(result, ok=not result["failed"])
