"""``retriever calibrate``: which parameter of a selection rule keeps references worth keeping?

Place in the picture: makes the parameter of any selection rule, the paper's gamma included. On
validation pictures, whose findings or labels are known, each retrieved reference agrees with its
picture or does not; of the parameters under which enough of the kept ones agree, the one that
keeps most is chosen. It is fitted on half of the patients and checked on the other half, whose
figure is the one to believe: among many parameters some look good by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mmedrag.evaluation.metrics.statistics import FEWEST, Stat, clean, clusters, intervals, mean_of
from mmedrag.evaluation.of_retriever import agreements, rows_of
from mmedrag.records import Example, Reference, UserError
from mmedrag.retrieval import Retriever, RuleSpec
from mmedrag.runtime import DataFolder, seeded_int, write_text

MEASURES = ("finding_accuracy", "label_jaccard")
PARAMETERS = {  # rule -> what of it is fitted
    "log_ratio": "gamma",
    "top1_ratio": "threshold",
    "fixed_k": "k",
    "score_floor": "floor",
    "calibrated": "threshold",
}
CANDIDATES = 40  # values of a parameter that are tried
SMALLEST = 20  # references that have to be kept
SURE = 0.95  # one-sided, that the fitted half reaches the aim


@dataclass(frozen=True)
class Looked:
    """The references of one picture, best first: similarity of each, and whether it agrees (NaN:
    unknown)."""

    patient: str
    scores: list[float]
    agrees: np.ndarray


def fit_selection(
    retriever: Retriever,
    data: Sequence[DataFolder],
    precision: float,
    split: str = "val",
    k: int = 8,
    level: float = 0.75,
    rule: str = "calibrated",
) -> dict[str, Any]:
    """Fit the parameter of a selection rule for one retriever.

    Args:
        precision: share of kept references that have to agree.
        k: how many references are looked at per picture.
        level: a reference agrees when its agreement with the picture (finding accuracy where
            the truth is known, else the Jaccard index of labels) is at least this.
        rule: one of :data:`PARAMETERS`.

    Returns:
        As :func:`fit`, then ``measure``, ``level``, ``split``.

    Raises:
        UserError: no usable pictures, nothing is known about their findings, or the rule has no
            parameter that could be fitted.
    """
    if not 0 < precision < 1:
        raise UserError(f"retriever calibrate: precision: got {precision}, expected 0 to 1")
    if rule not in PARAMETERS:
        known = ", ".join(PARAMETERS)
        raise UserError(f"retriever calibrate: rule: got {rule!r}, expected one of {known}")
    queries = rows_of(data, split, retriever.domain)
    if not queries:
        raise UserError(f"retriever calibrate: no rows with picture and text in split {split!r}")
    gallery = retriever.index.references()
    known_of = agreements(data, queries, gallery)
    measure = next((name for name in MEASURES if name in known_of), None)
    if measure is None:
        raise UserError(
            "retriever calibrate: neither findings (truth.jsonl) nor labels (meta.labels) of the "
            "pictures are known, expected one to measure agreement by"
        )
    at = {reference.id: n for n, reference in enumerate(gallery)}
    found, _ = retriever.search([_example(row) for row in queries], k)
    looked = []
    for row, query, hits in zip(known_of[measure], queries, found, strict=True):
        values = row[[at[hit.id] for hit in hits]].astype(float)
        agrees = np.where(np.isnan(values), np.nan, values >= level)
        looked.append(Looked(query.patient or query.id, [hit.score for hit in hits], agrees))
    return {**fit(looked, rule, precision), "measure": measure, "level": level, "split": split}


def fit(looked: Sequence[Looked], rule: str, precision: float) -> dict[str, Any]:
    """Fit on half of the patients, check on the others.

    Returns:
        ``held_out``, of patients that nothing was fitted on: ``reached`` (share of the kept
        references that agree) with ``low`` and ``high`` (95 %, by patient), ``n`` kept ones,
        ``kept`` (share of all) and ``patients`` · ``rule`` · its parameter (None: under none did
        the fitted half reach the aim with 95 % certainty, or the other half did not at all) ·
        ``precision`` · ``fitted``: the same as ``held_out`` on the half that was fitted ·
        ``n`` (references looked at), ``agreeing`` (share of all).
    """
    halves = [Half([p for p in looked if _half(p.patient) == first]) for first in (True, False)]
    name, best, most = PARAMETERS[rule], None, 0
    for value in candidates(rule, halves[0].looked):
        right, known = halves[0].kept(rule, {name: value})
        total = int(known.sum())
        if total >= max(SMALLEST, most) and _lower(right, known) >= precision:
            best, most = value, total
    fitted, held_out = (half.reached(rule, name, best) for half in halves)
    if (held_out["reached"] or 0.0) < precision:
        best = None
    every = np.concatenate([p.agrees for p in looked] or [np.empty(0)])
    known = every[~np.isnan(every)]
    return {
        "held_out": held_out,
        "rule": rule,
        name: best,
        "precision": precision,
        "fitted": fitted,
        "n": len(known),
        "agreeing": round(float(known.mean()), 6) if len(known) else None,
    }


class Half:
    """Pictures of half of the patients, counted once for every number of references kept."""

    def __init__(self, looked: Sequence[Looked]) -> None:
        self.looked = looked
        self.patients = [p.patient for p in looked]
        self.groups = clusters(self.patients)
        self.right = [np.r_[0.0, np.nancumsum(p.agrees)] for p in looked]
        self.known = [np.r_[0.0, np.cumsum(~np.isnan(p.agrees))] for p in looked]

    def kept(self, rule: str, params: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Of each patient: kept references that agree, and all kept ones that are known."""
        function = RuleSpec(rule).function
        counts = [function(p.scores, **params)[0] for p in self.looked]
        right, known = (
            np.bincount(self.groups, [row[n] for row, n in zip(rows, counts, strict=True)])
            for rows in (self.right, self.known)
        )
        return right, known

    def reached(self, rule: str, name: str, value: Any) -> dict[str, Any]:
        """What a parameter reaches here; with None nothing is kept."""
        none = np.zeros(len(set(self.patients)))
        right, known = (none, none) if value is None else self.kept(rule, {name: value})
        stat = Stat(np.stack([right, known], axis=1), mean_of, right, known > 0)
        found = intervals({"reached": stat}, [None] * len(right))["reached"]
        seen, total = int(known.sum()), float(sum(row[-1] for row in self.known))
        return {
            "reached": clean(found.value),
            "low": clean(found.low),
            "high": clean(found.high),
            "n": seen,
            "kept": round(seen / total, 6) if total else None,
            "patients": len(right),
        }


