"""``mmedrag retrieve``: the references of every example, without answering."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command, with_system
from mmedrag.cli.options import options_of
from mmedrag.cli.retriever import FINDINGS, agreement_lines
from mmedrag.pipeline import RunSettings


@command("retrieve")
@click.argument("data", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="File to write (JSON Lines).")
@with_system
@click.option("--format", type=click.Choice(["native", "released"]), default="native")
@options_of(RunSettings, "split", "task", "limit")
@click.option(
    "--views",
    type=click.Choice(["mean", "first"]),
    default="mean",
    help="Of several images: the mean of their embeddings, or the first (released).",
)
@click.option(
    "--where",
    metavar="KEY=VALUE",
    multiple=True,
    help="Only references with this patient, source, split or domain, or dated from=, to= (ISO). "
    "Repeatable; values of one key are alternatives.",
)
@click.option(
    "--near",
    type=click.IntRange(-1, 64),
    default=2,
    show_default=True,
    help="References whose image differs in at most so many bits of 64 are left out; -1: none.",
)
@click.option("--findings", type=FILE, help=FINDINGS)
@click.option("--keep-own", is_flag=True, help="Also references of the own patient or image.")
def noun(
    call: Call,
    data: Path,
    out: Path,
    format: str,
    views: str,
    where: tuple[str, ...],
    near: int,
    findings: Path | None,
    keep_own: bool,
) -> None:
    """Write the hits and the selection of every example of DATA to OUT.

    References of the same patient, of the same image, or of one that looks the same are left out
    and counted. How far the best references agree with the cases is printed beside.
    """
    from mmedrag.evaluation import load_keywords, reference_agreement
    from mmedrag.pipeline import choose, retrieve_examples, system
    from mmedrag.retrieval import Exclusion, Filter, Retriever
    from mmedrag.runtime import DataFolder

    keywords, folder = load_keywords(findings), DataFolder(data)
    parts = call.system()
    examples = choose(folder.examples(), call.settings(RunSettings))
    parts.caution(row.source for row in examples)
    looks_alike = None if keep_own or near < 0 else near
    pipeline = system.build_pipeline(
        parts,
        answers=False,
        views=views,
        where=Filter.parse(where),
        exclude=Exclusion(patient=not keep_own, image=not keep_own, near=looks_alike),
    )
    tops: list[str | None] = []
    result = retrieve_examples(pipeline, examples, out, format, call.progress("examples"), tops)
    indexed = {n: r for n, r in pipeline.retrievers.items() if isinstance(r, Retriever)}
    sizes = {name: len(retriever.index) for name, retriever in indexed.items()}
    corpus = lambda domain: sizes.get(domain, sum(sizes.values()))  # noqa: E731
    found = reference_agreement([folder], examples, tops, corpus, keywords, call.seed)
    if found:
        result["finding_agreement"] = found
    named = {"kept": "references kept per row", "excluded": "references left out in all"}
    shown = agreement_lines({named.get(key, key): value for key, value in result.items()})
    call.finish(result, shown, ok=not (result["failed"] or result.get("nothing")))
