"""Scores of one list of traces: every metric of the model and of its controls, with intervals.

Place in the picture: predictions and controls -> **scoring** -> a table of ``metrics.json``.
Metrics of one table share their bootstrap weights, so that differences between a model and a
control are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmedrag.evaluation.controls import GENERATOR, Prediction
from mmedrag.evaluation.metrics import questions, text as metrics_text
from mmedrag.evaluation.metrics.clinical import clinical as clinical_metrics
from mmedrag.evaluation.metrics.statistics import (
    RESAMPLES,
    AnyStat,
    Estimate,
    Interval,
    Replicates,
    clusters,
    difference,
    interval,
    resample,
)
from mmedrag.evaluation.result import ControlScore, NamedControl, Scores
from mmedrag.evaluation.runs import OVERALL
from mmedrag.phantom import present_in
from mmedrag.records import Trace, Truth, group_of
from mmedrag.runtime import DataFolder

# metrics that a control can meaningfully beat; parse_rate, ece and the like only describe
UNMARKED = frozenset(
    {"parse_rate", "ece", "unreadable_rate", "finding_precision", "finding_recall"}
)
DESCRIPTIVE = frozenset({"question_prior_loo"})  # reads test labels: shown, marks nothing


@dataclass
class GroundTruth:
    """What a DATA folder says about test rows: findings of each study, study of each reference."""

    truth: Mapping[str, Truth] = field(default_factory=dict)
    study: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataFolder | None) -> GroundTruth:
        if data is None:
            return cls()
        return cls(data.truth(), {r.id: r.meta.get("study") for r in data.corpus()})


class Scorer:
    """Turns predictions for one list of traces into metrics, for the model and every control."""

    def __init__(
        self, task: str, traces: Sequence[Trace], known: GroundTruth, clinical: bool = False
    ) -> None:
        self.clinical, self.missing = clinical and task == "report", dict[str, str]()
        self.task, self.traces = task, traces
        self.targets = [t.target for t in traces]
        self.meteor = task == "report" and metrics_text.meteor_ready()
        self.truth = [known.truth.get(str(t.meta.get("study"))) for t in traces]

    def __call__(self, answers: Prediction) -> dict[str, AnyStat]:
        if self.task == "vqa_closed":
            asked = [t.question for t in self.traces]
            return questions.closed(
                answers.texts, self.targets, answers.p_yes, asked, answers.labels
            )
        if self.task == "vqa_open":
            return questions.open_answers(answers.texts, self.targets)
        out = metrics_text.reports(answers.texts, self.targets, self.meteor)
        if self.traces and all(self.truth):
            out |= self.finding_level(answers.texts)
        if self.clinical:
            found, self.missing = clinical_metrics(answers.texts, [t or "" for t in self.targets])
            out |= found
        return out

    def finding_level(self, texts: Sequence[str]) -> dict[str, AnyStat]:
        """Exact finding-level scores on the benchmark."""
        from mmedrag.phantom import label_report

        wanted, stated, unreadable = [], [], []
        for truth, text in zip(self.truth, texts, strict=True):
            assert truth is not None
            wanted.append({n for n, state in truth.findings.items() if state.present})
            stated.append(present_in(truth.domain, text))
            read = label_report(truth.domain, text)
            unreadable.append(len(read["unreadable"]) / max(read["sentences"], 1))
        found = questions.findings(stated, wanted)
        return found | {"unreadable_rate": questions.average(unreadable)}


@dataclass
class Scored:
    """Metrics of one run and task, for the model ("model") and each control, over its rows."""

    task: str
    traces: list[Trace]
    stats: dict[str, dict[str, AnyStat]]
    not_computed: dict[str, str]
    numbers: dict[str, int] = field(default_factory=dict)  # of controls that are in common

    @property
    def model(self) -> dict[str, AnyStat]:
        return self.stats["model"]

    @property
    def domains(self) -> list[str]:
        return sorted({group_of(t) for t in self.traces})

    def rows(self, domain: str) -> np.ndarray:
        keep = [domain in (OVERALL, group_of(t)) for t in self.traces]
        return np.flatnonzero(keep)


@dataclass
class Common:
    """What the runs of one evaluation have in common: the truth, how to resample, and controls.

    A control that does not look at the run (a constant, the question prior) says the same on the
    same rows for each of them: it is scored and resampled once. ``stats``: number of the control
    -> its metrics. ``drawn``: (number, metric, group) -> its bootstrap values and interval.
    """

    known: GroundTruth = field(default_factory=GroundTruth)
    resamples: int = RESAMPLES
    seed: int = 0
    numbers: dict[Hashable, int] = field(default_factory=dict)
    stats: dict[int, dict[str, AnyStat]] = field(default_factory=dict)
    drawn: dict[Hashable, tuple[Replicates, Interval]] = field(default_factory=dict)


SAME = frozenset(
    """always_yes always_no constant constant_findings question_prior question_prior_loo
    random_reference""".split()
)


def score_all(
    task: str,
    traces: list[Trace],
    found: Mapping[str, Prediction],
    why: dict[str, str],
    common: Common,
    clinical: bool = False,
) -> Scored:
    """All metrics of the model and of the controls ``found``, before any resampling."""
    scorer = Scorer(task, traces, common.known, clinical)
    out = Scored(task, traces, {"model": scorer(Prediction.of_model(traces))}, why)
    rows = tuple((t.example_id, t.question, t.target, t.patient, group_of(t)) for t in traces)
    for name, answers in found.items():
        if name in SAME:
            key = (task, rows, tuple(answers.texts), tuple(answers.p_yes or ()))
            number = common.numbers.setdefault(key, len(common.numbers))
            if number not in common.stats:
                common.stats[number] = scorer(answers)
            out.numbers[name], out.stats[name] = number, common.stats[number]
        else:
            out.stats[name] = scorer(answers)
    out.not_computed |= scorer.missing
    return out


def tables(scored: Scored, common: Common) -> dict[str, Scores]:
    """Overall and per domain: metrics, controls, paired differences and marks."""
    return {
        domain: table(scored, scored.rows(domain), common, domain)
        for domain in (OVERALL, *scored.domains)
    }


def table(scored: Scored, rows: np.ndarray, common: Common, group: str = "") -> Scores:
    """One group of rows: every metric with interval, each control with its difference."""
    groups = clusters([scored.traces[i].patient for i in rows])
    drawn = _drawn(scored, rows, groups, common, group)
    controls: dict[str, dict[str, ControlScore]] = {}
    for (who, name), (samples, cell) in drawn.items():
        if who == "model" or ("model", name) not in drawn:
            continue
        own, mine = drawn["model", name]
        if name in questions.LOWER_IS_BETTER:
            gap = difference(cell.value - mine.value, samples, own, len(rows))
        else:
            gap = difference(mine.value - cell.value, own, samples, len(rows))
        controls.setdefault(who, {})[name] = ControlScore.of(cell, difference=gap)
    model = {name: cell for (who, name), (_, cell) in drawn.items() if who == "model"}
    failed = sum(
        scored.traces[i].error is not None or scored.traces[i].answer is None for i in rows
    )
    lows = {name: cell.low for name, cell in model.items()}
    auroc = model.get("auroc")
    return Scores(
        n=len(rows),
        patients=int(groups.max()) + 1,
        failed=failed,
        metrics={name: Estimate.of(cell) for name, cell in model.items()},
        controls=controls,
        not_computed=scored.not_computed,
        marked=marked(lows, controls),
        generator_marked=not_above(lows, controls, generator_control),
        without_p_yes=len(rows) - auroc.n if auroc else 0,
    )


Held = Mapping[str, Mapping[str, ControlScore]]  # control -> metric


def best_control(controls: Held, metric: str) -> NamedControl | None:
    """The control that a metric is held against and marked by: the one with the best value of
    those that are a system, which the generator without a picture is not."""
    return _best({k: v for k, v in controls.items() if k not in GENERATOR}, metric)


def generator_control(controls: Held, metric: str) -> NamedControl | None:
    """The generator on a picture without content, where it has the better value."""
    return _best({k: v for k, v in controls.items() if k in GENERATOR}, metric)


def _best(controls: Held, metric: str) -> NamedControl | None:
    sign = -1 if metric in questions.LOWER_IS_BETTER else 1
    found = [
        (sign * cell.value, name)
        for name, own in controls.items()
        if name not in DESCRIPTIVE and (cell := own.get(metric)) and cell.value is not None
    ]
    if not found:
        return None
    value, name = max(found)
    best = controls[name][metric]
    return NamedControl(name, sign * value, best.low, best.high, best.n)


def marked(lows: Mapping[str, float | None], controls: Held) -> dict[str, str]:
    """metric -> best control, for every score that is not clearly above its best control.

    AUROC is held against chance as well.
    """
    out = not_above(lows, controls, best_control)
    low = lows.get("auroc")
    if "auroc" in lows and (low is None or low <= 0.5):
        out["auroc"] = "chance"
    return out


def not_above(
    lows: Mapping[str, float | None], controls: Held, of: Callable[[Held, str], NamedControl | None]
) -> dict[str, str]:
    """metric -> the control ``of`` it, where the interval of the difference reaches 0 or below."""
    out: dict[str, str] = {}
    for metric in lows:
        base = metric.removesuffix("_released")
        if base in UNMARKED or base.startswith(("recall@", "mrr", "label_agreement_")):
            continue
        best = of(controls, metric)
        if best:
            bound = controls[best.name][metric].difference.low
            if bound is None or bound <= 0:
                out[metric] = best.name
    return out


def _drawn(
    scored: Scored, rows: np.ndarray, groups: np.ndarray, common: Common, group: str
) -> dict[tuple[str, str], tuple[Replicates, Interval]]:
    """(model or control, metric) -> bootstrap values and interval, from one set of weights."""
    names = [(who, name) for who, own in scored.stats.items() for name in own]
    known = {
        (who, name): (scored.numbers[who], name, group)
        for who, name in names
        if who in scored.numbers
    }
    fresh = [pair for pair in names if known.get(pair) not in common.drawn]
    shared: dict[int, np.ndarray] = {}
    stats = [scored.stats[who][name].take(rows, shared) for who, name in fresh]
    values = resample(stats, groups, common.resamples, common.seed)
    made = {
        pair: (samples, interval(stat, samples))
        for pair, stat, samples in zip(fresh, stats, values, strict=True)
    }
    common.drawn |= {known[pair]: found for pair, found in made.items() if pair in known}
    return {pair: made[pair] if pair in made else common.drawn[known[pair]] for pair in names}
