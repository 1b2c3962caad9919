"""``mmedrag run``: a data folder through the system, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import FOLDER, Call, DefaultGroup, command, with_system


@click.group("run", cls=DefaultGroup)
def noun() -> None:
    """Answer every example of a data folder: `run DATA --out RUN`; merge the shards of a run."""


noun.default = "batch"  # type: ignore[attr-defined]


@command("batch", table="run", group=noun, settings=True)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Run folder.")
@with_system
@click.option("--no-rag", is_flag=True, help="The same as --references none.")
@click.option(
    "--references",
    metavar="MODE",
    help="none, all, selected, shuffled, random, contradicting or own.",
)
@click.option(
    "--noise",
    metavar="KIND",
    help="gaussian_clip, additive, blank, other_patient or shuffle_patches.",
)
@click.option("--split", help="Only examples of this split.")
@click.option("--task", type=click.Choice(["vqa", "report"]), help="Only this task.")
@click.option("--only-domain", help="Only examples whose data states this domain.")
@click.option("--limit", type=click.IntRange(1), help="At most so many examples.")
@click.option("--ids", multiple=True, help="Repeatable or comma-separated; @FILE: one a line.")
@click.option("--shard", metavar="I/N", help="Only the i-th of n parts; put together by run merge.")
def batch(
    call: Call,
    data: Path,
    out: Path,
    no_rag: bool,
    references: str | None,
    noise: str | None,
    split: str | None,
    task: str | None,
    only_domain: str | None,
    limit: int | None,
    ids: tuple[str, ...],
    shard: str | None,
    **flags: Any,
) -> None:
    """Answer every example of DATA into the run folder OUT (traces.jsonl, config.json).

    Stopped at any moment, the same command goes on and ends with the same bytes.
    """
    from mmedrag.pipeline import RunSettings, run_examples, system
    from mmedrag.records import UserError
    from mmedrag.runtime import DataFolder

    if no_rag and references not in (None, "none"):
        raise UserError(f"--no-rag and --references {references} exclude each other")
    settings = call.settings(
        RunSettings,
        references="none" if no_rag else references,
        noise=noise,
        split=split,
        task=task,
        domain=only_domain,
        limit=limit,
        ids=call.names(ids) or None,
        shard=shard,
    )
    folder = DataFolder(data)
    references_used = settings.references != "none"
    parts = call.system(flags, references_used)
    pipeline = system.build_pipeline(parts, references=references_used, seed=call.seed)
    result = run_examples(
        pipeline,
        folder,
        out,
        settings,
        call.seed,
        parts.describe(),
        parts.inputs(),
        call.progress("examples"),
    )
    call.finish(result, ok=not result["failed"])


@command("merge", table="run", group=noun)
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Run folder of the whole.")
def merge(call: Call, runs: tuple[Path, ...], out: Path) -> None:
    """Put the shards of one run together."""
    from mmedrag.pipeline import merge as merge_runs

    result = merge_runs(runs, out)
    call.finish(result, ok=not result["failed"])
