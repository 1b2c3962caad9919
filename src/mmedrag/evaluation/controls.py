"""Controls: what a system that does not look, does not read or does not think would score.

Place in the picture: beside every score. Each control is a :class:`Prediction` for the same
rows, so that the same metrics and the same resamples apply and differences are paired.

| control | answers | needs |
|---|---|---|
| always_yes, always_no | one word | nothing |
| constant | the best single answer or report, chosen on train (by ROUGE-L) | --data |
| constant_findings | the train report with the best finding F1 on train | --data, benchmark |
| constant_retrieved | the reference that was most often retrieved first | hits |
| copied_reference | the top-1 reference (questions: what it says of the finding) | hits |
| reference_vote | what most of the kept references say (none kept: the top-1) | questions, hits |
| shuffled_references | the top-1 reference of another patient's row, same domain | hits |
| random_reference | any train reference of the domain | --data |
| question_prior | the train majority answer to the same question text | --data |
| question_prior_loo | the other test rows' majority answer to it (leave-one-out) | nothing |
| system_blank | the whole system on a blank picture, its retrieval too | such a run |
| run_shuffled, run_random | the system with others' references | such a run |
| generator_blank, generator_noise | the model on a picture without content, with the references \
of the clean one | such a run |

Those of the generator (:data:`GENERATOR`) say whether it looks at its picture, and stand apart: a
system whose retrieval saw the clean picture is not one that sees nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mmedrag.evaluation.metrics import text as metrics_text
from mmedrag.evaluation.runs import SystemRun
from mmedrag.phantom import present_in, read_reference
from mmedrag.records import (
    WITH_REFERENCES,
    Example,
    Label,
    Reference,
    Trace,
    Truth,
    group_of,
    label_of,
    normalise,
    read_target,
    target_of,
)
from mmedrag.runtime import DataFolder, numpy_rng

GENERATOR = ("generator_blank", "generator_noise")
NEEDS_DATA = "needs training data: give --data"
NEEDS_HITS = "no references were retrieved in this run"
NOT_READABLE = "reading a reference for a question needs the benchmark (meta.finding)"


AnswerCounts = Mapping[tuple[str | None, str | None], Counter[str]]  # domain, question text


@dataclass(frozen=True)
class Prediction:
    """The answers of a predictor, in the order of the rows."""

    texts: list[str]
    p_yes: list[float | None] | None = None
    labels: list[Label] | None = None  # of closed answers that have been read already

    @classmethod
    def of_model(cls, traces: Sequence[Trace]) -> Prediction:
        """The model's own answers; a failed row answers nothing."""
        answers = [None if t.error else t.answer for t in traces]
        return cls(
            [a.text if a else "" for a in answers],
            [a.p_yes if a else None for a in answers],
            [label_of(t) for t in traces],
        )


@dataclass
class TrainingData:
    """The part of a DATA folder that controls may learn from: split ``train`` alone."""

    examples: list[Example] = field(default_factory=list)
    corpus: list[Reference] = field(default_factory=list)
    truth: Mapping[str, Truth] = field(default_factory=dict)

    @cached_property
    def closed(self) -> AnswerCounts:
        """The labels of the closed questions."""
        rows = self._questions("closed")
        return count_answers(rows, [read_target(e.answer, e.question) for e in rows])

    @cached_property
    def open(self) -> AnswerCounts:
        """The answers to the open questions."""
        rows = self._questions("open")
        return count_answers(rows, [e.answer or "" for e in rows])

    def _questions(self, answer_type: str) -> list[Example]:
        return [
            e
            for e in self.examples
            if e.task == "vqa" and e.answer_type == answer_type and e.answer
        ]

    @cached_property
    def constants(self) -> dict[str, tuple[str, str | None]]:
        """domain -> (best constant by ROUGE-L, by finding F1), chosen on the train reports."""
        return {
            domain: (best_constant([text for text, _ in rows]), best_findings(domain, rows))
            for domain, rows in sorted(_train_reports(self).items())
        }

    @classmethod
    def of(cls, data: DataFolder | None) -> TrainingData | None:
        if data is None:
            return None
        return cls(data.examples(split="train"), data.corpus(split="train"), data.truth())


def count_answers(rows: Sequence[Example], answers: Sequence[str]) -> AnswerCounts:
    """How often each answer was given: by domain and question text, by one of them, and at all."""
    counts: dict[tuple[str | None, str | None], Counter[str]] = defaultdict(Counter)
    for row, answer in zip(rows, answers, strict=True):
        domain, question = row.domain or "unspecified", normalise(row.question or "")
        for key in ((domain, question), (domain, None), (None, question), (None, None)):
            counts[key][answer] += 1
    return dict(counts)


