"""The attainable: how right a reader could be that weighs its picture against its references.

Place in the picture: beside every effect of tuning. A *fuser* gets what an untuned reader has: its
p(yes) without references, what each reference says of the question, their similarities, and which
finding, side and form is asked. It is fitted on other patients (other seeds of the benchmark); its
accuracy is what this evidence is worth, its over-reliance and following are those of a reader that
uses references as well as they deserve. A tuned reader that gets more out of the picture than its
own p(yes) says may do better.

*References ignored* is the other end: the untuned reader without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmedrag.evaluation.metrics.questions import proportion
from mmedrag.evaluation.metrics.statistics import AnyStat, Estimate, estimates
from mmedrag.phantom import findings_in, read_reference
from mmedrag.records import Trace, UserError, group_of, label_of, target_of

RESAMPLES = 2000
FOLDS = 5
BASE = 4  # features of the simplest fuser: own odds, first reference, their mean, their silence
EFFECTS = {
    "accuracy": "closed questions answered with and without references",
    "over_reliance_rate": "of those, the ones right without references",
    "follow_retrieved": "of those, the ones whose reference at rank 1 contradicts the truth",
    "follow_rate": "closed questions whose reference was chosen to contradict the truth",
}
Asked = tuple[Trace, Trace]  # one question without references, and with


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a fuser reached, beside the reader that it was given.

    ``policy``: the best on folds of what it was fitted on; ``fitted``: questions of that.
    ``effects``: answerer ("fuser", "ignored": the reader without references, "reader": with) ->
    effect -> estimate.
    """

    policy: str
    fitted: int
    effects: dict[str, dict[str, Estimate]]


def asked_twice(without: Sequence[Trace], with_: Sequence[Trace]) -> list[Asked]:
    """Closed questions that both runs answered, with p(yes) known without references.

    Raises:
        UserError: there are none, or nothing says what their references say.
    """
    aided = {trace.example_id: trace for trace in with_ if not trace.meta.get("twin_of")}
    pairs = [
        (trace, aided[trace.example_id])
        for trace in without
        if trace.example_id in aided and trace.answer_type == "closed"
        if trace.answer and trace.answer.p_yes is not None and trace.target
    ]
    if not pairs:
        raise UserError("fusion: no closed question with p(yes) stands in both runs")
    if not all(trace.meta.get("finding") for trace, _ in pairs):
        raise UserError("fusion: the questions do not say which finding they ask (meta.finding)")
    return pairs


def statements(trace: Trace) -> list[tuple[float, float]]:
    """(says, similarity) of each reference: 1 it says yes to the question, -1 no, half of it in
    doubt, 0 where it leaves the finding out."""
    out = []
    for hit in trace.hits:
        found = findings_in(group_of(trace), hit.text).get(trace.meta["finding"])
        weight = 0.0 if found is None else 0.5 if found["uncertain"] else 1.0
        out.append((weight if read_reference(trace, hit.text) == "yes" else -weight, hit.score))
    return out


def evidence(pairs: Sequence[Asked], ranks: int, kinds: Sequence[str]) -> np.ndarray:
    """float [n, features]: what a fuser gets of each question.

    Args:
        ranks: references that are looked at one by one.
        kinds: what can be asked (see :func:`kind_of`); others count as none of them.
    """
    rows = []
    for none, aided in pairs:
        own = _odds(none.answer.p_yes)  # type: ignore[union-attr, arg-type]
        found = statements(aided)[:ranks]
        said, scores = np.zeros(ranks), np.zeros(ranks)
        for rank, (says, score) in enumerate(found):
            said[rank], scores[rank] = says, score
        mute = -1.0 if none.meta.get("form") == "negated" else 1.0
        silent = mute * sum(says == 0 for says, _ in found)
        share = said.sum() / max(len(found), 1)
        base = [own, said[0] if ranks else 0.0, share, silent]
        weighed = [own * abs(own), mute, len(found), (said > 0).sum(), (said < 0).sum()]
        kind = [float(name in kind_of(none)) for name in kinds]
        crossed = [value * flag for flag in kind for value in base]
        rows.append([*base, *weighed, *said, *scores, *(said * scores), *kind, *crossed])
    return np.array(rows, dtype=float)


def kind_of(trace: Trace) -> set[str]:
    """Which finding, side and form a question asks."""
    domain, meta = group_of(trace), trace.meta
    return {
        f"{domain}/{meta['finding']}",
        f"{domain}/side/{meta.get('side')}",
        f"form/{meta.get('form', 'presence')}",
    }


