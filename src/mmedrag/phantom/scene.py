"""What a drawing needs of a study: what is there, how plainly it shows, and named randomness.

``rng(name)`` gives independent numbers per part, so that a finding can be switched without
moving anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from mmedrag.phantom.canvas import Canvas, Rng
from mmedrag.phantom.grammar import DomainSpec, Findings, has


@dataclass
class Scene:
    """A study while it is drawn on a canvas. ``contrast`` scales how plainly findings show.

    The drawings give by grade how strong a finding is (``STRENGTHS``), between which factors
    patients differ in it (``SPREAD``), the ending of the name of that draw (``DRAW``), and
    whether contrast is part of strength (``CONTRASTED``).
    """

    domain: DomainSpec
    canvas: Canvas
    findings: Findings
    attributes: Mapping[str, str]
    rng: Callable[[str], Rng]
    contrast: float

    STRENGTHS: ClassVar[dict[str | None, float]] = {
        "mild": 0.6,
        "moderate": 0.85,
        "severe": 1.1,
        None: 0.9,
    }
    SPREAD: ClassVar[tuple[float, float]] = (0.9, 1.1)
    DRAW: ClassVar[str] = ""
    CONTRASTED: ClassVar[bool] = False

    def has(self, name: str, side: str | None = None) -> bool:
        return has(self.domain, self.findings[name], side)

    def strength(self, name: str, side: str | None = None) -> float:
        """How strong a finding is on a side; 0 when absent."""
        if not self.has(name, side):
            return 0.0
        factor = self.rng(f"{name}/{side}{self.DRAW}").uniform(*self.SPREAD)
        gain = self.contrast if self.CONTRASTED else 1.0
        return gain * self.STRENGTHS[self.findings[name].severity] * factor

    def count(self, name: str) -> int:
        return self.findings[name].count or 1
