"""``mmedrag demo``: the main job on the embedded system, from base model to the full method."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@command("demo")
@click.option("--out", type=FOLDER, default="demo", show_default=True, help="Folder to write.")
@click.option(
    "--studies", type=click.IntRange(1), default=24, show_default=True, help="Per domain."
)
@click.option("--full", is_flag=True, help="Every test study, and each RAG-PT set alone.")
def noun(call: Call, out: Path, studies: int, full: bool) -> None:
    """Three domains, base model to full ablation, metrics and an HTML report.

    Finished rows stand: the same command goes on where it was interrupted.
    """
    from mmedrag.ablation import demo, headline

    bars: dict = {}

    def progress(row: str, done: int, total: int) -> None:
        bars.setdefault(row, call.progress(row))(done, total)

    result = demo(out, None if full else studies, call.seed, sets=full, progress=progress)
    call.finish(result, headline(result))
