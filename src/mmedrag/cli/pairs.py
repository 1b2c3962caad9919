"""``mmedrag pairs``: preference pairs from traces; import and export."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import ANY, FILE, FOLDER, Call, DefaultGroup, command, with_system
from mmedrag.cli.options import options_of
from mmedrag.preference.pairs import PairSettings


@click.group("pairs", cls=DefaultGroup)
def noun() -> None:
    """Preference pairs: `pairs DATA --out PAIRS`; import and export other formats."""


noun.default = "build"  # type: ignore[attr-defined]


@command("build", table="pairs", settings=PairSettings, group=noun)
@click.argument("data", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="PAIRS folder.")
@with_system
@options_of(PairSettings, "mode", "kinds", "noise", "split", "task", "limit")
@click.option(
    "--held-out", type=FOLDER, multiple=True, help="Further trained folders (train_ids.jsonl)."
)
def build(call: Call, data: Path, out: Path, held_out: tuple[Path, ...]) -> None:
    """Answer DATA under four conditions and build preference pairs from the answers.

    No pair comes from test patients, from what the retrievers were trained on (the
    train_ids.jsonl of their folders), or from the training data of the --held-out folders.
    """
    from mmedrag.pipeline import system
    from mmedrag.preference.pairs import make_pairs
    from mmedrag.runtime import DataFolder

    settings, folder = call.settings(PairSettings), DataFolder(data)
    parts = call.system()
    result = make_pairs(
        lambda: system.build_pipeline(parts, seed=call.seed),
        folder,
        out,
        settings,
        call.seed,
        parts,
        held_out,
        call.progress("examples"),
    )
    call.finish(result, ok=not (result["failed"] or result.get("nothing")))


@command("import", table="pairs", group=noun)
@click.argument("src", type=FILE)
@click.option("--out", type=FOLDER, required=True, help="PAIRS folder.")
@click.option("--images", type=FOLDER, help="Folder that the rows' image paths start from.")
@click.option("--resist", type=int, help="How many rows without noise are resist, if known.")
def import_(call: Call, src: Path, out: Path, images: Path | None, resist: int | None) -> None:
    """Read released, TRL, ms-swift or LLaMA-Factory rows; faults are listed, none is hidden.

    What `pairs export` wrote is read with --images DATA.
    """
    from mmedrag.data.formats import import_pairs
    from mmedrag.preference.pairs import write_pairs

    found, faults = import_pairs(src, images, resist, call.seed)
    write_pairs(found, out, images or src.parent, {"imported": str(src)})
    listed = [str(fault) for fault in faults]
    text = "\n".join([*listed, f"{len(found.pairs)} pairs, {len(faults)} faults, written to {out}"])
    call.finish({"out": out, **found.counts, "faults": listed}, text, ok=not faults)


@command("export", table="pairs", group=noun)
@click.argument("pairs", type=ANY)
@click.option("--format", type=click.Choice(["released", "ms-swift", "trl"]), required=True)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option("--data", type=FOLDER, help="DATA folder, when it was moved.")
@click.option(
    "--noise-size",
    type=click.IntRange(8),
    default=336,
    show_default=True,
    help="Side of the noise images that ms-swift rows need.",
)
def export(
    call: Call, pairs: Path, format: str, out: Path, data: Path | None, noise_size: int
) -> None:
    """Write pairs for other trainers; what a format cannot say is refused with the reason."""
    from mmedrag.preference.pairs import export_pairs, read_pairs

    result = export_pairs(read_pairs(pairs, data), out, format, noise_size)
    call.finish(result, ok=not result["refused"])