Controls = tuple[dict[str, Prediction], dict[str, str]]


def closed_controls(traces: Sequence[Trace], train: TrainingData | None, seed: int = 0) -> Controls:
    """Controls of yes/no questions: (computed, name -> why not computed)."""
    n = len(traces)
    truth = [target_of(t) for t in traces]
    out = {
        "always_yes": Prediction(["yes"] * n),
        "always_no": Prediction(["no"] * n),
        "question_prior_loo": leave_one_out_prior([t.question or "" for t in traces], truth),
    }
    known = train.closed if train else {}
    if known:
        out["constant"] = Prediction(_commonest(known, traces))
        out["question_prior"] = question_prior(known, traces)
    missing = {} if known else _nothing_to_learn(train, "closed")
    return _with_references(out, missing, traces, train, seed, _readable(traces), read_reference)


def _nothing_to_learn(train: TrainingData | None, answer_type: str) -> dict[str, str]:
    why = NEEDS_DATA if train is None else f"the data has no {answer_type} train questions"
    return {"constant": why, "question_prior": why}


def _commonest(known: AnswerCounts, traces: Sequence[Trace]) -> list[str]:
    """The commonest train answer of each trace's domain; of all where its domain has none."""
    best = {key: counts.most_common(1)[0][0] for key, counts in known.items() if key[1] is None}
    return [best.get((group_of(t), None), best[None, None]) for t in traces]


def _readable(traces: Sequence[Trace]) -> bool:
    """Do the questions say which finding they ask about?"""
    return all(t.meta.get("finding") and t.meta.get("form") for t in traces)


def open_controls(traces: Sequence[Trace], train: TrainingData | None, seed: int = 0) -> Controls:
    """Controls of open questions: most common train answer, question prior, references."""
    known = train.open if train else {}
    out: dict[str, Prediction] = {}
    if known:
        constant = _commonest(known, traces)
        keys = [(None, normalise(t.question or "")) for t in traces]
        prior = [
            known[key].most_common(1)[0][0] if key in known else other
            for key, other in zip(keys, constant, strict=True)
        ]
        out = {"constant": Prediction(constant), "question_prior": Prediction(prior)}
    missing = {} if known else _nothing_to_learn(train, "open")
    return _with_references(out, missing, traces, train, seed, _readable(traces), read_reference)


def report_controls(traces: Sequence[Trace], train: TrainingData | None, seed: int = 0) -> Controls:
    """Controls of report generation."""
    out: dict[str, Prediction] = {}
    missing: dict[str, str] = {}
    best = train.constants if train else {}
    if not best:
        missing["constant"] = NEEDS_DATA if train is None else "the data has no train reports"
    elif not {group_of(t) for t in traces} <= set(best):
        missing["constant"] = "the data has no train reports of every domain of this run"
    else:
        out["constant"] = Prediction([best[group_of(t)][0] for t in traces])
        if all(best[group_of(t)][1] for t in traces):
            out["constant_findings"] = Prediction([best[group_of(t)][1] or "" for t in traces])
    return _with_references(out, missing, traces, train, seed, True, lambda trace, text: text)


def _with_references(
    out: dict[str, Prediction],
    missing: dict[str, str],
    traces: Sequence[Trace],
    train: TrainingData | None,
    seed: int,
    readable: bool,
    say: Callable[[Trace, str], str],
) -> Controls:
    """Add the controls that answer with somebody's reference."""
    names = ("copied_reference", "shuffled_references", "constant_retrieved")
    voted = ("reference_vote",) if all(t.task == "vqa" for t in traces) else ()
    if not readable:
        return out, missing | dict.fromkeys((*names, *voted, "random_reference"), NOT_READABLE)
    if any(t.hits for t in traces):
        top = [t.hits[0].text if t.hits else "" for t in traces]
        most = {
            g: Counter(filter(None, (top[i] for i in ids))).most_common(1)
            for g, ids in _by(traces, group_of).items()
        }
        constant = [most[g][0][0] if most[g := group_of(t)] else "" for t in traces]
        for name, texts in zip(names, (top, shuffled(traces, top, seed), constant), strict=True):
            out[name] = Prediction([say(t, text) for t, text in zip(traces, texts, strict=True)])
        if voted:
            out["reference_vote"] = Prediction([vote(t, say) for t in traces])
    else:
        missing |= dict.fromkeys((*names, *voted), NEEDS_HITS)
    texts_of: dict[str, list[str]] = {}
    for reference in train.corpus if train else []:
        if reference.text:
            texts_of.setdefault(reference.domain or "unspecified", []).append(reference.text)
    if train is None:
        missing["random_reference"] = NEEDS_DATA
    elif not all(texts_of.get(group_of(t)) for t in traces):
        missing["random_reference"] = "the data has no train references of every domain"
    else:
        rng = numpy_rng(seed, 1)
        drawn = [texts_of[g][rng.integers(len(texts_of[g]))] for g in map(group_of, traces)]
        out["random_reference"] = Prediction(
            [say(t, text) for t, text in zip(traces, drawn, strict=True)]
        )
    return out, missing


