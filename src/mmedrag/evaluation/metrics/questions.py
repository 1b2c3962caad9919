"""Metrics of short answers over predictions and targets; reports are in ``text``.

Place in the picture: ``Trace`` -> metrics -> ``Score``. Every function takes aligned lists and
returns named ``statistics.Stat`` objects; no model and no file is touched.

An answer that cannot be read (``unclear``) or that failed counts as wrong for its class, never
as a missing row: otherwise a system would gain by not answering what is hard.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from mmedrag.evaluation.metrics.statistics import AnyStat, RankStat, Stat, mean_of, ratio
from mmedrag.records import (
    Label,
    normalise,
    parse_released,
    read_target,
    read_text,
    token_f1,
    without_reasoning,
)

CONTRACT_NAMES = tuple(
    """accuracy balanced_accuracy f1_yes macro_f1 mcc auroc ece parse_rate exact_match token_f1
    bleu_1 bleu_2 bleu_3 bleu_4 rouge_1 rouge_2 rouge_l meteor finding_f1 recall@k mrr
    copy_reference_rate excess_copying over_reliance_rate follow_rate image_sensitivity
    image_sensitivity_refs reference_gain reference_harm""".split()
)
LOWER_IS_BETTER = frozenset({"ece", "unreadable_rate"})
LABELS = ("yes", "no", "unclear")
BINS = 10


def confusion(labels: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """[n, 6] one-hot over (target yes: yes, no, unclear; target no: yes, no, unclear)."""
    rows = np.zeros((len(targets), 6))
    for i, (label, target) in enumerate(zip(labels, targets, strict=True)):
        rows[i, 3 * (target == "no") + LABELS.index(label)] = 1
    return rows


def accuracy(c: np.ndarray) -> np.ndarray:
    return ratio(c[..., 0] + c[..., 4], c.sum(axis=-1))


def balanced_accuracy(c: np.ndarray) -> np.ndarray:
    """Mean recall of yes and no; undefined when one of them never is the truth."""
    return (ratio(c[..., 0], c[..., :3].sum(-1)) + ratio(c[..., 4], c[..., 3:].sum(-1))) / 2


def f1_yes(c: np.ndarray) -> np.ndarray:
    """F1 of the class yes (as the paper reports): 2TP / (2TP + FP + FN)."""
    return ratio(2 * c[..., 0], c[..., 0] + c[..., 3] + c[..., :3].sum(-1))


def f1_no(c: np.ndarray) -> np.ndarray:
    return ratio(2 * c[..., 4], c[..., 4] + c[..., 1] + c[..., 3:].sum(-1))


def macro_f1(c: np.ndarray) -> np.ndarray:
    """Mean of the F1 of yes and of no."""
    return (f1_yes(c) + f1_no(c)) / 2


def mcc(c: np.ndarray) -> np.ndarray:
    """Matthews correlation for yes/no against yes/no/unclear (Gorodkin 2004, R_K); 0 when
    predictions or targets are constant, as in scikit-learn."""
    n = c.sum(axis=-1)
    truth = np.stack([c[..., :3].sum(-1), c[..., 3:].sum(-1), 0 * n], axis=-1)
    guess = c[..., :3] + c[..., 3:]
    top = (c[..., 0] + c[..., 4]) * n - (truth * guess).sum(-1)
    spread = (n * n - (truth**2).sum(-1)) * (n * n - (guess**2).sum(-1))
    return np.where(spread > 0, top / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def calibration_rows(p_yes: np.ndarray, positive: np.ndarray, bins: int = BINS) -> np.ndarray:
    """[n, 3 * bins]: (1, p, is yes) in the equal-width bin of p; zeros where p is unknown."""
    rows = np.zeros((len(p_yes), 3 * bins))
    known = np.flatnonzero(~np.isnan(p_yes))
    which = np.minimum((p_yes[known] * bins).astype(int), bins - 1)
    rows[known, 3 * which] = 1
    rows[known, 3 * which + 1] = p_yes[known]
    rows[known, 3 * which + 2] = positive[known]
    return rows


def calibration_error(p: np.ndarray, positive: np.ndarray, bins: int = BINS) -> Stat:
    """Expected calibration error over equal-width bins (Naeini et al. 2015) of the rows whose p is
    known: the sum over bins of |mean p - share of positives|, weighted by their rows."""
    known = ~np.isnan(p)
    gap = np.where(known, np.abs(p - positive), np.nan)
    return Stat(calibration_rows(p, positive, bins), _bin_gaps, gap, known, norm=_sum_of_absolutes)


def _bin_gaps(sums: np.ndarray) -> np.ndarray:
    """Per bin (p - positives) / all rows, from per-bin (count, p, positives) sums."""
    count, p, yes = (sums[..., i::3] for i in range(3))
    return ratio(p - yes, count.sum(-1, keepdims=True))


def _sum_of_absolutes(gaps: np.ndarray) -> np.ndarray:
    return np.abs(gaps).sum(-1)


def closed(
    texts: Sequence[str],
    targets: Sequence[str | None],
    p_yes: Sequence[float | None] | None = None,
    questions: Sequence[str | None] | None = None,
    labels: Sequence[Label] | None = None,
) -> dict[str, AnyStat]:
    """Metrics of yes/no questions.

    Args:
        texts: model answers; "" for a row that failed.
        targets: ground-truth answers, read by :func:`read_target`.
        p_yes: P(yes) per row where known; without any, ``auroc`` and ``ece`` are left out.
        questions: what was asked, for answers such as "normal" that need it to be read.
        labels: what the answers say, where they have been read already.

    Returns:
        accuracy, balanced_accuracy, f1_yes, macro_f1, mcc, parse_rate under the strict parser;
        the first five again as ``<name>_released`` under the released parser (which reads
        whatever is not "no" as "yes", so that its own parse rate is 1 by construction).
    """
    asked = questions or [None] * len(texts)
    truth = [read_target(t, q) for t, q in zip(targets, asked, strict=True)]
    strict = labels or [read_text(t, q) for t, q in zip(texts, asked, strict=True)]
    released: list[Label] = [
        parse_released(t) if without_reasoning(t).strip() else "unclear" for t in texts
    ]
    out: dict[str, AnyStat] = {}
    finishers = (accuracy, balanced_accuracy, f1_yes, macro_f1, mcc)
    for suffix, given in (("", strict), ("_released", released)):
        rows = confusion(given, truth)
        right = rows[:, 0] + rows[:, 4]
        for finish in finishers:
            out[finish.__name__ + suffix] = Stat(rows, finish, right, unit=finish is not mcc)
        if not suffix:
            out["parse_rate"] = proportion([label != "unclear" for label in strict])
    p = np.array([np.nan if v is None else v for v in p_yes or [None] * len(texts)], dtype=float)
    if not np.isnan(p).all():
        positive = np.array([t == "yes" for t in truth])
        out["auroc"] = RankStat(p, positive, p)
        out["ece"] = calibration_error(p, positive)
    return out


def proportion(
    hits: Sequence[bool] | np.ndarray, counted: Sequence[bool] | np.ndarray | None = None
) -> Stat:
    """Share of hits among the counted rows, as a resamplable metric."""
    hit = np.asarray(hits, dtype=float)
    base = np.ones(len(hit), bool) if counted is None else np.asarray(counted, dtype=bool)
    rows = np.stack([hit * base, base.astype(float)], axis=1)
    return Stat(rows, mean_of, np.where(base, hit, np.nan), base)


def average(values: Sequence[float] | np.ndarray, unit: bool = True) -> Stat:
    """The mean of a per-row value; NaN rows are outside its denominator. ``unit``: it lies in
    [0, 1]."""
    value = np.asarray(values, dtype=float)
    known = ~np.isnan(value)
    rows = np.stack([np.where(known, value, 0.0), known.astype(float)], axis=1)
    return Stat(rows, mean_of, value, known, unit)


def open_answers(texts: Sequence[str], targets: Sequence[str | None]) -> dict[str, AnyStat]:
    """Metrics of open questions: exact_match and token_f1 after :func:`normalise`."""
    pairs = list(zip(texts, [t or "" for t in targets], strict=True))
    return {
        "exact_match": proportion([normalise(a) == normalise(b) for a, b in pairs]),
        "token_f1": average([token_f1(a, b) for a, b in pairs]),
    }


def retrieval(ranks: Sequence[int | None], at: Sequence[int] = (1, 5, 10)) -> dict[str, AnyStat]:
    """recall@k and MRR from the rank (from 0) of the first relevant reference, None for none."""
    out: dict[str, AnyStat] = {
        f"recall@{k}": proportion([rank is not None and rank < k for rank in ranks]) for k in at
    }
    out["mrr"] = average([0.0 if rank is None else 1 / (rank + 1) for rank in ranks])
    return out


def _set_f1(sums: np.ndarray, which: str) -> np.ndarray:
    tp, fp, fn = sums[..., 0], sums[..., 1], sums[..., 2]
    if which == "precision":
        return ratio(tp, tp + fp)
    return ratio(tp, tp + fn) if which == "recall" else ratio(2 * tp, 2 * tp + fp + fn)


def findings(predicted: Sequence[set[str]], truth: Sequence[set[str]]) -> dict[str, AnyStat]:
    """Exact finding-level precision, recall and F1, micro-averaged over (report, finding).

    Args:
        predicted: findings that each report states as present.
        truth: findings present in each study.
    """
    rows = np.array(
        [[len(p & t), len(p - t), len(t - p)] for p, t in zip(predicted, truth, strict=True)],
        dtype=float,
    ).reshape(-1, 3)
    own = {w: _set_f1(rows, w) for w in ("precision", "recall", "f1")}
    # a normal study reported as normal is fully right, though 0/0 by the formula
    own["f1"] = np.where(rows.sum(axis=1) == 0, 1.0, own["f1"])
    return {
        f"finding_{which}": Stat(rows, partial(_set_f1, which=which), values)
        for which, values in own.items()
    }


def reliability(
    p_yes: Sequence[float | None], labels: Sequence[str], bins: int = BINS
) -> list[dict[str, AnyStat]]:
    """Points of the reliability diagram: per non-empty bin the mean ``p_yes`` and the
    ``share_yes`` of the truth.

    Args:
        p_yes: P(yes) per row, None where unknown.
        labels: the truth, "yes" or "no" (see :func:`read_target`).
    """
    p = np.array([np.nan if v is None else v for v in p_yes], dtype=float)
    positive = [truth == "yes" for truth in labels]
    member = calibration_rows(p, np.array(positive), bins)[:, ::3] > 0
    return [
        {"p_yes": average(np.where(own, p, np.nan)), "share_yes": proportion(positive, own)}
        for own in member.T
        if own.any()
    ]
