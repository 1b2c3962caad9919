"""Who is imaged: patients, phenotypes, studies, and counterfactual twins.

A phenotype is one combination of a domain's visible attributes (view, habitus, ...). Each has
a typical set of findings. ``similarity`` is the probability that a finding of a patient is the
phenotype's own rather than drawn from the prevalence: at 0 a similar-looking case says nothing
about the finding, at 1 it says all. That is what makes retrieval useful by degrees, for all
findings alike or for each by its own (``similarity_of``, ``regimes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from mmedrag.phantom.canvas import Canvas, Rng, grain, to_uint8
from mmedrag.phantom.grammar import (
    DomainSpec,
    Findings,
    FindingSpec,
    has,
    load_domain,
    states,
    write_report,
)
from mmedrag.phantom.settings import Knobs
from mmedrag.records import Finding, Split


@dataclass(frozen=True)
class Study:
    id: str
    patient: str
    domain: str
    split: Split
    key: str  # names the randomness of picture and report
    attributes: Mapping[str, str]
    findings: Findings


def _prevalence(spec: FindingSpec, knobs: Knobs) -> float:
    return min(spec.prevalence * knobs.prevalence, 1.0)


def _draw(domain: DomainSpec, spec: FindingSpec, rng: Rng, knobs: Knobs) -> Finding:
    if rng.chance(_prevalence(spec, knobs)):
        return rng.choice(states(domain, spec))
    return Finding(present=False)


def typical(domain: DomainSpec, seed: int, attributes: Mapping[str, str], knobs: Knobs) -> Findings:
    """The findings that belong to a phenotype (a combination of attributes) of this seed."""
    looked_at = knobs.appearance.get(domain.name, list(attributes))
    name = _phenotype({key: attributes[key] for key in looked_at})
    rngs = {s.name: Rng(seed, domain.name, "typical", name, s.name) for s in domain.findings}
    if not knobs.even:
        return {spec.name: _draw(domain, spec, rngs[spec.name], knobs) for spec in domain.findings}
    return {
        spec.name: rngs[spec.name].choice(states(domain, spec))
        if name in _owners(domain.name, tuple(looked_at), seed, spec.name, _prevalence(spec, knobs))
        else Finding(present=False)
        for spec in domain.findings
    }


def _phenotype(attributes: Mapping[str, str]) -> str:
    return "/".join(f"{key}={attributes[key]}" for key in sorted(attributes))


@lru_cache(maxsize=1024)
def _owners(
    name: str, looked_at: tuple[str, ...], seed: int, finding: str, share: float
) -> frozenset[str]:
    """The phenotypes that a finding is typical of: the same share of all in every seed."""
    attributes = [a for a in load_domain(name).attributes if a.name in looked_at]
    every = [
        _phenotype(dict(zip((a.name for a in attributes), values, strict=True)))
        for values in product(*(a.values for a in attributes))
    ]
    order = Rng(seed, name, "owners", finding).shuffled(every)
    return frozenset(order[: round(share * len(order))])


def studies(domain: DomainSpec, count: int, seed: int, knobs: Knobs) -> Iterator[Study]:
    """``count`` studies of patients with one to three studies each; splits go by patient.

    60 % of patients are train, 15 % val, 25 % test. Later studies of a patient keep most
    findings of the one before (each is redrawn with probability ``redraw``).
    """
    made = number = 0
    while made < count:
        rng = Rng(seed, domain.name, "patient", number)
        patient = f"{domain.name[:3]}-s{seed}-p{number:05d}"
        where = rng.unit()
        split: Split = "train" if where < 0.6 else "val" if where < 0.75 else "test"
        attributes = {spec.name: rng.choice(list(spec.values)) for spec in domain.attributes}
        own = typical(domain, seed, attributes, knobs)
        findings = {
            spec.name: own[spec.name]
            if rng.chance(knobs.similar(domain.name, spec.name))
            else _draw(domain, spec, rng, knobs)
            for spec in domain.findings
        }
        for visit in range(rng.weighted((1, 2, 3), (0.6, 0.3, 0.1))):
            if made == count:
                break
            if visit:
                findings = {
                    spec.name: _draw(domain, spec, rng, knobs)
                    if rng.chance(knobs.redraw)
                    else findings[spec.name]
                    for spec in domain.findings
                }
            study = f"{patient}-{visit}"
            key = f"{seed}/{domain.name}/{study}"
            yield Study(study, patient, domain.name, split, key, attributes, findings)
            made += 1
        number += 1


def picture(domain: DomainSpec, study: Study, canvas: Canvas, knobs: Knobs) -> np.ndarray:
    """The study's image, uint8 [S, S] or [S, S, 3]."""
    rng: Callable[[str], Rng] = lambda name: Rng(study.key, name)  # noqa: E731
    contrast = knobs.contrast * domain.visibility
    image = domain.render(canvas, study.findings, study.attributes, rng, contrast)
    channels = 1 if image.ndim == 2 else image.shape[2]
    noise = grain(canvas.size, channels, study.key, "grain")
    return to_uint8(image, noise, domain.grain * knobs.noise)


def report(domain: DomainSpec, study: Study, knobs: Knobs) -> str:
    """The study's report, with the knob's share of findings misreported."""
    reported = dict(study.findings)
    for spec in domain.findings:
        slip = Rng(study.key, "slip", spec.name)
        if slip.chance(knobs.report_errors):
            reported[spec.name] = (
                Finding(present=False)
                if reported[spec.name].present
                else slip.choice(states(domain, spec))
            )
    rng = Rng(study.key, "report")
    return write_report(domain, reported, study.attributes, rng, knobs.omission, knobs.hedging)


def flip(domain: DomainSpec, findings: Findings, name: str, side: str | None, rng: Rng) -> Findings:
    """The findings with one cell (finding, side) switched and everything else as it was."""
    spec, state = domain.by_name[name], findings[name]
    if has(domain, state, side):
        if side is not None and state.side == domain.both:
            rest = [s for s in domain.single_sides if s != side]
            new = state.model_copy(update={"side": rng.choice(rest)})
        else:
            new = Finding(present=False)
    elif state.present:  # on another side only
        new = state.model_copy(update={"side": domain.both})
    else:
        options = [s for s in states(domain, spec) if s.side == side]
        new = rng.choice(options or states(domain, spec))
    return {**findings, name: new}
