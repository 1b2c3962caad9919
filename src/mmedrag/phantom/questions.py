"""Questions about a benchmark study, with their exact answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmedrag.phantom.canvas import Rng
from mmedrag.phantom.grammar import NUMBERS, DomainSpec, Findings, FindingSpec, fill, has
from mmedrag.records import Finding

Form = Literal["presence", "negated", "both", "either", "where", "count", "severity"]
CLOSED: dict[str, float] = {"presence": 0.8, "negated": 0.1, "both": 0.05, "either": 0.05}
OPEN = ("where", "count", "severity")

NEGATED = ("Is {side} {noun} absent?", "Is the image free of {side} {noun}?")
BOTH = ("Are both {a} and {b} present?", "Does the image show {a} and {b}?")
EITHER = ("Is {a} or {b} present?", "Does the image show {a} or {b}?")
WHERE = ("Where is the {noun}?", "Where is the {noun} located?")
COUNT = ("How many {noun}s {at}?", "How many {side} {noun}s are there?")
SEVERITY = ("How severe is the {noun}?", "What is the degree of {noun}?")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and what it asks about (``meta`` of the example)."""

    text: str
    answer: str
    closed: bool
    form: Form
    finding: str
    side: str | None = None
    other: str | None = None  # second finding of a compositional question


def yes(value: bool) -> str:
    return "yes" if value else "no"


def phrase(domain: DomainSpec, spec: FindingSpec, side: str | None) -> str:
    """How a question about two findings calls one of them."""
    return fill(domain, spec, "{side} {noun}", Finding(present=True, side=side)).lower()


def ask_presence(
    domain: DomainSpec, spec: FindingSpec, side: str | None, findings: Findings, rng: Rng
) -> Question:
    state = Finding(present=True, side=side)
    text = fill(domain, spec, rng.choice(spec.questions), state)
    answer = yes(has(domain, findings[spec.name], side))
    return Question(text, answer, True, "presence", spec.name, side)


Cell = tuple[str, str | None]


@dataclass(frozen=True)
class Balance:
    """How to ask so that the question does not give its answer away in one population."""

    yes: float  # P(ask about something present | something is present)
    weights: Mapping[Cell, float]  # of an absent cell being asked about


def cells(domain: DomainSpec) -> list[Cell]:
    """Every (finding, side) that can be asked about."""
    return [
        (spec.name, side)
        for spec in domain.findings
        for side in (domain.single_sides if spec.sided else (None,))
    ]


def balance(domain: DomainSpec, population: Sequence[Findings]) -> Balance:
    """Ask so that yes and no are equally likely, whatever finding a question is about.

    ``population`` are the findings of all studies of a benchmark: its phenotypes make some
    findings commoner than their prevalence says, and a question must not give its answer away.
    """
    yes = dict.fromkeys(cells(domain), 1e-3)
    no = dict.fromkeys(cells(domain), 1e-3)
    empty = 0
    for findings in population:
        present = [c for c in yes if has(domain, findings[c[0]], c[1])]
        empty += not present
        for cell in present:
            yes[cell] += 1 / len(present)
        for cell in set(yes) - set(present):
            no[cell] += 1
    share = min(0.5 / max(1 - empty / max(len(population), 1), 0.5), 1.0)
    return Balance(share, {cell: yes[cell] / no[cell] for cell in yes})


def ask_closed(
    domain: DomainSpec, findings: Findings, rng: Rng, fair: Balance | None = None, form: str = ""
) -> Question:
    """One closed question. With ``fair`` (:func:`balance`), yes and no are equally likely
    and the asked finding does not give the answer away; without, the prior is natural."""
    form = form or rng.weighted(list(CLOSED), list(CLOSED.values()))
    spec, side = _pick(domain, findings, rng, fair)
    truth = has(domain, findings[spec.name], side)
    if form == "presence":
        return ask_presence(domain, spec, side, findings, rng)
    if form == "negated":
        text = fill(domain, spec, rng.choice(NEGATED), Finding(present=True, side=side))
        return Question(text, yes(not truth), True, "negated", spec.name, side)
    others = [s for s in domain.findings if s.name != spec.name]
    second = rng.choice(others)
    other_side = rng.choice(domain.single_sides) if second.sided else None
    other_truth = has(domain, findings[second.name], other_side)
    a, b = phrase(domain, spec, side), phrase(domain, second, other_side)
    text = rng.choice(BOTH if form == "both" else EITHER).format(a=a, b=b)
    value = (truth and other_truth) if form == "both" else (truth or other_truth)
    return Question(text, yes(value), True, form, spec.name, side, second.name)  # type: ignore[arg-type]


def _pick(
    domain: DomainSpec, findings: Findings, rng: Rng, fair: Balance | None
) -> tuple[FindingSpec, str | None]:
    options = cells(domain)
    if fair is None:
        name, side = rng.choice(options)
        return domain.by_name[name], side
    wanted = rng.chance(fair.yes)
    match = [c for c in options if has(domain, findings[c[0]], c[1]) == wanted]
    if not match:  # nothing present: the answer can only be no
        wanted, match = not wanted, options
    name, side = rng.weighted(match, [1.0 if wanted else fair.weights[c] for c in match])
    return domain.by_name[name], side


def ask_open(domain: DomainSpec, findings: Findings, rng: Rng) -> Question | None:
    """Where, how many or how severe, of a present finding; None when nothing can be asked."""
    options: list[tuple[Form, FindingSpec]] = []
    for spec in domain.findings:
        if findings[spec.name].present:
            options += [("where", spec)] if spec.sided else []
            # A count is per side: with both sides "how many" would have two answers.
            one_place = findings[spec.name].side != domain.both
            options += [("count", spec)] if spec.most and one_place else []
            options += [("severity", spec)] if spec.grades else []
    if not options:
        return None
    form, spec = rng.choice(options)
    state = findings[spec.name]
    if form == "where":
        assert state.side
        answer, text = domain.sides[state.side][1], rng.choice(WHERE)
    elif form == "count":
        answer, text = NUMBERS[state.count or 0], rng.choice(COUNT)
    else:
        answer, text = state.severity or "", rng.choice(SEVERITY)
    return Question(fill(domain, spec, text, state), answer, False, form, spec.name, state.side)
