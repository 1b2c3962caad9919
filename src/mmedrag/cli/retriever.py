"""``mmedrag retriever``: how well a retriever finds."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@click.group("retriever")
def noun() -> None:
    """Measure a retriever; train one with `train retriever`."""


@command("eval", table="retriever", group=noun, settings=True)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--retriever", default="embedded", show_default=True, help="Encoder to measure.")
@click.option("--domain", help="Only rows of this domain.")
@click.option("--split", default="test", show_default=True, help="Queries.")
@click.option("--gallery-split", default="train", show_default=True, help="References.")
@click.option("--no-untrained", is_flag=True, help="Skip the encoder with random weights.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def eval_(
    call: Call, data: tuple[Path, ...], retriever: str, domain: str | None, split: str,
    gallery_split: str, no_untrained: bool, device: str | None,
) -> None:  # fmt: skip
    """Recall, MRR, nDCG, agreement and hubness, beside chance, shuffled and untrained."""
    from mmedrag.retrieval_eval import evaluate_retriever
    from mmedrag.types import DataFolder

    folders = [DataFolder(path) for path in data]
    call.finish(
        evaluate_retriever(
            folders, retriever, domain, split, gallery_split, untrained=not no_untrained,
            device=device, seed=call.seed,
        )
    )  # fmt: skip
