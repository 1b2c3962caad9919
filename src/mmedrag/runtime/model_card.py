"""The model card: ``README.md`` of every folder that a training writes, in one form.

Place in the picture: the end of every training. A card says what the model is, what was measured on
it, how it was made and of which rows, and that it is not a medical device. Its head (YAML between
``---``) is the one that model hubs read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedrag.runtime.files import write_text

NAME = "README.md"
NOTICE = "Research software, not a medical device."


@dataclass(frozen=True)
class Figures:
    """A table of measured values with the sentence that says on what they were measured."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def lines(self) -> list[str]:
        shown = [[_cell(value) for value in row] for row in self.rows]
        return [self.caption, "", *table(self.head, shown), ""]


@dataclass(frozen=True)
class ModelCard:
    """What a model card says.

    Args:
        title: heading. what: what the model is and what it was made of, in a sentence or two.
        facts: further single statements. figures: what was measured.
        settings: name → value of every setting.
        training_rows: the file that lists them, or what draws them again.
        licence: licence and attribution of weights or data, where one is asked for.
        head: keys of the card's YAML head, as hubs know them (``library_name``, ``tags``).
    """

    title: str
    what: str
    facts: Sequence[str] = ()
    figures: Sequence[Figures] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    training_rows: str = "`train_ids.jsonl`"
    licence: str = ""
    head: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        out: list[str] = []
        if self.head:
            out += ["---", *(f"{key}: {value}" for key, value in self.head.items()), "---", ""]
        out += [f"# {self.title}", "", f"{self.what} {NOTICE}", ""]
        out += [f"- {fact}" for fact in (*self.facts, f"Training rows: {self.training_rows}")]
        out += [f"- Licence: {self.licence}"] if self.licence else []
        out.append("")
        for part in self.figures:
            out += part.lines()
        if self.settings:
            rows = [[name, str(value)] for name, value in self.settings.items()]
            out += [*table(["setting", "value"], rows), ""]
        return "\n".join(out)

    def write(self, folder: str | Path) -> None:
        write_text(Path(folder) / NAME, self.text())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in r] for r in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
