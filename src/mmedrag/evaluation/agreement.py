"""Agreement: does the best reference say of each finding what is true of the case?

Place in the picture: the quality of the references that any retriever finds in any corpus, as one
number a finding, so that tables of accuracy can be read against it. Per finding: the mean of
sensitivity and specificity of what the reference at rank 1 states against the truth of the case,
over the cases that a presence or negated question asks about; 1 where references are always right,
0.5 where they say nothing. Silence counts as absent and doubt as present, as a reader would take
them; a finding that has sides is asked of each side for itself. Beside every value stands the
same for the reference of another case.

Where findings are known (``truth.jsonl``) the benchmark's own labeller reads the references. Any
other report is read by :mod:`mmedrag.evaluation.keywords`, and a case's own report is its truth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmedrag.evaluation.metrics.statistics import AnyStat, Estimate, Stat, estimates, ratio
from mmedrag.phantom import cells, findings_in, has, load_domain
from mmedrag.records import Example, Finding
from mmedrag.runtime import numpy_rng

Cell = tuple[str, str | None]  # finding, side
RESAMPLES = 2000
MEAN = ""  # the mean among the findings, until it stands apart


@dataclass(frozen=True)
class Case:
    """A case, and what the reference at rank 1 says of it.

    Args:
        truth: whether the case has each finding (on a side) that is asked about.
        said: every finding (on a side) that the reference states as present; None: no reference.
    """

    patient: str | None
    truth: Mapping[Cell, bool]
    said: frozenset[Cell] | None


@dataclass(frozen=True, slots=True)
class FindingAgreement(Estimate):
    """Agreement in one finding, or the mean over findings.

    ``n``: findings of cases compared (sides count for themselves), of which ``present`` are there;
    ``shuffled``: the same with another case's reference.
    """

    present: int
    shuffled: Estimate


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of one domain's references with its cases, at a size of the corpus."""

    mean: FindingAgreement  # over the findings whose agreement is defined
    findings: dict[str, FindingAgreement]
    cases: int
    without: int  # cases for which no reference was found; they are not counted
    corpus: int  # studies that could be found
    labeller: str = "grammar"


def agreement(
    cases: Sequence[Case],
    corpus: int,
    labeller: str = "grammar",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Agreement per finding and its mean, with 95 % intervals (bootstrap over patients).

    Args:
        cases: of one domain.
        corpus: how many studies the references were found among.
        seed: draws the resamples, and whose reference a case gets when they are shuffled.
    """
    known = [case for case in cases if case.said is not None]
    patients = [case.patient for case in known]
    names = sorted({name for case in known for name, _ in case.truth})
    own = [case.said for case in known]
    tables = _tables(known, names, own)
    shuffled = _tables(
        known, names, [None if n is None else own[n] for n in partners(patients, seed)]
    )
    found, beside = (
        estimates(_stats(table, len(known)), patients, resamples, seed)
        for table in (tables, shuffled)
    )

    def cell(name: str, counts: np.ndarray) -> FindingAgreement:
        n, present = int(counts[1] + counts[3]), int(counts[1])
        own, other = (replace(part[name], n=n) for part in (found, beside))
        return FindingAgreement(own.value, own.low, own.high, n, present, other)

    counts = {name: table.sum(axis=0) for name, table in tables.items()}
    defined = [np.zeros(4), *(c for name, c in counts.items() if found[name].value is not None)]
    return Agreement(
        mean=cell(MEAN, np.sum(defined, axis=0)),
        findings={name: cell(name, counts[name]) for name in names},
        cases=len(known),
        without=len(cases) - len(known),
        corpus=corpus,
        labeller=labeller,
    )


def asked_cells(examples: Iterable[Example]) -> dict[str, set[Cell]]:
    """study -> every finding (on a side) that a presence or negated question asks about there.

    Image twins are left out: a finding that was flipped is not as common as in its population.
    """
    out: dict[str, set[Cell]] = {}
    for row in examples:
        if row.meta.get("form") in ("presence", "negated") and "twin_of" not in row.meta:
            cell = (str(row.meta["finding"]), row.meta.get("side"))
            out.setdefault(str(row.meta.get("study")), set()).add(cell)
    return out


@lru_cache(maxsize=65536)
def stated(domain: str, text: str) -> frozenset[Cell]:
    """Every finding (on a side) that a benchmark report states as present, doubt included; a
    sided finding without a side counts for all."""
    spec = load_domain(domain)
    found = {
        name: Finding(present=state["present"], side=state["side"] or spec.both)
        for name, state in findings_in(domain, text).items()
    }
    return frozenset(c for c in cells(spec) if c[0] in found and has(spec, found[c[0]], c[1]))


def true_of(
    domain: str, findings: Mapping[str, Finding], asked: Collection[Cell]
) -> dict[Cell, bool]:
    """Whether a case of the benchmark has each of the findings (on a side) that are asked about."""
    spec = load_domain(domain)
    known = [cell for cell in cells(spec) if cell in asked and cell[0] in findings]
    return {(name, side): has(spec, findings[name], side) for name, side in known}


def partners(patients: Sequence[str | None], seed: int = 0) -> list[int | None]:
    """Whose reference each case gets when they are shuffled: another patient's, in a seeded
    order; None where there is no other."""
    order = [int(n) for n in numpy_rng(seed, 2).permutation(len(patients))]
    out: list[int | None] = [None] * len(patients)
    for place, n in enumerate(order):
        others = (order[(place + step) % len(order)] for step in range(1, len(order)))
        apart = (o for o in others if patients[n] is None or patients[o] != patients[n])
        out[n] = next(apart, None)
    return out


def _tables(
    cases: Sequence[Case], names: Sequence[str], said: Sequence[frozenset[Cell] | None]
) -> dict[str, np.ndarray]:
    """finding -> float [cases, 4]: present and stated, present, absent and unstated, absent."""
    tables = {name: np.zeros((len(cases), 4)) for name in names}
    for row, (case, states) in enumerate(zip(cases, said, strict=True)):
        for cell, there in case.truth.items():
            stated = cell in (states or ())
            tables[cell[0]][row] += (there and stated, there, not (there or stated), not there)
    return tables


def _stats(tables: Mapping[str, np.ndarray], cases: int) -> dict[str, AnyStat]:
    """Agreement of every finding, and the mean of those where it is defined."""
    stats: dict[str, AnyStat] = {
        name: Stat(table, _balanced, np.full(len(table), np.nan), table.any(axis=1))
        for name, table in tables.items()
    }
    defined = [table for name, table in tables.items() if np.isfinite(stats[name].point())]
    every = np.concatenate([np.zeros((cases, 0)), *defined], axis=1)
    return stats | {MEAN: Stat(every, _mean, np.full(len(every), np.nan))}


def _balanced(sums: np.ndarray) -> np.ndarray:
    """Mean of sensitivity and specificity; undefined where one of them is."""
    return (ratio(sums[..., 0], sums[..., 1]) + ratio(sums[..., 2], sums[..., 3])) / 2


def _mean(sums: np.ndarray) -> np.ndarray:
    values = _balanced(sums.reshape(*sums.shape[:-1], -1, 4))
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))
