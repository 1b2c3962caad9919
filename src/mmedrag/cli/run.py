"""``mmedrag run``: a data folder through the system, into a run folder."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, DefaultGroup, command, with_system
from mmedrag.cli.options import options_of
from mmedrag.pipeline import RunSettings


@click.group("run", cls=DefaultGroup)
def noun() -> None:
    """Answer every example of a data folder: `run DATA --out RUN`; merge the shards of a run."""


noun.default = "batch"  # type: ignore[attr-defined]


@command("batch", table="run", settings=RunSettings, group=noun)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Run folder.")
@with_system
@click.option("--no-rag", is_flag=True, help="The same as --references none.")
@options_of(RunSettings, "references", "noise", "split", "task", "domain", "limit", "ids", "shard")
def batch(call: Call, data: Path, out: Path, no_rag: bool) -> None:
    """Answer every example of DATA into the run folder OUT (traces.jsonl, config.json).

    Stopped at any moment, the same command goes on and ends with the same bytes.
    """
    from mmedrag.pipeline import Pool, choose, run_examples, system
    from mmedrag.records import UserError
    from mmedrag.runtime import DataFolder

    given = call.given.get(RunSettings, {})
    if no_rag and given.get("references", "none") != "none":
        raise UserError(f"--no-rag and --references {given['references']} exclude each other")
    settings = call.settings(
        RunSettings,
        references="none" if no_rag else None,
        ids=call.names(given.get("ids", ())) or None,
    )
    folder = DataFolder(data)
    references_used = settings.references != "none"
    parts = call.system(references_used)
    pool = Pool.of(folder, call.seed)
    parts.caution((row.source for row in choose(pool.examples, settings)), answers=True)
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
        pool,
    )
    call.finish(result, ok=not (result["failed"] or result.get("nothing")))


@command("merge", table="run", group=noun)
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Run folder of the whole.")
@click.option(
    "--mixed",
    is_flag=True,
    help="Take shards of different versions, devices or dtypes; OUT/config.json says which.",
)
def merge(call: Call, runs: tuple[Path, ...], out: Path, mixed: bool) -> None:
    """Put the shards of one run together."""
    from mmedrag.pipeline import merge as merge_runs

    result = merge_runs(runs, out, mixed)
    call.finish(result, ok=not result["failed"])