def vote(trace: Trace, say: Callable[[Trace, str], str]) -> str:
    """What most of the kept references say, the best-ranked ones where as many say another thing;
    the first hit where none was kept."""
    ids = set(trace.selection.kept) if trace.selection else set()
    kept = [hit for hit in trace.hits if hit.id in ids] or trace.hits[:1]
    said = Counter(filter(None, (say(trace, hit.text) for hit in kept)))
    return said.most_common(1)[0][0] if said else ""


def shuffled(traces: Sequence[Trace], texts: Sequence[str], seed: int = 0) -> list[str]:
    """Each row gets the text of another patient's row of its domain, in a seeded order."""
    out = list(texts)
    rng = numpy_rng(seed, 2)
    for ids in _by(traces, group_of).values():
        order = [int(i) for i in rng.permutation(ids)]
        for place, i in enumerate(order):
            others = (order[(place + step) % len(order)] for step in range(1, len(order)))
            out[i] = next((texts[j] for j in others if _apart(traces[i], traces[j])), "")
    return out


def _apart(a: Trace, b: Trace) -> bool:
    """Different patients; where patients are unknown, different images."""
    if a.patient is None or b.patient is None:
        return a.image != b.image or a.image is None
    return a.patient != b.patient


def leave_one_out_prior(
    questions: Sequence[str], truth: Sequence[str], key_of: Callable[[str], str] = normalise
) -> Prediction:
    """Majority label among the *other* rows with the same question text; without any, or at a
    tie, the majority of all other rows. It reads test labels: a ceiling for question-only
    guessing, not a system."""
    keys = [key_of(q) for q in questions]
    yes_of, all_of = Counter[str](), Counter[str]()
    for key, label in zip(keys, truth, strict=True):
        yes_of[key] += label == "yes"
        all_of[key] += 1
    total_yes, total = sum(yes_of.values()), len(keys)
    shares: list[float | None] = []
    texts = []
    for key, label in zip(keys, truth, strict=True):
        own = label == "yes"
        yes, count = yes_of[key] - own, all_of[key] - 1
        base = (total_yes - own) / max(total - 1, 1)
        share = yes / count if count else base
        shares.append(share)
        texts.append("yes" if (share if share != 0.5 else base) >= 0.5 else "no")
    return Prediction(texts, shares)


def question_prior(known: AnswerCounts, traces: Sequence[Trace]) -> Prediction:
    """Train majority per (domain, question text), else of the domain; p_yes is the share of
    yes with one pseudo-count of the domain's share."""
    shares: list[float | None] = []
    for trace in traces:
        domain = group_of(trace)
        base = known.get((domain, None)) or known[None, None]
        prior = base["yes"] / base.total()
        own = known.get((domain, normalise(trace.question or "")), Counter())
        shares.append((own["yes"] + prior) / (own.total() + 1))
    return Prediction(["yes" if (s or 0) >= 0.5 else "no" for s in shares], shares)


def best_constant(reports: Sequence[str], seed: int = 0, pool: int = 400) -> str:
    """The report that, said of every study, scores the best mean ROUGE-L on the others.

    A word-overlap matrix over a seeded sample picks 8 candidates; exact ROUGE-L on 60 reports
    decides. Ties go to the first in alphabetical order.
    """
    rng = numpy_rng(seed, 3)
    distinct = sorted(set(reports))
    rows = sorted(reports)
    sample = [rows[i] for i in sorted(rng.permutation(len(rows))[:pool])]
    candidates = [distinct[i] for i in sorted(rng.permutation(len(distinct))[:pool])]
    overlap = word_f1(candidates, sample).mean(axis=1)
    best = [candidates[i] for i in np.argsort(-overlap, kind="stable")[:8]]
    check = [sample[i] for i in sorted(rng.permutation(len(sample))[:60])]
    scores = [metrics_text.rouge([b] * len(check), check)["rouge_l"].point() for b in best]
    return best[int(np.argmax(scores))]