def candidates(rule: str, looked: Sequence[Looked]) -> list[Any]:
    """Values that the rule's parameter could take: quantiles of what it is compared with."""
    seen: list[float] = []
    for scores in (p.scores for p in looked):
        if rule == "fixed_k":
            seen += range(1, len(scores) + 1)
        elif rule in ("log_ratio", "top1_ratio"):
            above = [s for s in scores if s > 0]
            first = above[:-1] if rule == "log_ratio" else above[:1] * (len(above) - 1)
            ratios = [a / b for a, b in zip(first, above[1:], strict=True)]
            seen += [math.log(r) for r in ratios] if rule == "log_ratio" else ratios
        else:
            seen += [s for s in scores if not math.isnan(s)]
    if rule == "fixed_k":
        return sorted({int(k) for k in seen})
    if not seen:
        return []
    spread = np.unique(np.quantile(seen, np.linspace(0, 1, CANDIDATES)))
    return [float(v) for v in spread if rule != "top1_ratio" or v > 1]


def _lower(right: np.ndarray, known: np.ndarray) -> float:
    """Lower bound of the share of kept references that agree: of a ratio over whole patients
    (linearised, Student's t), and no more than exact where all agree."""
    right, known = right[known > 0], known[known > 0]
    if (count := len(known)) < FEWEST:
        return 0.0
    share = right.sum() / known.sum()
    error = math.sqrt(count / (count - 1) * float(((right - share * known) ** 2).sum()))
    bound = share - float(stdtrit(count - 1, SURE)) * error / known.sum()
    return min(float(bound), (1 - SURE) ** (1 / count))


def headline(result: dict[str, Any]) -> str:
    """The figure of the held-out patients first, then what was fitted."""
    name = PARAMETERS[result["rule"]]
    held, value = result["held_out"], result[name]
    if held["n"]:
        bounds = (
            "no interval" if held["low"] is None else f"[{held['low']:.3f}, {held['high']:.3f}]"
        )
        first = (
            f"{held['reached']:.3f} {bounds} of the {held['n']} references kept agree, on "
            f"{held['patients']} patients that nothing was fitted on ({held['kept']:.0%} are kept)"
        )
    else:
        first = f"nothing is kept on the {held['patients']} patients that nothing was fitted on"
    aim = f"precision {result['precision']:g}"
    if value is None:
        return f"{first}\nno {name} of {result['rule']} reaches {aim}"
    seen = result["fitted"]
    return (
        f"{first}\n{result['rule']}: {name} = {value:.6g} for {aim}; {seen['reached']:.3f} on the "
        f"{seen['patients']} patients that it was fitted on"
    )


def write_recipe(path: Path, result: dict[str, Any]) -> None:
    """A recipe whose ``[selection]`` is the fitted rule; ``calibrated`` without a threshold keeps
    nothing, another rule without its parameter is not written."""
    name = PARAMETERS[result["rule"]]
    held = result["held_out"]
    if result[name] is None and result["rule"] != "calibrated":
        return
    lines = [
        f"# fitted on half of the patients of split {result['split']}; on the others "
        f"{held['reached']} of {held['n']} kept references agree",
        f"# ({result['measure']} >= {result['level']} counts as agreement)",
        "[selection]",
        f'rule = "{result["rule"]}"',
    ]
    if result["rule"] == "calibrated":
        lines.append(f"precision = {result['precision']}")
    if result[name] is not None:
        lines.append(f"{name} = {result[name]}")
    write_text(path, "\n".join(lines) + "\n", own=True)


def _example(row: Reference) -> Example:
    return Example(
        id=row.id,
        task="report",
        image=row.image,
        patient=row.patient,
        domain=row.domain,
        root=row.root,
    )


def _half(key: str) -> bool:
    return seeded_int(key, bits=1) == 0
