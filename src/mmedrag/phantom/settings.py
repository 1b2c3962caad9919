"""What can be turned of the benchmark (recipe table ``[phantom]``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmedrag.runtime import Settings, setting


@dataclass(frozen=True)
class Knobs(Settings):
    """What can be turned; all have the default of the shipped benchmark."""

    table = "phantom"

    size: int = setting(128, "Picture side in pixels.", minimum=32)
    prevalence: float = setting(1.0, "Multiplies every finding's own prevalence.", minimum=0)
    similarity: float = setting(
        0.75,
        "Probability that a finding is the phenotype's own: how much a similar-looking case says.",
        minimum=0,
        maximum=1,
    )
    contrast: float = setting(0.55, "How clearly findings stand out in the picture.")
    noise: float = setting(1.0, "Multiplies the domain's pixel noise.", minimum=0)
    omission: float = setting(
        0.6, "Share of absent findings that a report leaves unsaid.", minimum=0, maximum=1
    )
    hedging: float = setting(
        0.1, "Share of findings that a report states with reservation.", minimum=0, maximum=1
    )
    report_errors: float = setting(0.0, "Share of findings misreported.", minimum=0, maximum=1)
    prior: Literal["balanced", "natural"] = setting("balanced", "Answers of closed questions.")
    closed: int = setting(4, "Closed questions per study.", minimum=0)
    open: int = setting(1, "Open questions per study.", minimum=0)
