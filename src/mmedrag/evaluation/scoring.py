"""Scores of one list of traces: every metric of the model and of its controls, with intervals.

Place in the picture: predictions and controls -> **scoring** -> a table of ``metrics.json``.
Metrics of one table share their bootstrap weights, so that differences between a model and a
control are paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmedrag.evaluation.arms import OVERALL
from mmedrag.evaluation.compare import marked
from mmedrag.evaluation.metrics import questions, text as metrics_text
from mmedrag.evaluation.metrics.clinical import clinical as clinical_metrics
from mmedrag.evaluation.metrics.statistics import (
    AnyStat,
    Interval,
    clusters,
    difference,
    interval,
    resample,
)
from mmedrag.evaluation.predictions import Prediction, said_by
from mmedrag.phantom import present_in
from mmedrag.records import Trace, Truth, group_of
from mmedrag.runtime import DataFolder


@dataclass
class Facts:
    """What a DATA folder says about test rows: findings of each study, study of each reference."""

    truth: Mapping[str, Truth] = field(default_factory=dict)
    study: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataFolder | None) -> Facts:
        if data is None:
            return cls()
        return cls(data.truth(), {r.id: r.meta.get("study") for r in data.corpus()})


class Scorer:
    """Turns predictions for one list of traces into metrics, for the model and every control."""

    def __init__(
        self, task: str, traces: Sequence[Trace], facts: Facts, clinical: bool = False
    ) -> None:
        self.clinical, self.missing = clinical and task == "report", dict[str, str]()
        self.task, self.traces = task, traces
        self.targets = [t.target for t in traces]
        self.meteor = task == "report" and metrics_text.meteor_ready()
        self.truth = [facts.truth.get(str(t.meta.get("study"))) for t in traces]

    def __call__(self, said: Prediction) -> dict[str, AnyStat]:
        if self.task == "vqa_closed":
            asked = [t.question for t in self.traces]
            return questions.closed(said.texts, self.targets, said.p_yes, asked)
        if self.task == "vqa_open":
            return questions.open_answers(said.texts, self.targets)
        out = metrics_text.reports(said.texts, self.targets, self.meteor)
        if self.traces and all(self.truth):
            out |= self.finding_level(said.texts)
        if self.clinical:
            found, self.missing = clinical_metrics(said.texts, [t or "" for t in self.targets])
            out |= found
        return out

    def finding_level(self, texts: Sequence[str]) -> dict[str, AnyStat]:
        """Exact finding-level scores on the benchmark."""
        from mmedrag.phantom import label_report

        wanted, said, unreadable = [], [], []
        for truth, text in zip(self.truth, texts, strict=True):
            assert truth is not None
            wanted.append({n for n, state in truth.findings.items() if state.present})
            said.append(present_in(truth.domain, text))
            read = label_report(truth.domain, text)
            unreadable.append(len(read["unreadable"]) / max(read["sentences"], 1))
        found = questions.findings(said, wanted)
        return found | {"unreadable_rate": questions.average(unreadable)}


@dataclass
class Scored:
    """Metrics of one arm and task, for the model ("model") and each control, over its rows."""

    task: str
    traces: list[Trace]
    stats: dict[str, dict[str, AnyStat]]
    not_computed: dict[str, str]
    keys: dict[str, Hashable] = field(default_factory=dict)  # controls that are in common

    @property
    def domains(self) -> list[str]:
        return sorted({group_of(t) for t in self.traces})

    def rows(self, domain: str) -> np.ndarray:
        keep = [domain in (OVERALL, group_of(t)) for t in self.traces]
        return np.flatnonzero(keep)


@dataclass
class Common:
    """What arms have in common. A control that does not look at the arm (a constant, the question
    prior) says the same on the same rows for each of them: it is scored and resampled once.

    ``drawn``: (control's key, metric, group) -> its bootstrap values and interval.
    """

    stats: dict[Hashable, dict[str, AnyStat]] = field(default_factory=dict)
    drawn: dict[Hashable, tuple[np.ndarray, Interval]] = field(default_factory=dict)

    def score(self, key: Hashable, scorer: Scorer, said: Prediction) -> dict[str, AnyStat]:
        if key not in self.stats:
            self.stats[key] = scorer(said)
        return self.stats[key]


SAME = frozenset(
    {
        "always_yes",
        "always_no",
        "constant",
        "constant_findings",
        "question_prior",
        "question_prior_loo",
        "random_reference",
    }
)


def score_all(
    task: str,
    traces: list[Trace],
    scorer: Scorer,
    found: Mapping[str, Prediction],
    why: dict[str, str],
    common: Common | None = None,
) -> Scored:
    """All metrics of the model and of the controls ``found``, before any resampling."""
    common = common or Common()
    out = Scored(task, traces, {"model": scorer(said_by(traces))}, why)
    rows = tuple((t.example_id, t.question, t.target, t.patient, group_of(t)) for t in traces)
    for name, said in found.items():
        if name in SAME:
            out.keys[name] = (task, rows, tuple(said.texts), tuple(said.p_yes or ()))
            out.stats[name] = common.score(out.keys[name], scorer, said)
        else:
            out.stats[name] = scorer(said)
    out.not_computed |= scorer.missing
    return out


def tables(
    scored: Scored, resamples: int, seed: int, common: Common | None = None
) -> dict[str, Any]:
    """Overall and per domain: metrics, controls, paired differences and marks."""
    common = common or Common()
    return {
        domain: table(scored, scored.rows(domain), resamples, seed, common, domain)
        for domain in (OVERALL, *scored.domains)
    }


def table(
    scored: Scored,
    rows: np.ndarray,
    resamples: int,
    seed: int,
    common: Common | None = None,
    group: str = "",
) -> dict[str, Any]:
    """One group of rows: every metric with interval, each control with its difference."""
    groups = clusters([scored.traces[i].patient for i in rows])
    drawn = _drawn(scored, rows, groups, resamples, seed, common or Common(), group)
    controls: dict[str, dict[str, Any]] = {}
    for (who, name), (samples, cell) in drawn.items():
        if who == "model" or ("model", name) not in drawn:
            continue
        sign = -1 if name in questions.LOWER_IS_BETTER else 1
        own, mine = drawn["model", name]
        gap = difference(
            sign * (mine.value - cell.value),
            sign * own,
            sign * samples,
            len(rows),
            int(groups.max()) + 1,
        )
        controls.setdefault(who, {})[name] = {**cell.as_dict(), "difference": gap.as_dict()}
    model = {name: cell for (who, name), (_, cell) in drawn.items() if who == "model"}
    failed = sum(
        scored.traces[i].error is not None or scored.traces[i].answer is None for i in rows
    )
    return {
        "n": len(rows),
        "patients": int(groups.max()) + 1,
        "failed": failed,
        "metrics": {name: cell.as_dict() for name, cell in model.items()},
        "controls": controls,
        "not_computed": scored.not_computed,
        "marked": marked({name: cell.low for name, cell in model.items()}, controls),
    }


def _drawn(
    scored: Scored,
    rows: np.ndarray,
    groups: np.ndarray,
    resamples: int,
    seed: int,
    common: Common,
    group: str,
) -> dict[tuple[str, str], tuple[np.ndarray, Interval]]:
    """(model or control, metric) -> bootstrap values and interval, from one set of weights."""
    names = [(who, name) for who, own in scored.stats.items() for name in own]
    known = {
        (who, name): (scored.keys[who], name, group) for who, name in names if who in scored.keys
    }
    fresh = [pair for pair in names if known.get(pair) not in common.drawn]
    shared: dict[int, np.ndarray] = {}
    stats = [scored.stats[who][name].take(rows, shared) for who, name in fresh]
    made = {
        pair: (samples, interval(stat, samples, groups))
        for pair, stat, samples in zip(
            fresh, stats, resample(stats, groups, resamples, seed), strict=True
        )
    }
    common.drawn |= {known[pair]: found for pair, found in made.items() if pair in known}
    return {pair: made[pair] if pair in made else common.drawn[known[pair]] for pair in names}
