"""What can be turned of the benchmark (recipe table ``[phantom]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mmedrag.phantom.regimes import RegimeName, load_regime
from mmedrag.records import UserError
from mmedrag.runtime import Settings, setting


@dataclass(frozen=True)
class Knobs(Settings):
    """What can be turned; all have the default of the shipped benchmark.

    A regime other than ``uniform`` fixes ``similarity_of``, ``redraw``, ``even`` and
    ``appearance``; they then hold its values, so that who draws need not know of regimes.
    """

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
    regime: RegimeName = setting(
        "uniform", "How good similar cases are as references: fixed tables, see docs/benchmark.md."
    )
    similarity_of: Mapping[str, Mapping[str, float]] = setting(
        dict, "Domain to finding to its own similarity, where it is not that of all."
    )
    redraw: float = setting(
        0.2,
        "Probability that a finding is drawn anew at a patient's next visit.",
        minimum=0,
        maximum=1,
    )
    even: bool = setting(False, "A finding is typical of equally many phenotypes in every seed.")

    appearance: Mapping[str, Sequence[str]] = setting(
        dict, "Domain to the attributes that make a phenotype, where they are not all."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regime == "uniform":  # fixes nothing, and the command's help needs no table
            return
        regime = load_regime(self.regime)
        fixed = {
            "similarity": DEFAULTS["similarity"],
            "similarity_of": regime.similarity,
            "redraw": regime.redraw,
            "even": True,
            "appearance": regime.appearance,
        }
        for name, value in fixed.items():
            if getattr(self, name) not in (DEFAULTS[name], value):
                raise UserError(
                    f"phantom: {name}: regime {self.regime} fixes it, expected regime uniform"
                )
            object.__setattr__(self, name, value)

    def similar(self, domain: str, finding: str) -> float:
        """Probability that a patient has this finding as the phenotype has it."""
        return self.similarity_of.get(domain, {}).get(finding, self.similarity)

    def turned(self) -> dict[str, Any]:
        """All knobs as JSON data, without the later ones (``LATER``) that stand at their default:
        a build that uses none of them says what it always said."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in found.items() if k not in LATER or v != DEFAULTS[k]}


LATER = ("regime", "similarity_of", "redraw", "even", "appearance")
DEFAULTS = vars(Knobs())
