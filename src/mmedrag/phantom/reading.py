"""What a benchmark report says of a question: the labeller put to use.

Place in the picture: beside ``grammar``; controls, scores and pair building ask it what a
reference or an answer states.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mmedrag.phantom.grammar import DOMAINS, NUMBERS, label_report, load_domain
from mmedrag.phantom.questions import BOTH, EITHER, phrase
from mmedrag.records import Trace, group_of


def read_reference(trace: Trace, text: str) -> str:
    """What a benchmark report says about a question; "" where it cannot be told.

    To a closed question, a finding that the report leaves out counts as absent, as a reader
    would take it.
    """
    domain = group_of(trace)
    if domain not in DOMAINS or not text:
        return ""
    findings = findings_in(domain, text)
    meta, form = trace.meta, trace.meta.get("form", "presence")
    if form in ("where", "count", "severity"):
        state = findings.get(meta["finding"]) or {}
        if form == "where":
            return load_domain(domain).sides[state["side"]][1] if state.get("side") else ""
        return NUMBERS[state.get("count") or 0] if form == "count" else state.get("severity") or ""
    first = _has(domain, findings, meta["finding"], meta.get("side"))
    if form == "presence":
        return "yes" if first else "no"
    if form == "negated":
        return "no" if first else "yes"
    if form in ("both", "either") and meta.get("other"):
        second = _has(domain, findings, meta["other"], second_side(trace, domain))
        return "yes" if (first and second if form == "both" else first or second) else "no"
    return ""


def second_side(trace: Trace, domain: str) -> str | None:
    """The side of the second finding that a compositional question asks about, which only its
    words tell; None where that finding has no sides, or the words are none of the benchmark's."""
    spec, meta = load_domain(domain), trace.meta
    first, second = spec.by_name[meta["finding"]], spec.by_name[meta["other"]]
    templates = BOTH if meta["form"] == "both" else EITHER
    a = phrase(spec, first, meta.get("side"))
    for side in spec.single_sides if second.sided else ():
        b = phrase(spec, second, side)
        if trace.question in [template.format(a=a, b=b) for template in templates]:
            return side
    return None


def _has(domain: str, findings: Mapping[str, Any], finding: str, side: str | None) -> bool:
    """Is the finding stated, on this side or without a side?"""
    state = findings.get(finding)
    if not state or not state["present"]:
        return False
    return None in (side, state["side"]) or state["side"] in (side, load_domain(domain).both)


@lru_cache(maxsize=65536)
def findings_in(domain: str, text: str) -> dict[str, dict[str, Any]]:
    """Findings that a benchmark report mentions (see the grammar's ``label_report``)."""
    return label_report(domain, text)["findings"]


def present_in(domain: str, text: str) -> set[str]:
    """Findings that a benchmark report states as present."""
    return {name for name, state in findings_in(domain, text).items() if state["present"]}