def word_f1(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Clipped word-overlap F1 [len(a), len(b)]."""
    bags = [Counter(metrics_text.words(t)) for t in (*a, *b)]
    vocabulary = {w: i for i, w in enumerate(sorted(set().union(*bags)))}
    counts = np.zeros((len(bags), len(vocabulary)))
    for i, bag in enumerate(bags):
        for word, count in bag.items():
            counts[i, vocabulary[word]] = count
    left, right = counts[: len(a)], counts[len(a) :]
    common = np.zeros((len(a), len(b)))
    for level in range(1, int(counts.max(initial=0)) + 1):  # min(x, y) = sum of [x>=l][y>=l]
        common += (left >= level).astype(float) @ (right >= level).T.astype(float)
    lengths = left.sum(1)[:, None] + right.sum(1)[None]
    return 2 * common / np.maximum(lengths, 1)


def best_findings(domain: str, rows: Sequence[tuple[str, Truth | None]]) -> str | None:
    """The train report whose stated findings have the best micro F1 over the train truth;
    None outside the benchmark."""
    from mmedrag.phantom import DOMAINS

    known = [truth for _, truth in rows if truth]
    if domain not in DOMAINS or not known:
        return None
    names = sorted(known[0].findings)
    truth = np.array([[t.findings[n].present for n in names] for t in known], dtype=float)
    texts = sorted({text for text, _ in rows})[:2000]
    stated = np.array([[n in present_in(domain, text) for n in names] for text in texts], float)
    hits = (stated @ truth.T).sum(axis=1)
    f1 = 2 * hits / np.maximum(stated.sum(1) * len(truth) + truth.sum(), 1)
    return texts[int(np.argmax(f1))]


def _train_reports(train: TrainingData) -> dict[str, list[tuple[str, Truth | None]]]:
    """domain -> (report, truth) of the train examples with task ``report``."""
    out: dict[str, list[tuple[str, Truth | None]]] = defaultdict(list)
    for e in train.examples:
        if e.task == "report" and e.answer:
            truth = train.truth.get(str(e.meta.get("study")))
            out[e.domain or "unspecified"].append((e.answer, truth))
    return dict(out)


def _by(rows: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        out[key(row)].append(i)
    return dict(sorted(out.items()))


def control_predictions(
    run: SystemRun, task: str, runs: Sequence[SystemRun], train: TrainingData | None, seed: int
) -> Controls:
    """All controls of a run: from data and hits, and from other runs of the same system."""
    traces = run.of_task(task)
    make = {"vqa_closed": closed_controls, "vqa_open": open_controls, "report": report_controls}
    found, missing = make[task](traces, train, seed)
    if not run.plain:  # itself a control, or a probe, of the plain runs
        return found, missing
    missing |= {
        "generator_noise": "needs a run of this system with --noise",
        "generator_blank": "needs a run of this system with --noise blank",
    }
    if run.references in WITH_REFERENCES:
        missing["run_shuffled"] = "needs a run of this system with --references shuffled"
        missing["run_random"] = "needs a run of this system with --references random"
        missing["system_blank"] = "needs a run of this system with --noise blank --references shown"
    else:
        missing["system_blank"] = missing["generator_blank"]
    for other in runs:
        names = [name for name in _control_names(run, other) if name not in found]
        if not names:
            continue
        rows = {t.example_id: t for t in other.of_task(task)}
        covered = sum(t.example_id in rows for t in traces)
        if covered == len(traces):
            found |= dict.fromkeys(names, Prediction.of_model([rows[t.example_id] for t in traces]))
            missing = {name: why for name, why in missing.items() if name not in names}
        elif covered:
            missing |= dict.fromkeys(names, f"{other.name} covers {covered} of {len(traces)} rows")
    return found, missing


def _control_names(run: SystemRun, other: SystemRun) -> tuple[str, ...]:
    """Which controls of a run another one is."""
    if other is run or not run.belongs(other):
        return ()
    theirs, retrieves = other.references, run.references in WITH_REFERENCES
    if other.image != "clean" and theirs == run.references:
        if other.image != "noise:blank":
            return ("generator_noise",)
        # a system without retrieval is its generator
        return ("generator_blank",) if retrieves else ("generator_blank", "system_blank")
    if retrieves and (other.image, theirs) == ("noise:blank", "shown"):
        return ("system_blank",)
    if retrieves and other.image == "clean" and theirs in ("shuffled", "random"):
        return (f"run_{theirs}",)
    return ()
