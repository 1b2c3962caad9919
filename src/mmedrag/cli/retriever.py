"""``mmedrag retriever``: how well a retriever finds, and which of its references to keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mmedrag.cli.common import FILE, FOLDER, Call, command, count, lines
from mmedrag.retrieval import RetrieverTraining

FINDINGS = (
    "TOML of findings (domain, finding = phrases) that the labeller of reports without ground "
    "truth looks for too."
)


def agreement_lines(result: Mapping[str, Any]) -> str:
    """A result for people, with a line a finding for how far the best references agree."""
    rest = {key: value for key, value in result.items() if key != "finding_agreement"}
    out = [lines(rest)]
    for domain, found in result.get("finding_agreement", {}).items():
        out.append(
            f"agreement of the best reference, {domain}: {found.cases} cases, {found.corpus} "
            f"corpus studies, read by {found.labeller}; 0.5 says nothing"
        )
        for name, cell in (*found.findings.items(), ("mean", found.mean)):
            out.append(
                f"  {name}: {_cell(cell)}, n {cell.n}, present {cell.present}, "
                f"shuffled {_cell(cell.shuffled)}"
            )
    return "\n".join(out)


def _cell(cell: Any) -> str:
    value, low, high = ("-" if v is None else f"{v:.3f}" for v in (cell.value, cell.low, cell.high))
    return f"{value} [{low}, {high}]"


@click.group("retriever")
def noun() -> None:
    """Measure and calibrate a retriever; train one with `train retriever`."""


@command("eval", table="retriever", group=noun, shares=RetrieverTraining)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--retriever", default="embedded", show_default=True, help="Encoder to measure.")
@click.option("--domain", help="Only rows of this domain.")
@click.option(
    "--split", multiple=True, default=["test"], show_default=True, help="Queries. Repeatable."
)
@click.option("--gallery-split", default="train", show_default=True, help="References.")
@click.option(
    "--key",
    type=click.Choice(["text", "image"]),
    default="text",
    show_default=True,
    help="What of the references a picture is compared with.",
)
@click.option("--findings", type=FILE, help=FINDINGS)
@click.option("--no-untrained", is_flag=True, help="Skip the encoder with random weights.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def eval_(
    call: Call,
    data: tuple[Path, ...],
    retriever: str,
    domain: str | None,
    split: tuple[str, ...],
    gallery_split: str,
    key: str,
    findings: Path | None,
    no_untrained: bool,
    device: str | None,
) -> None:
    """Recall, MRR, nDCG, agreement and hubness, beside chance, shuffled and untrained."""
    from mmedrag.evaluation import evaluate_retriever, load_keywords
    from mmedrag.runtime import DataFolder

    folders = [DataFolder(path) for path in data]
    result = evaluate_retriever(
        folders,
        retriever,
        domain,
        split,
        gallery_split,
        untrained=not no_untrained,
        device=device,
        seed=call.seed,
        key=key,
        keywords=load_keywords(findings),
    )
    call.finish(result, agreement_lines(result))


@command("calibrate", table="retriever", group=noun)
@click.argument("index", type=FOLDER)
@click.argument("data", type=FOLDER, nargs=-1, required=True)
@click.option("--precision", type=float, required=True, help="Share of kept ones that must agree.")
@click.option(
    "--rule",
    default="calibrated",
    show_default=True,
    help="log_ratio, top1_ratio, fixed_k, score_floor or calibrated: whose parameter is fitted.",
)
@click.option("--split", default="val", show_default=True, help="Pictures to fit and check on.")
@click.option("--k", type=click.IntRange(1), default=8, show_default=True, help="Per picture.")
@click.option(
    "--level",
    type=float,
    default=0.75,
    show_default=True,
    help="Agreement from which a reference counts: of findings, else the Jaccard index of labels.",
)
@click.option("--out", type=FILE, help="Recipe to write, for --config.")
@click.option("--retriever", help="The index's encoder, unless it is a shipped one.")
@click.option("--device", help="cpu, cuda, ...; default: a GPU if there is one.")
def calibrate(
    call: Call,
    index: Path,
    data: tuple[Path, ...],
    precision: float,
    rule: str,
    split: str,
    k: int,
    level: float,
    out: Path | None,
    retriever: str | None,
    device: str | None,
) -> None:
    """Fit the parameter of a selection rule for INDEX on pictures of DATA whose findings are known.

    Half of the patients are fitted, the others checked; their figure comes first. Use the result
    with --config RECIPE, or --rule NAME --set selection.PARAMETER=VALUE.
    """
    from mmedrag.evaluation import calibrate as calibration, fit_selection, write_recipe
    from mmedrag.retrieval import index_info, open_retriever
    from mmedrag.runtime import DataFolder

    folders, domain = [DataFolder(path) for path in data], index_info(index)["domain"]
    asked = [row for one in folders for row in one.corpus(split, domain)]
    what = f"rows with picture and text of split {split}, domain {domain or 'any'}"
    count([row for row in asked if row.images and row.text.strip()], what, folders)
    result = fit_selection(
        open_retriever(index, retriever, device), folders, precision, split, k, level, rule
    )
    reached = result[calibration.PARAMETERS[rule]] is not None
    if out:
        write_recipe(out, result)
        result["out"] = out
    call.finish(result, calibration.headline(result), ok=reached)
