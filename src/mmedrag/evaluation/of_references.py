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

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmedrag.evaluation.keywords import Keywords, findings_of, load_keywords, present
from mmedrag.evaluation.metrics.statistics import AnyStat, Estimate, Stat, estimates, ratio
from mmedrag.phantom import DOMAINS, cells, findings_in, has, load_domain
from mmedrag.records import Example, Finding, Row, Trace, group_of, target_of
from mmedrag.runtime import DataFolder, numpy_rng

log = logging.getLogger(__name__)
Cell = tuple[str, str | None]  # finding, side
RESAMPLES = 2000
UNSPECIFIED = "unspecified"
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


def reference_agreement(
    data: Sequence[DataFolder],
    rows: Sequence[Row],
    tops: Sequence[str | None],
    corpus: Callable[[str], int],
    keywords: Keywords | None = None,
    seed: int = 0,
) -> dict[str, Agreement]:
    """Agreement of what was retrieved for the rows of data folders, by domain.

    A domain's cases with ground truth are read by the grammar, in what the folders' questions ask
    about; where there is none, the keyword labeller reads each case's own report and its
    reference. Each picture counts once, twins not at all. A domain of which neither is known is
    left out.

    Args:
        rows: whose pictures were asked with.
        tops: text of the reference at rank 1 of each row; None: none was found.
        corpus: domain -> how many studies could be found.
    """
    log.info("agreement of the best references: %d rows", len(rows))
    truth = {study: found for folder in data for study, found in folder.truth().items()}
    asked = asked_cells(row for folder in data for row in folder.examples())
    reports = _own_reports(data)
    words = load_keywords() if keywords is None else keywords
    exact: dict[str, list[Case]] = {}
    crude: dict[str, list[Case]] = {}
    seen = set()
    for row, top in zip(rows, tops, strict=True):
        picture, domain = _picture(row), row.domain or UNSPECIFIED
        if picture in seen or not row.image or "twin" in row.meta or "twin_of" in row.meta:
            continue
        seen.add(picture)
        study = str(row.meta.get("study", row.id))
        if domain in DOMAINS and study in truth:
            facts = true_of(domain, truth[study].findings, asked.get(study, ()))
            if facts:
                says = stated(domain, top) if top else None
                exact.setdefault(domain, []).append(Case(row.patient, facts, says))
        elif picture in reports:
            crude.setdefault(domain, []).append(
                case_of_reports(row.patient, reports[picture], top, findings_of(words, row.domain))
            )
    return {
        domain: agreement(cases, corpus(domain), labeller, seed=seed)
        for labeller, group in (("keywords", crude), ("grammar", exact))
        for domain, cases in sorted(group.items())
    }


def case_of_reports(
    patient: str | None, own: str, reference: str | None, findings: Mapping[str, list[str]]
) -> Case:
    """A case of which nothing but its own report is known, and the reference found for it."""
    has_, says = (
        {(name, None) for name in present(text or "", findings)} for text in (own, reference)
    )
    truth: dict[Cell, bool] = {(name, None): (name, None) in has_ for name in findings}
    return Case(patient, truth, frozenset(says) if reference else None)


def _own_reports(data: Sequence[DataFolder]) -> dict[tuple[str, ...], str]:
    """picture -> its own report: of the corpus, or the target of a report to write."""
    out: dict[tuple[str, ...], str] = {}
    for folder in data:
        texts: list[tuple[Row, str]] = [
            (row, row.text) for row in folder.corpus() if "twin" not in row.meta
        ]
        texts += [(row, row.answer or "") for row in folder.examples(task="report")]
        out |= {_picture(row): text for row, text in texts if text.strip()}
    return out


def _picture(row: Row) -> tuple[str, ...]:
    return tuple(str(path) for path in row.images)


def cases_of(traces: Iterable[Trace]) -> dict[str, list[Case]]:
    """domain -> cases of a run on the benchmark: its presence and negated questions, whose answers
    say what is true, and the references at rank 1. Each picture counts once, twins not at all."""
    truth: dict[tuple[str, str], dict[Cell, bool]] = {}
    first: dict[tuple[str, str], Trace] = {}
    for trace in traces:
        meta, domain = trace.meta, group_of(trace)
        if meta.get("form") in ("presence", "negated") and "twin_of" not in meta:
            key = (domain, str(meta.get("study", trace.example_id)))
            there = (target_of(trace) == "yes") == (meta["form"] == "presence")
            truth.setdefault(key, {})[meta["finding"], meta.get("side")] = there
            first.setdefault(key, trace)
    out: dict[str, list[Case]] = {}
    for (domain, study), facts in truth.items():
        trace = first[domain, study]
        says = stated(domain, trace.hits[0].text) if trace.hits else None
        out.setdefault(domain, []).append(Case(trace.patient, facts, says))
    return dict(sorted(out.items()))


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
        name: Stat(table, _balanced, np.full(len(table), np.nan), table.sum(axis=1) > 0)
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
