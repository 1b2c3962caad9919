"""What an import did: counts, what is doubtful, and whether it found anything at all.

Place in the picture: beside the writer, which fills it; ``data import`` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANY = 0.1  # share of absent pictures from which on a warning is due


@dataclass
class ImportResult:
    """What an import did. ``exit_code`` is 1 when a row was refused or nothing was found."""

    out: str
    format: str
    examples: int = 0
    corpus: int = 0
    pairs: int = 0
    truth: int = 0  # studies whose findings are known exactly
    rejected: int = 0
    images: int = 0
    missing_images: int = 0  # named by a row, but not there: such a row lacks a view, or all
    questions_without_image: int = 0  # their rows name none
    splits: dict[str, int] = field(default_factory=dict)  # examples and corpus rows
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # what was refused and why, to be shown
    nothing: str | None = None  # why the import found nothing of what it was for
    warning: str | None = None  # much is missing

    @property
    def exit_code(self) -> int:
        return 1 if self.rejected or self.nothing else 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exit_code": self.exit_code}

    def pictures(self, missing: Mapping[str, str], rows: Sequence[Any], bare: list[str]) -> None:
        """Say which pictures are not there.

        Args:
            missing: name of a picture → where it was looked for, "" for nowhere.
            rows: all examples, corpus rows and pairs. bare: places of questions without a picture.
        """
        self.missing_images, self.questions_without_image = len(missing), len(bare)
        sought = {name: place for name, place in missing.items() if place}
        lacking = [row for row in rows if row.meta.get("missing_images")]
        if missing:
            # a pair's picture is that of its sides
            some = sum(bool(getattr(getattr(row, "chosen", row), "image", None)) for row in lacking)
            kept = f", {some} keep their other views" if some else ""
            asked = "" if sought else "; nobody said where they are (--image-root)"
            self.notes.append(
                f"{len(missing)} images are not there: {len(lacking) - some} rows are text-only"
                f"{kept} (meta.missing_images names them){asked}"
            )
        if bare:
            self.notes.append(f"{len(bare)} questions whose rows name no image: {first(bare)}")
        if sought:
            name, place = next(iter(sought.items()))
            words = f"of {len(sought) + self.images} images that rows name"
            why = f"{name!r:.100} and others are not below {place:.200}"
            if not self.images:
                above = [Path(root).parent for root in place.split(", ")]
                there = next((root for root in above if (root / name).is_file()), None)
                hint = (
                    f"--image-root {there} has it" if there else "--image-root names their folder"
                )
                self.nothing = f"none {words} was found: {why}; {hint}"
            elif len(sought) > MANY * (len(sought) + self.images):
                self.warning = f"{len(sought)} {words} are not there: {why}"
        if not (rows or self.rejected):
            self.nothing = "no row was found"
        elif bare and not self.images and not missing:
            self.nothing = f"no image in {len(bare)} questions: their rows name none"


def first(places: Sequence[str], most: int = 5) -> str:
    return ", ".join(places[:most]) + (", …" if len(places) > most else "")
