"""``mmedrag repro``: published and own numbers, re-derived and judged."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@command("repro")
@click.option("--check", is_flag=True, help="Judge every row (also done without this flag).")
@click.option("--no-write", is_flag=True, help="Leave docs/reproduce.md and the results alone.")
@click.option("--row", "rows", multiple=True, help="Only this row of the matrix; repeatable.")
@click.option("--root", type=FOLDER, default=".", show_default=True, help="The checkout.")
@click.option("--released", type=FOLDER, help="Clone of the released repository, with history.")
@click.option("--demo", type=FOLDER, help="Output of `mmedrag demo`.")
@click.option("--adopt", is_flag=True, help="First write repro/ablation.toml from --demo.")
def noun(
    call: Call,
    check: bool,
    no_write: bool,
    rows: tuple[str, ...],
    root: Path,
    released: Path | None,
    demo: Path | None,
    adopt: bool,
) -> None:
    """Run the matrix: OK, near, FAIL or no data per row; exit 1 if one fails or none ran."""
    from mmedrag.experiments import adopt as adopt_demo, run_matrix

    if adopt:
        if demo is None or not demo.is_dir():
            raise click.UsageError("--adopt needs --demo, the output folder of `mmedrag demo`")
        adopt_demo(demo, root / "repro" / "ablation.toml")
    folders = {"released": released, "demo": demo}
    report = run_matrix(
        root, rows, {name: at for name, at in folders.items() if at} or None, write=not no_write
    )
    call.finish(report.as_dict(), "\n".join(report.lines()), ok=not report.failed)
