"""The benchmark's language: findings to sentences and questions, and sentences back to findings.

Every sentence comes from a finite set, so the labeller is a dictionary from sentence to
meaning, exact by construction; building it is an error when one sentence has two meanings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
from pydantic import ConfigDict

from mmedrag.phantom.canvas import Canvas, Rng
from mmedrag.records import Finding, UserError

DOMAINS: dict[str, str] = {
    "radiology": "mmedrag.phantom.chest:SPEC",
    "ophthalmology": "mmedrag.phantom.fundus:SPEC",
    "pathology": "mmedrag.phantom.histology:SPEC",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
Findings = dict[str, Finding]
FORBID = ConfigDict(extra="forbid")  # a mistyped field of a table is an error


@dataclass(frozen=True)
class FindingSpec:
    """One finding: its attributes, and the sentences and questions that speak of it.

    Slots in templates: ``{side}`` adjective, ``{at}`` place phrase, ``{grade}``, ``{count}``
    as a word, ``{s}`` plural ending, ``{noun}``. A slot at the start of a sentence is
    capitalised. Questions without a side slot ask about any side.
    """

    __pydantic_config__ = FORBID
    name: str
    noun: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    hedged: tuple[str, ...]
    questions: tuple[str, ...]
    sided: bool = False
    grades: tuple[str, ...] = ()
    most: int = 0  # countable up to this many; 0: not counted
    prevalence: float = 0.25


@dataclass(frozen=True)
class AttributeSpec:
    """A visible property of the picture that is no finding (view, habitus, stain, ...)."""

    __pydantic_config__ = FORBID
    name: str
    values: Mapping[str, tuple[str, ...]]  # value -> sentences that state it


Render = Callable[[Canvas, Findings, Mapping[str, str], Callable[[str], Rng], float], np.ndarray]


@dataclass(frozen=True)
class DomainSpec:
    """A domain of the benchmark. ``sides`` maps a side to (adjective, place phrase); ``both``
    names the side that includes all others. ``render`` draws float32 [S, S] or [S, S, 3]."""

    name: str
    modality: str
    findings: tuple[FindingSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    normal: tuple[str, ...]
    sides: Mapping[str, tuple[str, str]]
    both: str
    render: Render
    grain: float = 10.0  # grey levels, standard deviation of pixel noise at knob 1
    visibility: float = 1.0  # multiplies the contrast knob, so that domains are about as hard
    by_name: Mapping[str, FindingSpec] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {spec.name: spec for spec in self.findings})

    @property
    def single_sides(self) -> tuple[str, ...]:
        return tuple(side for side in self.sides if side != self.both)


def load_domain(name: str) -> DomainSpec:
    """The specification of a benchmark domain; UserError when there is none of that name."""
    if name not in DOMAINS:
        raise UserError(f"domain: {name!r} is not in the benchmark, expected {', '.join(DOMAINS)}")
    module, _, attribute = DOMAINS[name].partition(":")
    return getattr(import_module(module), attribute)


def fill(domain: DomainSpec, spec: FindingSpec, template: str, state: Finding) -> str:
    """A template with its slots filled from a finding's state."""
    side = domain.sides.get(state.side or "", ("", ""))
    text = template.format(
        noun=spec.noun,
        side=side[0],
        at=side[1],
        grade=state.severity or "",
        count=NUMBERS[state.count or 0],
        s="" if state.count == 1 else "s",
    )
    text = " ".join(text.split()).replace(" .", ".").replace(" ?", "?")
    return text[:1].upper() + text[1:]


def states(domain: DomainSpec, spec: FindingSpec) -> list[Finding]:
    """Every state in which the finding is present."""
    sides: list[str | None] = [*domain.sides] if spec.sided else [None]
    counts: list[int | None] = [*range(1, spec.most + 1)] if spec.most else [None]
    grades: list[str | None] = [*spec.grades] or [None]
    return [
        Finding(present=True, side=side, count=count, severity=grade)
        for side, count, grade in product(sides, counts, grades)
    ]


def has(domain: DomainSpec, state: Finding, side: str | None) -> bool:
    """Is the finding present on this side (any side when None)?"""
    return state.present and (side is None or state.side in (side, domain.both))


