"""What a predictor says of each row: the model's own answers, or a control's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmedrag.records import Trace


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of each row, in the order of the rows."""

    texts: list[str]
    p_yes: list[float | None] | None = None


def said_by(traces: Sequence[Trace]) -> Prediction:
    """The model's own answers; a failed row says nothing."""
    return Prediction(
        [t.answer.text if t.answer and not t.error else "" for t in traces],
        [t.answer.p_yes if t.answer and not t.error else None for t in traces],
    )
