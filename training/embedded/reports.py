"""Reports that name other findings: what the regimes' retrievers are trained on.

A picture's report keeps what it says of appearance and of chosen findings; what it says of the
others is another patient's. Who is trained on such reports looks for the former alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mmedrag.phantom import DOMAINS, Knobs, load_domain, load_regime, report, studies
from mmedrag.records import Reference
from mmedrag.runtime import DataFolder

PATTERN = 0.7  # agreement that only pattern findings aim at


def pattern(domain: str) -> set[str]:
    """The pattern findings of a domain in regime ``strong``."""
    aims = load_regime("strong").agreement[domain]
    return {finding for finding, aim in aims.items() if aim > PATTERN}


class OtherReports(DataFolder):
    """A benchmark of regime ``uniform`` with such reports. No patient of it is ever tested on, so
    that its test patients are trained on too.

    Args:
        path: where ``build_benchmark`` drew ``count`` studies a domain from ``seed``.
        kept: domain -> the findings of which the report says the truth; none where absent.
        wordings: reports of a study, each in other words and with another patient's rest.
    """

    def __init__(
        self,
        path: Path,
        seed: int,
        count: int,
        kept: Mapping[str, Collection[str]],
        wordings: int = 3,
    ) -> None:
        super().__init__(path)
        self.seed, self.count, self.kept, self.wordings = seed, count, kept, wordings

    @cached_property
    def told(self) -> Mapping[str, Sequence[str]]:
        """study -> its reports."""
        found: dict[str, list[str]] = {}
        for name in DOMAINS:
            domain, kept, knobs = load_domain(name), self.kept.get(name, ()), Knobs()
            everyone = list(studies(domain, self.count, self.seed, knobs))
            for n, study in enumerate(everyone):
                for number in range(1, self.wordings + 1):
                    # studies of a patient stand together: far along the row is somebody else
                    step = number * len(everyone) // (self.wordings + 1)
                    other = everyone[(n + step) % len(everyone)]
                    mixed = {f: (study if f in kept else other).findings[f] for f in domain.by_name}
                    told = replace(study, findings=mixed, key=f"{study.key}/{number}")
                    found.setdefault(study.id, []).append(report(domain, told, knobs))
        return found

    def corpus(self, split: str | None = None, domain: str | None = None) -> list[Reference]:
        held = split == "val"
        rows = [r for r in super().corpus(None, domain) if (r.split == "val") == held]
        return [
            row.model_copy(update={"id": f"{row.id}-{n}", "text": text})
            for row in rows
            for n, text in enumerate(self.told[row.id][: 1 if held else None])
        ]
