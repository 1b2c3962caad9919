"""``mmedrag ablation``: the demo's table for a user's own system and data."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command, with_system
from mmedrag.cli.options import options_of
from mmedrag.experiments import AblationSettings


@command("ablation", settings=AblationSettings)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@with_system
@options_of(AblationSettings, "split", "studies", "generic")
def noun(call: Call, data: Path, out: Path) -> None:
    """Base model to full method on DATA: runs, metrics and an HTML report in OUT.

    The recipe's table [ablation] names the adapters. Finished rows stand: the same command goes
    on where it was interrupted. A row whose parts are not here is named, and left out.
    """
    from mmedrag.experiments import ablate, headline
    from mmedrag.pipeline import missing
    from mmedrag.runtime import DataFolder

    settings = call.settings(AblationSettings)
    made = ablate(call.system(), DataFolder(data), out, settings, call.seed, call.progresses())
    folders = sorted(path.parent for path in (out / "runs").glob("*/*/traces.jsonl"))
    lacking = missing(folders, index=True)
    call.finish(made.to_json(), headline(made), ok=not (made.failed or lacking.get("nothing")))
