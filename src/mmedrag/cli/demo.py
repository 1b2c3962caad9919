"""``mmedrag demo``: the main job on the embedded system, or similar cases of a user's pictures."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@command("demo")
@click.option("--out", type=FOLDER, default="demo", show_default=True, help="Folder to write.")
@click.option("--studies", type=click.IntRange(1), help="Test studies per domain  [default: 10]")
@click.option("--full", is_flag=True, help="Every test study, and RAG-PT with two sets of pairs.")
@click.option(
    "--real",
    type=FOLDER,
    multiple=True,
    metavar="DATA",
    help="Similar cases of the pictures of this DATA folder instead (extra real). Repeatable.",
)
def noun(call: Call, out: Path, studies: int | None, full: bool, real: tuple[Path, ...]) -> None:
    """Three domains, base model to full ablation, metrics and an HTML report.

    With --real: an index per domain of your own pictures, their similar cases, and how far these
    agree, on one page. Finished steps stand: the same command goes on where it was interrupted.
    """
    if real and (studies or full):
        raise click.UsageError("--real takes neither --studies nor --full")
    from mmedrag.experiments import STUDIES, headline, run_demo, run_real_demo

    if real:
        found = run_real_demo(real, out, call.seed, call.progresses())
        call.finish(found.to_json(), found.headline())
        return
    few = studies or (0 if full else STUDIES)
    made = run_demo(out, few, call.seed, pairwise=full, progress=call.progresses())
    call.finish(made.to_json(), headline(made), ok=not made.failed)
