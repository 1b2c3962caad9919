"""records.pair_kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mmedrag.records.conditions import CLEAN, CLEAN_REF, NOISE, NOISE_REF
from mmedrag.records.records import Pair
from mmedrag.records.vocabulary import PairKind


class Kind(NamedTuple):
    """One row of the construction: ``better`` must be right, ``worse`` must be as ``verdict``."""

    better: str
    worse: str
    verdict: Verdict
    prompt: str  # condition whose prompt both sides carry (as released)
    reason: str
    drawn: bool = False  # answers are drawn by p(yes); otherwise they may be


KINDS: dict[PairKind, Kind] = {
    "cross_modal": Kind(
        CLEAN_REF,
        NOISE_REF,
        "right",
        CLEAN_REF,
        "right with references on the clean image and on the noise image: prefer the clean image",
    ),
    "resist": Kind(
        CLEAN,
        CLEAN_REF,
        "wrong",
        CLEAN_REF,
        "right without references, wrong with them: resist wrong references",
    ),
    "copy": Kind(
        CLEAN_REF,
        CLEAN,
        "wrong",
        CLEAN_REF,
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


@dataclass
class PairSet:
    """The pairs and how many candidates went where.

    ``counts``: ``pairs`` per kind · ``dropped`` and ``refused`` (held-out rule) per kind and
    reason · ``examples`` how many had traces · ``score_means`` the report thresholds used.
    """

    pairs: list[Pair]
    counts: dict[str, Any] = field(default_factory=dict)


Verdict = Literal["right", "wrong", "unclear"]
