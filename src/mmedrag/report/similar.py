"""The page of `demo --real`: similar cases with their pictures, and how far they agree.

Place in the picture: beside ``write``, whose style sheet it shares. One self-contained file that
loads nothing and needs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from mmedrag.records import Reference
from mmedrag.report.gallery import thumbnail
from mmedrag.runtime import write_text

COLUMNS = {
    "value": "best",
    "top5": "mean of five",
    "random": "chance",
    "shuffled": "shuffled pictures",
}
LONGEST = 240  # characters of a text that a card shows


class Neighbour(Protocol):
    row: Reference
    score: float


class Case(Protocol):
    row: Reference
    identified: Mapping[str, Any] | None
    nearest: Sequence[Any]  # of Neighbour


class Demo(Protocol):
    """What :func:`write_similar` draws; made by ``experiments.run_real_demo``."""

    pictures: int
    domains: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    identified: dict[str, dict[str, int]]
    trained_on: int
    cases: Any  # domain -> list of Case


def write_similar(demo: Demo, page: Path) -> None:
    """Write ``page`` (over an earlier one of ours only)."""
    from jinja2 import Environment, StrictUndefined

    here = files(__package__)
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((here / "similar.html").read_text(encoding="utf-8"))
    done: dict[Path, str] = {}
    html = template.render(
        demo=demo,
        answers=sorted({label for counts in demo.identified.values() for label in counts}),
        columns=COLUMNS,
        style=(here / "page.css").read_text(encoding="utf-8"),
        picture=lambda row: thumbnail(row.images[0], done),
        said=said,
        spoken=spoken,
        sources=sources([case for cases in demo.cases.values() for case in cases]),
    )
    write_text(page, html, own=True)


def spoken(name: str) -> str:
    """``same_organ`` in words."""
    if name == "label_jaccard":
        return "all labels (Jaccard index)"
    if name == "text_overlap":
        return "words of the texts (Jaccard index)"
    return name.removeprefix("same_").replace("_", " ") + ", the same"


def said(row: Reference) -> str:
    """What a row tells of its picture: its text, shortened."""
    text = " ".join(row.text.split())
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"


def sources(cases: Sequence[Case]) -> list[str]:
    """Attribution and licence of every picture on the page, each once."""
    rows = [row for case in cases for row in (case.row, *(near.row for near in case.nearest))]
    told = {f"{r.attribution or r.source} ({r.licence or 'licence not stated'})" for r in rows}
    return sorted(line for line in told if not line.startswith("None"))
