"""``mmedrag index``: build, change and inspect the index of a domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import FOLDER, Call, caution, command


@click.group("index")
def noun() -> None:
    """Build, change and inspect the index of a domain."""


def _folders(paths: tuple[Path, ...]) -> list[Any]:
    from mmedrag.runtime import DataFolder

    return [DataFolder(path) for path in paths]


def _finish(call: Call, result: dict[str, Any]) -> None:
    refused = [row for row in result.get("skipped", []) if not row["reason"].startswith("no ")]
    call.finish(result, ok=not refused and not result.get("missing"))


@command("build", table="index", group=noun)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--domain", help="Domain to index; without it the index serves every domain.")
@click.option("--retriever", help="Encoder: a folder, embedded:NAME, hf:ID, hf-hub:ID, ...")
@click.option("--out", type=FOLDER, required=True, help="Index folder.")
@click.option("--split", default="train", show_default=True, help="Rows to take; all: every row.")
@click.option("--key", type=click.Choice(["text", "image"]), default="text", show_default=True)
@click.option("--engine", type=click.Choice(["auto", "flat", "ivf", "hnsw"]), default="auto")
@click.option("--recall", type=float, default=0.99, show_default=True, help="Of ivf and hnsw.")
@click.option("--views", type=click.Choice(["mean", "first"]), default="mean", show_default=True)
@click.option("--long-text", type=click.Choice(["window", "truncate"]), default="window")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def build(
    call: Call,
    data: tuple[Path, ...],
    domain: str | None,
    retriever: str | None,
    out: Path,
    split: str,
    **options: Any,
) -> None:
    """Encode the references of DATA into the index OUT.

    Without --retriever the embedded encoder of that domain is used, where there is one.
    """
    from mmedrag.embedded import retriever_of
    from mmedrag.retrieval import build_index

    folders, retriever = _folders(data), retriever or retriever_of(domain)
    chosen = None if split == "all" else split
    caution([retriever], (row.source for one in folders for row in one.corpus(chosen, domain)))
    _finish(
        call,
        build_index(
            folders,
            out,
            domain,
            retriever,
            split=chosen,
            progress=call.progress("references"),
            **options,
        ),
    )


@command("add", table="index", group=noun)
@click.argument("index", type=FOLDER)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--split", help="Default: the split the index was built from.")
@click.option("--retriever", help="The same encoder, unless it is a shipped one.")
def add(
    call: Call, index: Path, data: tuple[Path, ...], split: str | None, retriever: str | None
) -> None:
    """Add references of DATA; only content that was never seen is encoded."""
    from mmedrag.retrieval import add_to_index

    bar = call.progress("references")
    _finish(call, add_to_index(index, _folders(data), split, retriever, progress=bar))


@command("update", table="index", group=noun)
@click.argument("index", type=FOLDER)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--split", help="Default: the split the index was built from.")
@click.option("--retriever", help="The same encoder, unless it is a shipped one.")
def update(
    call: Call, index: Path, data: tuple[Path, ...], split: str | None, retriever: str | None
) -> None:
    """As add, and replace references whose content has changed."""
    from mmedrag.retrieval import update_index

    bar = call.progress("references")
    found = update_index(index, _folders(data), split=split, encoder=retriever, progress=bar)
    _finish(call, found)


@command("remove", table="index", group=noun)
@click.argument("index", type=FOLDER)
@click.option("--id", "ids", multiple=True, required=True, help="Repeatable; @FILE: one a line.")
def remove(call: Call, index: Path, ids: tuple[str, ...]) -> None:
    """Remove references by id."""
    from mmedrag.retrieval import remove_from_index

    _finish(call, remove_from_index(index, call.names(ids)))


@command("info", table="index", group=noun)
@click.argument("index", type=FOLDER)
def info(call: Call, index: Path) -> None:
    """Count, domain, encoder, dimension and engine."""
    from mmedrag.retrieval import index_info

    call.finish(index_info(index))


@command("verify", table="index", group=noun)
@click.argument("index", type=FOLDER)
def verify(call: Call, index: Path) -> None:
    """Check every file against the manifest; exit 1 when something is wrong."""
    from mmedrag.retrieval import verify_index

    findings = verify_index(index)
    text = "\n".join(findings) or f"{index}: sound"
    call.finish({"index": index, "sound": not findings, "findings": findings}, text, not findings)