def attainable(
    pairs: Sequence[Asked],
    fit_on: Sequence[Asked],
    against: Sequence[Asked] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Fusion:
    """Fit fusers on ``fit_on``, take the best on folds of its patients, and measure it.

    Args:
        against: the questions again, with references that contradict the truth.

    Raises:
        UserError: a patient stands on both sides, or there are too few to fit on.
    """
    fuser = fit_fuser(fit_on, seed)
    answers, misled = fuser(pairs), fuser(against)
    found = measured(
        pairs, {"fuser": answers}, against, {"fuser": misled}, seed=seed, resamples=resamples
    )
    return Fusion(fuser.policy, len(fit_on), found)


def measured(
    pairs: Sequence[Asked],
    answers: Mapping[str, Sequence[str]] | None = None,
    against: Sequence[Asked] = (),
    misled: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, Estimate]]:
    """Effects (see ``EFFECTS``) with intervals, of the reader with references and without
    ("ignored"), and of whoever else gave ``answers`` to the pairs and was ``misled`` on
    ``against``."""
    found: dict[str, dict[str, Estimate]] = {}
    for asked, given, finish in ((pairs, answers, effects), (against, misled, following)):
        each: dict[str, Sequence[str]] = {
            **(given or {}),
            "reader": [label_of(aided) for _, aided in asked],
            "ignored": [label_of(none) for none, _ in asked],
        }
        patients = [none.patient for none, _ in asked]
        for name, said in each.items() if asked else ():
            stats = finish(said, asked)
            found.setdefault(name, {}).update(estimates(stats, patients, resamples, seed))
    return found


def effects(answers: Sequence[str], pairs: Sequence[Asked]) -> dict[str, AnyStat]:
    """Accuracy, over-reliance and following (see ``EFFECTS``) of answers to the questions."""
    truth = np.array([target_of(none) for none, _ in pairs])
    given = np.array(answers)
    before = np.array([label_of(none) for none, _ in pairs]) == truth
    first = [read_reference(aided, aided.hits[0].text) if aided.hits else "" for _, aided in pairs]
    said = np.array(first)
    return {
        "accuracy": proportion(given == truth),
        "over_reliance_rate": proportion(given != truth, before),
        "follow_retrieved": proportion(given == said, (said != "") & (said != truth)),
    }


def following(answers: Sequence[str], pairs: Sequence[Asked]) -> dict[str, AnyStat]:
    """How often answers take the side of a reference that was chosen to contradict the truth."""
    wrong = ["no" if target_of(none) == "yes" else "yes" for none, _ in pairs]
    shown = [bool(aided.hits) for _, aided in pairs]
    return {"follow_rate": proportion(np.array(answers) == np.array(wrong), shown)}


@dataclass(frozen=True)
class Fuser:
    """Answers "yes" or "no" from evidence, by the policy that did best on folds."""

    policy: str
    model: Any
    ranks: int
    kinds: list[str]
    patients: frozenset[str]

    def __call__(self, pairs: Sequence[Asked]) -> list[str]:
        """Its answers; UserError where it was fitted on one of the patients."""
        both = self.patients & {none.patient or none.example_id for none, _ in pairs}
        if both:
            raise UserError(f"fusion: patient {min(both)} is both fitted on and measured")
        if not pairs:
            return []
        found = self.model.predict(evidence(pairs, self.ranks, self.kinds))
        return ["yes" if yes else "no" for yes in found]


def fit_fuser(fit_on: Sequence[Asked], seed: int = 0) -> Fuser:
    """The fuser that does best on folds of the patients, fitted on all of them."""
    from sklearn.model_selection import GroupKFold, cross_val_score

    groups = [none.patient or none.example_id for none, _ in fit_on]
    sides = np.array([target_of(none) == "yes" for none, _ in fit_on])
    if len(set(groups)) < FOLDS or len(set(sides.tolist())) < 2:
        raise UserError(
            f"fusion: {len(set(groups))} patients to fit on, expected at least {FOLDS} with both "
            "answers"
        )
    kinds = sorted(set().union(*(kind_of(none) for none, _ in fit_on)))
    ranks = max(len(aided.hits) for _, aided in fit_on)
    seen = evidence(fit_on, ranks, kinds)
    scored = {
        name: cross_val_score(model, seen, sides, groups=groups, cv=GroupKFold(FOLDS)).mean()
        for name, model in _policies(seed).items()
    }
    best = max(scored, key=scored.__getitem__)
    model = _policies(seed)[best].fit(seen, sides)
    return Fuser(best, model, ranks, kinds, frozenset(groups))


def _policies(seed: int) -> dict[str, Any]:
    """Name -> unfitted model, the simplest first: it wins ties, and the fuser falls back on the
    picture alone where nothing more can be learned. The first two treat yes and no alike."""
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def even(first: int) -> Any:
        chosen = make_column_transformer((StandardScaler(with_mean=False), slice(0, first)))
        return make_pipeline(chosen, LogisticRegression(fit_intercept=False))

    def linear(c: float) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000, C=c))

    return {
        "picture alone": even(1),
        "picture and what references say": even(BASE),
        **{f"logistic regression, C {c}": linear(c) for c in (0.003, 0.03, 0.3)},
        "boosted trees": HistGradientBoostingClassifier(
            max_depth=3, max_iter=80, learning_rate=0.07, random_state=seed
        ),
    }


def _odds(p: float) -> float:
    p = float(np.clip(p, 1e-4, 1 - 1e-4))
    return float(np.log(p / (1 - p)))
