"""Under which circumstances a question is asked: which references, and how the image is degraded.

Place in the picture: Trace × {clean, noise} × {with, without references}. One small type and four
named conditions that runs, pairs, reliance and controls share. ``references`` is one of

- ``none`` · ``all`` · ``selected``: the pipeline's own hits;
- ``shuffled``: the hits of another example of the same domain and another patient;
- ``random``: random corpus rows of the domain, with the scores of the example's own hits, so
  that a rule keeps as many of them;
- ``own``: the report of the very study (corpus row with the same ``meta.study``);
- ``contradicting``: a report that states the opposite of the truth about the asked finding
  (benchmark only: ``truth.jsonl`` and ``meta.finding``);
- ``shown``: what is retrieved for the picture as it is shown, degraded or not; the other modes
  retrieve for the clean one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from mmedrag.records.records import Trace
from mmedrag.records.vocabulary import NoiseKind, ReferenceMode, UserError

REFERENCES: tuple[str, ...] = get_args(ReferenceMode)
WITH_REFERENCES = ("selected", "all")  # the system's own references, by preference
NOISES: tuple[str, ...] = get_args(NoiseKind)
UNSPECIFIED = "unspecified"  # of a trace that says "noise" and not which


@dataclass(frozen=True)
class ConditionSpec:
    """One condition for all rows: a references mode and, maybe, a noise kind with parameters.

    Example::

        ConditionSpec("none", "blank").slug == "noise"

    Raises:
        UserError: an unknown mode or kind (the known ones are listed).
    """

    references: str = "selected"
    noise: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.references not in REFERENCES:
            known = ", ".join(REFERENCES)
            raise UserError(f"references: got {self.references!r}, expected one of {known}")
        if self.noise not in (None, UNSPECIFIED, *NOISES):
            raise UserError(f"noise: got {self.noise!r}, expected one of {', '.join(NOISES)}")

    @classmethod
    def of(cls, trace: Trace) -> ConditionSpec:
        """The condition that a trace was made under."""
        made = trace.condition
        if made.noise is None:
            return cls(made.references, UNSPECIFIED if made.image == "noise" else None)
        return cls(made.references, made.noise.kind, made.noise.params)

    @property
    def image(self) -> str:
        return "clean" if self.noise is None else "noise"

    @property
    def slug(self) -> str:
        """``clean``, ``clean-references``, ``noise``, ``noise-references``; references that are not
        the system's own by their mode, as in ``clean-shuffled``."""
        shown = "references" if self.references in WITH_REFERENCES else self.references
        return self.image if shown == "none" else f"{self.image}-{shown}"

    @property
    def name(self) -> str:
        """``clean/selected``, ``noise:blank/none``: image and references in full, as tables and
        ``metrics.json`` have them."""
        kind = f":{self.noise}" if self.noise not in (None, UNSPECIFIED) else ""
        return f"{self.image}{kind}/{self.references}"


CLEAN = ConditionSpec("none")
CLEAN_REFERENCES = ConditionSpec("selected")
NOISE = ConditionSpec("none", "gaussian_clip")
NOISE_REFERENCES = ConditionSpec("selected", "gaussian_clip")
CONDITIONS = (CLEAN, CLEAN_REFERENCES, NOISE, NOISE_REFERENCES)


def by_condition(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """Traces of any number of runs by the slug of their condition, the four named ones first."""
    groups: dict[str, list[Trace]] = {named.slug: [] for named in CONDITIONS}
    for trace in traces:
        groups.setdefault(ConditionSpec.of(trace).slug, []).append(trace)
    return groups


def trace_id(trace: Trace) -> str:
    """``example@noise+references``: unique among the traces that pairs are built from, and spelled
    as pair files have always spelled it."""
    return f"{trace.example_id}@{ConditionSpec.of(trace).slug.replace('-', '+')}"
