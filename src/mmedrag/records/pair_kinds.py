"""The kinds of preference pairs, and which two conditions each compares: one table.

Place in the picture: Trace × conditions ─► *kinds* ─► pairs. Paper, Algorithm 1 (x* is the noisy
image, x_r the references, y the ground truth):

    cross_modal  M(x, q+x_r) = y  and  M(x*, q+x_r) = y   (x, y) ≻ (x*, M(x*, q+x_r))    D_cm
    copy         M(x, q+x_r) = y  and  M(x, q) ≠ y               y ≻ M(x, q)              D_oa1
    resist       M(x, q) = y      and  M(x, q+x_r) ≠ y           y ≻ M(x, q+x_r)          D_oa2
    stage1       M(x, q) = y      and  M(x*, q) ≠ y       (x, y) ≻ (x*, M(x*, q))    released only
    unaided      M(x, q) = y      and  M(x, q) ≠ y        y ≻ M(x, q), two draws  ours, optional
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmedrag.records.answers import Verdict
from mmedrag.records.conditions import (
    CLEAN,
    CLEAN_REFERENCES,
    CONDITIONS,
    NOISE,
    NOISE_REFERENCES,
    ConditionSpec,
)
from mmedrag.records.records import Pair, PairKind


class Kind(NamedTuple):
    """One row of the construction: ``better`` must be right, ``worse`` must be as ``verdict``."""

    better: ConditionSpec
    worse: ConditionSpec
    verdict: Verdict
    prompt: ConditionSpec  # whose prompt both sides carry (as released)
    reason: str
    drawn: bool = False  # answers are drawn by p(yes); otherwise they may be

    @property
    def conditions(self) -> tuple[ConditionSpec, ...]:
        """The conditions that have to be answered, in the order of ``CONDITIONS``."""
        return tuple(c for c in CONDITIONS if c in (self.better, self.worse, self.prompt))


KINDS: dict[PairKind, Kind] = {
    "cross_modal": Kind(
        CLEAN_REFERENCES,
        NOISE_REFERENCES,
        "right",
        CLEAN_REFERENCES,
        "right with references on the clean image and on the noise image: prefer the clean image",
    ),
    "resist": Kind(
        CLEAN,
        CLEAN_REFERENCES,
        "wrong",
        CLEAN_REFERENCES,
        "right without references, wrong with them: resist wrong references",
    ),
    "copy": Kind(
        CLEAN_REFERENCES,
        CLEAN,
        "wrong",
        CLEAN_REFERENCES,
        "wrong without references, right with them: use right references",
    ),
    "stage1": Kind(
        CLEAN,
        NOISE,
        "wrong",
        CLEAN,
        "without references right on the clean image, wrong on the noise image",
    ),
    "unaided": Kind(
        CLEAN,
        CLEAN,
        "wrong",
        CLEAN,
        "without references, a right draw of the answer over a wrong one",
        drawn=True,
    ),
}
PAPER_KINDS: tuple[PairKind, ...] = ("cross_modal", "resist", "copy")  # order as released: a, b, c


@dataclass
class PairSet:
    """The pairs and how many candidates went where.

    ``counts``: ``pairs`` per kind · ``dropped`` and ``refused`` (held-out rule) per kind and
    reason · ``examples`` how many had traces · ``score_means`` the report thresholds used.
    """

    pairs: list[Pair]
    counts: dict[str, Any] = field(default_factory=dict)
