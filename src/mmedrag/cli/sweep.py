"""``mmedrag sweep``: what retrieval is worth, against how good the references are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import FOLDER, Call, command
from mmedrag.cli.options import options_of
from mmedrag.experiments import SweepSettings


@command("sweep", settings=SweepSettings)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option(
    "--adapter",
    multiple=True,
    metavar="DIR",
    help="RAG-PT adapter that joins as a tuned row. Repeatable.",
)
@options_of(SweepSettings, "points", "seeds", "studies")
def noun(call: Call, out: Path, adapter: tuple[str, ...]) -> None:
    """Accuracy against reference agreement: rows, fuser and own report, as JSON, CSV and SVG.

    The embedded model on benchmarks of several similarities and regimes (table [sweep]). What is
    finished stands: the same command goes on, and further points or adapters join.
    """
    from mmedrag.experiments import run_sweep

    result = run_sweep(out, call.settings(SweepSettings), adapter, call.progresses())
    call.finish(result, _table(result, out))


def _table(result: dict[str, Any], out: Path) -> str:
    points = result["points"]
    titles = {name: row["title"] for point in points for name, row in point["rows"].items()}
    lines = ["accuracy of closed questions by agreement of the best reference, both with n"]
    for name, title in titles.items():
        lines.append(title)
        for point in points:
            if name in point["rows"]:
                cell, mean = point["rows"][name]["effects"]["accuracy"], point["agreement"]["mean"]
                lines.append(
                    f"  {point['point']:>8}: agreement {mean['value']:.3f} n={mean['n']}, "
                    f"accuracy {cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}] "
                    f"n={cell['n']}"
                )
    return "\n".join([*lines, f"figure: {out / 'sweep.svg'}"])
