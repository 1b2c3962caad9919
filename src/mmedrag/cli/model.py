"""``mmedrag model``: LLaVA layouts to Hugging Face folders, adapters to merged weights."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@click.group("model")
def noun() -> None:
    """Convert LLaVA-Med layouts, merge adapters, describe models."""


@command("convert", table="model", group=noun)
@click.argument("src", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--vision-tower", help="Folder or hub id of the CLIP tower that SRC only names.")
@click.option(
    "--chat",
    type=click.Choice(["mistral_instruct", "vicuna_v1"]),
    help="Chat template; default: by the language model.",
)
@click.option("--download", is_flag=True, help="Allow the vision tower to be downloaded.")
def convert(
    call: Call, src: Path, out: Path, vision_tower: str | None, chat: str | None, download: bool
) -> None:
    """Turn a LLaVA-Med-1.5, LLaVA-1.5 or LLaVA-Med-1.0 folder into a Hugging Face folder."""
    from mmedrag.models import convert_checkpoint

    call.finish(
        vars(convert_checkpoint(src, out, vision_tower, chat, local_files_only=not download))
    )


@command("merge", table="model", group=noun)
@click.argument("model", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--dtype", default="keep", show_default=True, help="Of the merged weights.")
def merge(call: Call, model: Path, adapter: Path, out: Path, dtype: str) -> None:
    """Fold ADAPTER, and the projector it may have trained, into the weights of MODEL."""
    from mmedrag.embedded import located
    from mmedrag.models import merge_adapter as merge_adapter

    call.finish({"out": out, **merge_adapter(located(str(model)), adapter, out, dtype)})


@command("info", table="model", group=noun)
@click.argument("model", type=FOLDER)
def info(call: Call, model: Path) -> None:
    """What a model or adapter folder is, read from its small files."""
    from mmedrag.embedded import located
    from mmedrag.models import model_info as describe

    call.finish(describe(located(str(model))))


@command("calibrate", table="model", group=noun)
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--model", type=FOLDER, help="Model folder to write the threshold into.")
@click.option(
    "--accuracy",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="That answers above the threshold shall reach.",
)
def calibrate(call: Call, runs: tuple[Path, ...], model: Path | None, accuracy: float) -> None:
    """Fit, on runs over validation data, the confidence below which `ask` abstains."""
    from mmedrag.pipeline import SIDECAR, interactive
    from mmedrag.records import UserError
    from mmedrag.runtime import read_json, write_json

    if model and (path := model / SIDECAR).exists() and "min_confidence" not in read_json(path):
        raise UserError(f"{path}: not a fitted threshold of ours; move it away")
    fitted = interactive.fit_abstention(runs, accuracy)
    if model and fitted["min_confidence"] is not None:
        write_json(model / SIDECAR, fitted)
    call.finish(fitted, ok=fitted["min_confidence"] is not None)
