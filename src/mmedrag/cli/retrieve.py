"""``mmedrag retrieve``: the references of every example, without answering."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command, lines, with_system
from mmedrag.cli.options import options_of
from mmedrag.pipeline import RunSettings


@command("retrieve")
@click.argument("data", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="File to write (JSON Lines).")
@with_system
@click.option("--format", type=click.Choice(["native", "released"]), default="native")
@options_of(RunSettings, "split", "task", "limit")
@click.option(
    "--views",
    type=click.Choice(["mean", "first"]),
    default="mean",
    help="Of several images: the mean of their embeddings, or the first (released).",
)
@click.option(
    "--where",
    metavar="KEY=VALUE",
    multiple=True,
    help="Only references with this patient, source, split or domain, or dated from=, to= (ISO). "
    "Repeatable; values of one key are alternatives.",
)
@click.option(
    "--near",
    type=click.IntRange(-1, 64),
    default=2,
    show_default=True,
    help="References whose image differs in at most so many bits of 64 are left out; -1: none.",
)
@click.option("--keep-own", is_flag=True, help="Also references of the own patient or image.")
def noun(
    call: Call,
    data: Path,
    out: Path,
    format: str,
    views: str,
    where: tuple[str, ...],
    near: int,
    keep_own: bool,
) -> None:
    """Write the hits and the selection of every example of DATA to OUT.

    References of the same patient, of the same image, or of one that looks the same are left out
    and counted.
    """
    from mmedrag.pipeline import choose, retrieve_examples, system
    from mmedrag.retrieval import Exclusion, Filter
    from mmedrag.runtime import DataFolder

    parts = call.system()
    examples = choose(DataFolder(data).examples(), call.settings(RunSettings))
    parts.caution(row.source for row in examples)
    looks_alike = None if keep_own or near < 0 else near
    pipeline = system.build_pipeline(
        parts,
        answers=False,
        views=views,
        where=Filter.parse(where),
        exclude=Exclusion(patient=not keep_own, image=not keep_own, near=looks_alike),
    )
    result = retrieve_examples(pipeline, examples, out, format, call.progress("examples"))
    named = {"kept": "references kept per row", "excluded": "references left out in all"}
    shown = lines({named.get(key, key): value for key, value in result.items()})
    call.finish(result, shown, ok=not (result["failed"] or result.get("nothing")))
