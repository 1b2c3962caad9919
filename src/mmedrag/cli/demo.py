"""``mmedrag demo``: the main job on the embedded system, from base model to the full method."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@command("demo")
@click.option("--out", type=FOLDER, default="demo", show_default=True, help="Folder to write.")
@click.option("--studies", type=click.IntRange(1), help="Test studies per domain  [default: 10]")
@click.option("--full", is_flag=True, help="Every test study, and RAG-PT with two sets of pairs.")
def noun(call: Call, out: Path, studies: int | None, full: bool) -> None:
    """Three domains, base model to full ablation, metrics and an HTML report.

    Finished rows stand: the same command goes on where it was interrupted.
    """
    from mmedrag.experiments import STUDIES, headline, run_demo

    few = studies or (0 if full else STUDIES)
    made = run_demo(out, few, call.seed, pairwise=full, progress=call.progresses())
    call.finish(made.to_json(), headline(made), ok=not made.failed)
