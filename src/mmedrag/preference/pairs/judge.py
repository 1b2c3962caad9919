"""When an answer counts as right: the condition M(·) = y of the preference construction.

Place in the picture: traces ─► *judge* ─► pairs. Three verdicts, right, wrong and unclear;
an unclear answer makes no pair in ``paper`` mode.

* Closed questions, ``paper``: the label that evaluation goes by too (hedges and non-answers are
  unclear); ``released``: the released parser (never unclear: everything without no/not in the first
  sentence is a yes).
* Reports, ``released``: nltk sentence BLEU (whitespace tokens, smoothing method 7) of the first
  sentence only; right iff at least the mean over the two conditions that are compared.
* Reports, ``paper``: the paper leaves "= y" open for reports. Ours: right iff the score reaches
  ``Criterion.report_right``, wrong iff it stays under ``report_wrong``, unclear between. The
  score is finding-F1 where exact findings are known (the caller passes it), otherwise the token
  F1 of the whole text. Without thresholds both are the mean over the two compared conditions.
* Open questions (``paper`` only): token F1 of at least ``open_right``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmedrag.records import Trace, Truth, UserError, Verdict, parse_released, token_f1, verdict


@dataclass(frozen=True)
class Criterion:
    """When a report or open answer is right.

    Args:
        report_score: trace → number, higher is better (finding-F1 on the benchmark); None takes
            the token F1 of answer and target.
        report_right / report_wrong: right iff score ≥ ``report_right``, wrong iff score <
            ``report_wrong``, unclear between. None: the mean over both compared conditions
            within the domain; ``report_wrong`` None: the same as ``report_right``.
        open_right: token F1 from which an open answer is right.
    """

    report_score: Callable[[Trace], float] | None = None
    report_right: float | None = None
    report_wrong: float | None = None
    open_right: float = 0.5

    def __post_init__(self) -> None:
        right, wrong = self.report_right, self.report_wrong
        if wrong is not None and (right is None or wrong > right):
            raise UserError(
                f"pairs: report_wrong {wrong} needs a report_right of at least as much, got {right}"
            )


def benchmark_criterion(
    truth: Mapping[str, Truth], right: float | None = 0.75, wrong: float | None = 0.5
) -> Criterion | None:
    """Reports judged by the exact finding-F1 of the benchmark; None where there is no truth.

    The F1 is over findings present: of the study (``truth.jsonl``, by ``meta.study``) and stated
    by the report (the grammar's own labeller). Normal study, normal report: 1.
    """
    if not truth:
        return None
    from mmedrag.phantom import present_in

    def score(trace: Trace) -> float:
        study = truth.get(str(trace.meta.get("study")))
        if study is None:
            raise UserError(f"pairs: {trace.example_id}: no truth for its study")
        wanted = {name for name, state in study.findings.items() if state.present}
        said = present_in(study.domain, trace.answer.text if trace.answer else "")
        total = len(wanted) + len(said)
        return 2 * len(wanted & said) / total if total else 1.0

    return Criterion(report_score=score, report_right=right, report_wrong=wrong)


def judge(
    first: Sequence[Trace], second: Sequence[Trace], mode: str, criterion: Criterion
) -> tuple[list[tuple[Verdict, Verdict]], dict[str, float]]:
    """Verdicts of aligned traces under two conditions, and the report means used per domain."""
    scorer = _first_sentence_bleu if mode == "released" else criterion.report_score or _text_f1
    scores: dict[int, float] = {}
    pooled: dict[str, list[float]] = defaultdict(list)
    for trace in (*first, *second):
        if trace.task == "report":
            scores[id(trace)] = scorer(trace)
            pooled[_domain(trace)].append(scores[id(trace)])
    means = {name: sum(values) / len(values) for name, values in sorted(pooled.items())}

    def judged(trace: Trace) -> Verdict:
        if trace.task == "report":
            right, wrong = criterion.report_right, criterion.report_wrong
            if mode == "released" or right is None:
                right = means[_domain(trace)]
                wrong = None
            score = scores[id(trace)]
            if score >= right:
                return "right"
            return "wrong" if score < (right if wrong is None else wrong) else "unclear"
        return _question(trace, mode, criterion)

    return [(judged(a), judged(b)) for a, b in zip(first, second, strict=True)], means


def _question(trace: Trace, mode: str, criterion: Criterion) -> Verdict:
    text, target = trace.answer.text if trace.answer else "", trace.target or ""
    if trace.answer_type == "open":
        if mode == "released":  # the released script knows yes/no questions only
            return "unclear"
        return "right" if token_f1(text, target) >= criterion.open_right else "wrong"
    if mode == "released":
        return "right" if parse_released(text) == parse_released(target) else "wrong"
    return verdict(trace)


def _text_f1(trace: Trace) -> float:
    return token_f1(trace.answer.text if trace.answer else "", trace.target or "")


def _first_sentence_bleu(trace: Trace) -> float:
    """The released report score: sentence BLEU-4, smoothing method 7, up to the first full stop."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    texts = (trace.answer.text if trace.answer else "", trace.target or "")
    given, target = (text.split(".")[0].split() for text in texts)
    if not given or not target:
        return 0.0
    # nltk's method 4 (inside 7) divides by log(len): one-word hypotheses have no such smoothing
    smooth = SmoothingFunction()
    method = smooth.method7 if len(given) > 1 else smooth.method1
    return float(sentence_bleu([target], given, smoothing_function=method))


def _domain(trace: Trace) -> str:
    return trace.target_domain or (trace.domain.label if trace.domain else "") or "unknown"