def write_report(
    domain: DomainSpec,
    findings: Findings,
    attributes: Mapping[str, str],
    rng: Rng,
    omission: float = 0.6,
    hedging: float = 0.1,
    describe: float = 0.8,
) -> str:
    """A report of the findings: positives always, negatives unless omitted, some hedged.

    Args:
        omission: share of negatives that are not mentioned.
        hedging: share of positives (and a quarter of it of mentioned negatives) in doubt.
        describe: share of the picture's attributes that are stated.
    """
    opening = [
        rng.choice(spec.values[attributes[spec.name]])
        for spec in domain.attributes
        if rng.chance(describe)
    ]
    body = []
    for spec in rng.shuffled(domain.findings):
        state = findings[spec.name]
        if state.present:
            templates = spec.hedged if rng.chance(hedging) else spec.positive
            body.append(fill(domain, spec, rng.choice(templates), state))
        elif not rng.chance(omission):
            if rng.chance(hedging / 4):
                doubt = rng.choice(states(domain, spec))
                body.append(fill(domain, spec, rng.choice(spec.hedged), doubt))
            else:
                body.append(fill(domain, spec, rng.choice(spec.negative), state))
    if not any(state.present for state in findings.values()):
        body.append(rng.choice(domain.normal))
    return " ".join(opening + body) or rng.choice(domain.normal)


def structured_report(domain: DomainSpec, findings: Findings, attributes: Mapping[str, str]) -> str:
    """The same study in a fixed form: attributes, then what is there in the domain's order, each
    in its first wording. Says no more and no less than the truth, and only in one way."""
    body = [
        fill(domain, spec, spec.positive[0], findings[spec.name])
        for spec in domain.findings
        if findings[spec.name].present
    ]
    opening = [spec.values[attributes[spec.name]][0] for spec in domain.attributes]
    return " ".join(opening + (body or [domain.normal[0]]))


def _key(sentence: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9' -]+", " ", sentence.lower()).split())


def _merge(first: Finding, other: Finding) -> Finding:
    """What two readings of one sentence have in common (a template may omit an attribute)."""
    same = {
        name: getattr(first, name) if getattr(first, name) == getattr(other, name) else None
        for name in ("side", "count", "severity")
    }
    return Finding(present=first.present, **same)


@lru_cache(maxsize=8)
def sentences(name: str) -> dict[str, tuple[str, str, Finding] | None]:
    """sentence -> (finding, polarity, state), or None for sentences that state no finding.

    Polarity is "present", "absent" or "uncertain". Attributes that a template leaves out are
    None in the state.
    """
    domain = load_domain(name)
    table: dict[str, tuple[str, str, Finding] | None] = {}
    for text in domain.normal:
        table[_key(text)] = None
    for attribute in domain.attributes:
        for texts in attribute.values.values():
            for text in texts:
                table[_key(text)] = None
    absent = [Finding(present=False)]
    for spec in domain.findings:
        present = states(domain, spec)
        for polarity, templates, possible in (
            ("present", spec.positive, present),
            ("uncertain", spec.hedged, present),
            ("absent", spec.negative, absent),
        ):
            for template, state in product(templates, possible):
                key = _key(fill(domain, spec, template, state))
                known = table.get(key, ...)
                if known is None or (known is not ... and known[:2] != (spec.name, polarity)):
                    raise UserError(f"{name}: {key!r} has two meanings: {known} and {spec.name}")
                table[key] = (
                    spec.name,
                    polarity,
                    state if known is ... else _merge(known[2], state),
                )
    return table


def split_sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip(" .\n")]


def label_report(domain: str, text: str) -> dict[str, Any]:
    """Read a report of this vocabulary back into findings.

    Returns:
        ``findings``: name -> {present, uncertain, side, count, severity} of the mentioned
        ones; a later sentence overrides an earlier one, except that doubt never overrides a
        statement. ``unreadable``: sentences outside the vocabulary. ``sentences``: how many.
    """
    table = sentences(domain)
    found: dict[str, dict[str, Any]] = {}
    unreadable = []
    parts = split_sentences(text)
    for part in parts:
        meaning = table.get(_key(part), ...)
        if meaning is ...:
            unreadable.append(part)
        elif meaning is not None:
            name, polarity, state = meaning
            if polarity == "uncertain" and name in found:
                continue
            found[name] = {
                "present": polarity != "absent",
                "uncertain": polarity == "uncertain",
                "side": state.side,
                "count": state.count,
                "severity": state.severity,
            }
    return {"findings": found, "unreadable": unreadable, "sentences": len(parts)}
