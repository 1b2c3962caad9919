"""``mmedrag ablation``: the demo's table for a user's own system and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import FOLDER, Call, command, with_system


@command("ablation", settings=True)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@with_system
@click.option("--split", help="Of the examples  [default: test]")
@click.option("--studies", type=click.IntRange(0), help="Per domain; 0, the default: all.")
@click.option("--generic", metavar="DIR", help="Index over all domains, for naive retrieval.")
def noun(
    call: Call,
    data: Path,
    out: Path,
    split: str | None,
    studies: int | None,
    generic: str | None,
    **flags: Any,
) -> None:
    """Base model to full method on DATA: runs, metrics and an HTML report in OUT.

    The recipe's table [ablation] names the adapters. Finished rows stand: the same command goes
    on where it was interrupted. A row whose parts are not here is named, and left out.
    """
    from mmedrag.experiments import AblationSettings, ablate, headline
    from mmedrag.runtime import DataFolder

    settings = call.settings(AblationSettings, split=split, studies=studies, generic=generic)
    made = ablate(call.system(flags), DataFolder(data), out, settings, call.seed, call.progresses())
    call.finish(made.to_json(), headline(made), ok=not made.failed)
