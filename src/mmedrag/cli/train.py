"""``mmedrag train``: the three trainings."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import ANY, FILE, FOLDER, Call, caution, command
from mmedrag.cli.options import options_of
from mmedrag.domain import DomainTraining
from mmedrag.preference.dpo import DpoTraining
from mmedrag.retrieval import RetrieverTraining


@click.group("train")
def noun() -> None:
    """Train the domain model, a domain's retriever, or an adapter by preference (RAG-PT)."""


@command("domain", settings=DomainTraining, group=noun)
@click.argument("data", type=FOLDER, nargs=-1)
@click.option("--out", type=FOLDER, required=True, help="Folder of the domain model.")
@click.option(
    "--encoder",
    default="embedded",
    show_default=True,
    help="Frozen encoder: a folder, hf:ID, hf-hub:ID, ...; none: picture statistics.",
)
@options_of(DomainTraining, "fine_tune")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
@click.option("--notice", help="What the model says with pictures it does not know.")
@click.option(
    "--prompts",
    type=FILE,
    help='Without DATA: zero-shot by a TOML file of texts, radiology = ["a chest X-ray", ...].',
)
def domain(
    call: Call,
    data: tuple[Path, ...],
    out: Path,
    encoder: str,
    device: str | None,
    notice: str | None,
    prompts: Path | None,
) -> None:
    """Train domain identification on the domains that DATA states (split train, fitted on val).

    With --prompts and no DATA nothing is trained: a picture gets the label whose texts its
    encoder finds nearest, and no picture is called unknown.
    """
    from mmedrag.domain import train_domain, zero_shot_from
    from mmedrag.records import UserError
    from mmedrag.runtime import DataFolder, launch

    if launch.rank():  # nothing to share: the first process does it
        return

    if bool(data) == bool(prompts):
        raise UserError("train domain: expected DATA folders, or --prompts without DATA")
    if prompts:
        call.finish({"out": out, **zero_shot_from(prompts, out, encoder, device)})
        return
    settings = call.settings(DomainTraining)
    folders = [DataFolder(path) for path in data]
    caution([encoder], (row.source for one in folders for row in one.corpus("train")))
    metrics = train_domain(
        folders, out, None if encoder == "none" else encoder, settings, device, notice=notice
    )
    call.finish({"out": out, **metrics})


@command("retriever", settings=RetrieverTraining, group=noun)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--domain", help="Domain to train on; without it every row is used.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the retriever (an encoder).")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
@click.option(
    "--tracker",
    type=click.Choice(["tensorboard", "wandb"]),
    help="Also write the curves there (TensorBoard: into OUT/logs).",
)
def retriever(
    call: Call,
    data: tuple[Path, ...],
    domain: str | None,
    out: Path,
    device: str | None,
    tracker: str | None,
) -> None:
    """Train a domain's image-text encoder on the corpus rows that have an image and a text.

    Hyper-parameters are settings: --config paper, --set encoder=hf-hub:ORG/NAME --set lr=1e-4.
    """
    from mmedrag.retrieval import open_tracker, train_retriever
    from mmedrag.runtime import DataFolder

    settings = call.settings(RetrieverTraining)
    folders = [DataFolder(path) for path in data]
    rows = [row.source for one in folders for row in one.corpus("train", domain)]
    caution([settings.encoder], rows)
    result = train_retriever(
        folders,
        out,
        domain,
        settings,
        device,
        open_tracker(tracker, out / "logs") if tracker else None,
        call.progress("steps"),
    )
    call.finish({"out": out, **result})


@command("dpo", settings=DpoTraining, group=noun)
@click.argument("pairs", type=ANY)
@click.option("--model", required=True, help="Model to tune: a folder, or embedded:vlm.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the adapter.")
@click.option("--init-adapter", help="Adapter of an earlier stage to go on from.")
@click.option(
    "--reference",
    type=click.Choice(["base", "init"]),
    default="base",
    help="What the policy is pulled to: the model, or the model with that adapter.",
)
@click.option("--data", type=FOLDER, help="DATA folder of the pairs, when it was moved.")
@click.option("--prepare-only", is_flag=True, help="Fill the caches and stop (sharded launches).")
def dpo(
    call: Call,
    pairs: Path,
    model: str,
    out: Path,
    init_adapter: str | None,
    reference: str,
    data: Path | None,
    prepare_only: bool,
) -> None:
    """Tune one adapter on preference PAIRS: two-image, two-prompt DPO.

    Hyper-parameters are settings: --config paper, --set beta=0.5 --set lora_r=16 ...
    """
    from mmedrag.embedded import located
    from mmedrag.preference.dpo import train_dpo
    from mmedrag.preference.pairs import read_pairs, sources_of

    settings, found = call.settings(DpoTraining), read_pairs(pairs, data)
    caution([model], sources_of(found))
    result = train_dpo(
        found,
        located(model),
        out,
        settings,
        init_adapter=located(init_adapter) if init_adapter else None,
        reference=reference,  # type: ignore[arg-type]
        prepare_only=prepare_only,
        progress=call.progress("steps"),
    )
    call.finish(result)
