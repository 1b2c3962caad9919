"""The four conditions of an answer: clean or noise image, with or without references.

Place in the picture: the vocabulary of pair construction and of the reliance metrics.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmedrag.records.records import Trace

CLEAN, CLEAN_REF = "clean", "clean+references"


NOISE, NOISE_REF = "noise", "noise+references"


CONDITIONS = (CLEAN, CLEAN_REF, NOISE, NOISE_REF)


def condition_of(trace: Trace) -> str:
    """Which of the four conditions a trace was made under."""
    return trace.condition.image + ("" if trace.condition.references == "none" else "+references")


def by_condition(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """Group traces of any number of runs into the four conditions."""
    groups: dict[str, list[Trace]] = {name: [] for name in CONDITIONS}
    for trace in traces:
        groups[condition_of(trace)].append(trace)
    return groups


def trace_id(trace: Trace) -> str:
    """``example@condition``: unique among the traces that pairs are built from."""
    return f"{trace.example_id}@{condition_of(trace)}"
