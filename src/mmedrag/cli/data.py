"""``mmedrag data``: make, import, check and count DATA folders."""

from __future__ import annotations

from pathlib import Path

import click

from mmedrag.cli.common import FOLDER, Call, command


@click.group("data")
def noun() -> None:
    """Make, import, check and count data folders."""


@command("phantom", group=noun, settings=True)
@click.argument("out", type=FOLDER)
@click.option("--studies", type=click.IntRange(1), default=200, show_default=True,
              help="Studies per domain.")  # fmt: skip
@click.option("--domain", "domains", multiple=True, help="Repeatable; default: every domain.")
@click.option("--size", type=click.IntRange(32), help="Picture side in pixels.")
@click.option("--twins", type=click.Choice(["image", "report"]),
              help="Counterfactual twins of the test studies, flipped in this part only.")  # fmt: skip
def phantom(
    call: Call,
    out: Path,
    studies: int,
    domains: tuple[str, ...],
    size: int | None,
    twins: str | None,
) -> None:
    """Draw the benchmark: images, reports, questions and exact truth in OUT.

    Other knobs are settings, such as --set similarity=0.9 --set prior=natural.
    """
    from dataclasses import asdict

    from mmedrag.phantom.build import build
    from mmedrag.phantom.sample import Knobs

    knobs = asdict(call.settings(Knobs, size=size))
    rows = build(
        out, studies=studies, domains=domains or None, seed=call.seed, twins=twins,
        progress=call.progress("studies"), **knobs,
    )  # fmt: skip
    call.finish({"out": out, **rows})
