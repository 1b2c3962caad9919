"""Studies drawn from a known population, to see how often intervals hold its truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain

import numpy as np

from mmedrag.evaluation.metrics import questions, text
from mmedrag.evaluation.metrics.statistics import (
    AnyStat,
    Interval,
    RankStat,
    Stat,
    difference,
    interval,
    resample,
)
from mmedrag.evaluation.reliance import excess
from mmedrag.evaluation.scoring import Common
from mmedrag.evaluation.subgroups import gap_interval

QUESTIONS = 4  # of each patient
RESAMPLES = 1000
# patients that stand for the population
WHOLE = {"answers": 200_000, "confidence": 50_000, "texts": 20_000}
WORDS = np.array([f"w{i}" for i in range(40)])


@dataclass
class Study:
    """Metrics over the same rows; ``pairs``: two of which the difference is asked; ``gaps``: a
    metric and the subgroup of each row; ``equal``: two systems that are equally good."""

    groups: np.ndarray
    stats: dict[str, AnyStat] = field(default_factory=dict)
    pairs: dict[str, tuple[AnyStat, AnyStat]] = field(default_factory=dict)
    gaps: dict[str, tuple[AnyStat, np.ndarray]] = field(default_factory=dict)
    equal: dict[str, tuple[AnyStat, AnyStat]] = field(default_factory=dict)
    truth: dict[str, float] = field(default_factory=dict)  # where it is known without counting


def answers(rng: np.random.Generator, patients: int) -> Study:
    """Closed questions of two systems that differ, of one that is as good as the second, and of
    the first under other conditions; rows of a patient are alike."""
    n = patients * QUESTIONS
    groups = np.repeat(np.arange(patients), QUESTIONS)
    ease = rng.normal(0, 0.7, patients)[groups]  # what a patient's rows have in common
    truth = rng.random(n) < 0.5
    sign = np.where(truth, 1, -1)

    def system(skill: float) -> np.ndarray:
        return sign * (skill + 0.5 * ease) + rng.normal(0, 1.2, n)

    score, other, third = system(1.0), system(0.7), system(0.7)
    said, second, equal = (_closed(s, truth) for s in (score, other, third))
    study = Study(groups)
    right, before = (score > 0) == truth, (other > 0) == truth
    noise, blind = rng.random(n) < 0.55 + 0.1 * np.tanh(ease), rng.random(n) < 0.5
    study.stats = {
        name: said[name] for name in "accuracy balanced_accuracy f1_yes macro_f1 mcc auroc".split()
    } | {
        "accuracy near 1": questions.proportion(sign * score > -1.2),
        "over_reliance_rate": questions.proportion(~right, before),
        "reference_gain": questions.proportion(right & ~before),
        "excess_copying": excess(noise, blind),
    }
    names = ("accuracy", "balanced_accuracy", "f1_yes", "mcc", "auroc")
    study.pairs = {f"difference of {m}": (said[m], second[m]) for m in names}
    study.equal = {m: (second[m], equal[m]) for m in names}
    four = np.arange(patients)[groups] % 4
    alike = questions.proportion(sign * (0.7 + 0.5 * ease) + rng.normal(0, 1.2, n) > 0)
    apart = questions.proportion(rng.random(n) < 0.6 + 0.15 * (four % 2) + 0.1 * np.tanh(ease))
    study.gaps = {"gap of 2 subgroups": (apart, four % 2), "no gap, 4 subgroups": (alike, four)}
    study.truth = {"gap of 2 subgroups": 0.15, "no gap, 4 subgroups": 0.0}
    return study


def _closed(score: np.ndarray, truth: np.ndarray) -> dict[str, AnyStat]:
    rows = np.zeros((len(truth), 6))
    rows[np.arange(len(truth)), np.where(truth, 0, 3) + np.where(score > 0, 0, 1)] = 1
    finishers = (
        questions.accuracy,
        questions.balanced_accuracy,
        questions.f1_yes,
        questions.macro_f1,
        questions.mcc,
    )
    found: dict[str, AnyStat] = {
        finish.__name__: Stat(rows, finish, score, unit=finish is not questions.mcc)
        for finish in finishers
    }
    return found | {"auroc": RankStat(score, truth, score)}


def confidence(rng: np.random.Generator, patients: int) -> Study:
    """p(yes) that is right, and that is overconfident; both have one truth behind them."""
    n = patients * QUESTIONS
    z = rng.normal(0, 1.2, n)
    right = 1 / (1 + np.exp(-z))
    study = Study(np.repeat(np.arange(patients), QUESTIONS))
    truth = rng.random(n) < right if patients < WHOLE["confidence"] else right
    for name, over in (("ece, calibrated", 1.0), ("ece, overconfident", 1.5), ("ece, much", 2.5)):
        study.stats[name] = questions.calibration_error(1 / (1 + np.exp(-z * over)), truth)
    return study


def texts(rng: np.random.Generator, patients: int) -> Study:
    """Reports with means of row scores, micro-averaged findings, corpus BLEU and ranks."""
    skill = np.clip(rng.normal(0.6, 0.15, patients), 0, 1)
    targets = rng.choice(WORDS, (patients, 12))
    other = rng.choice(WORDS, (patients, 12))
    said = np.where(rng.random((patients, 12)) < skill[:, None], targets, other)
    wanted = rng.random((patients, 10)) < 0.25
    stated = wanted ^ (rng.random((patients, 10)) > 0.5 + 0.5 * skill[:, None])
    ranks = rng.geometric(0.05 + 0.2 * skill) - 1
    stats: dict[str, AnyStat] = {
        "token_f1": questions.average(rng.beta(1 + skill, 2)),
        "rouge_l": questions.average((said == targets).mean(axis=1)),
        **questions.findings([_names(row) for row in stated], [_names(row) for row in wanted]),
        **questions.retrieval(ranks.tolist()),
    }
    bleu = text.bleu([" ".join(row) for row in said], [" ".join(row) for row in targets])
    stats |= {name: bleu[name] for name in ("bleu_1", "bleu_4")}
    return Study(np.arange(patients), stats)


def _names(row: np.ndarray) -> set[str]:
    return {str(i) for i in np.flatnonzero(row)}


KINDS: dict[str, Callable[[np.random.Generator, int], Study]] = {
    "answers": answers,
    "confidence": confidence,
    "texts": texts,
}


@cache
def truths(kind: str) -> dict[str, float]:
    """What the metrics of a kind are in the population."""
    whole = KINDS[kind](np.random.default_rng(99), WHOLE[kind])
    return (
        {name: stat.point() for name, stat in whole.stats.items()}
        | {name: a.point() - b.point() for name, (a, b) in whole.pairs.items()}
        | whole.truth
    )


def estimates_of(study: Study, seed: int, resamples: int) -> tuple[dict[str, Interval], set[str]]:
    """Every interval of a study, and which of its equal systems one would call better."""
    several = {**study.pairs, **{("equal", m): two for m, two in study.equal.items()}}
    stats = {id(s): s for s in (*study.stats.values(), *chain.from_iterable(several.values()))}
    found = resample(list(stats.values()), study.groups, resamples, seed)
    drawn = dict(zip(stats, found, strict=True))
    made = {name: interval(stat, drawn[id(stat)]) for name, stat in study.stats.items()}
    better: set[str] = set()
    for name, (a, b) in several.items():
        gap = difference(a.point() - b.point(), drawn[id(a)], drawn[id(b)], a.n)
        if isinstance(name, tuple):
            better |= {name[1]} if gap.low is not None and gap.low > 0 else set()
        else:
            made[name] = Interval(gap.value or 0.0, gap.low, gap.high, gap.n)
    common = Common(resamples=resamples, seed=seed)
    for name, (stat, member) in study.gaps.items():
        made[name] = gap_interval(stat, member, list(np.unique(member)), study.groups, common)
    return made, better


def coverage(
    kind: str, patients: int, studies: int, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[dict[str, float], dict[str, float]]:
    """(metric -> share of studies whose interval holds the truth, metric -> share in which a system
    is called better than one that is as good)."""
    known = truths(kind)
    held: dict[str, int] = defaultdict(int)
    called: dict[str, int] = defaultdict(int)
    rng = np.random.default_rng([seed, patients])
    for number in range(studies):
        study = KINDS[kind](rng, patients)
        made, better = estimates_of(study, number, resamples)
        for name, found in made.items():
            assert found.low is not None and found.high is not None, (name, found)
            held[name] += found.low - 1e-9 <= known[name] <= found.high + 1e-9
        for name in study.equal:
            called[name] += name in better
    return (
        {name: count / studies for name, count in held.items()},
        {name: count / studies for name, count in called.items()},
    )
