"""``retriever calibrate``: from which similarity on are references worth keeping?

Place in the picture: makes the parameters of the selection rule ``calibrated``. On validation
pictures, whose findings or labels are known, each retrieved reference agrees with its picture or
does not; the threshold is the lowest similarity above which enough of them agree
(``mmedrag.retrieval.fit_threshold``). It is fitted on half of the patients and checked on the
other half, and only then fitted on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmedrag.evaluation.of_retriever import agreements, rows_of
from mmedrag.records import Example, Reference, UserError
from mmedrag.retrieval import Retriever, select
from mmedrag.runtime import DataFolder, seeded_int, write_text

MEASURES = ("finding_accuracy", "label_jaccard")


def fit_selection(
    retriever: Retriever,
    data: Sequence[DataFolder],
    precision: float,
    split: str = "val",
    k: int = 8,
    level: float = 0.75,
) -> dict[str, Any]:
    """Fit the threshold of the rule ``calibrated`` for one retriever.

    Args:
        precision: share of kept references that have to agree.
        k: how many references are looked at per picture.
        level: a reference agrees when its agreement with the picture (finding accuracy where
            the truth is known, else the Jaccard index of labels) is at least this.

    Returns:
        ``rule``, ``threshold`` (None: never reached), ``precision`` · ``measure``, ``level`` ·
        ``n`` (references looked at), ``agreeing`` (share of all), ``kept`` (share at or above
        the threshold) and ``reached`` (share of those that agree) · ``held_out``: ``kept`` and
        ``reached`` on patients that the threshold was not fitted on.

    Raises:
        UserError: no usable pictures, or nothing is known about their findings.
    """
    if not 0 < precision < 1:
        raise UserError(f"retriever calibrate: precision: got {precision}, expected 0 to 1")
    queries = rows_of(data, split, retriever.domain)
    if not queries:
        raise UserError(f"retriever calibrate: no rows with picture and text in split {split!r}")
    gallery = retriever.index.references()
    known = agreements(data, queries, gallery)
    measure = next((name for name in MEASURES if name in known), None)
    if measure is None:
        raise UserError(
            "retriever calibrate: neither findings (truth.jsonl) nor labels (meta.labels) of the "
            "pictures are known, expected one to measure agreement by"
        )
    at = {reference.id: n for n, reference in enumerate(gallery)}
    found, _ = retriever.search([_example(row) for row in queries], k)
    scores, agrees, half = [], [], []
    for row, query, hits in zip(known[measure], queries, found, strict=True):
        for hit in hits:
            value = float(row[at[hit.id]])
            if not np.isnan(value):
                scores.append(hit.score)
                agrees.append(value >= level)
                half.append(_half(query.patient or query.id))
    s, a, h = np.array(scores), np.array(agrees, dtype=bool), np.array(half, dtype=bool)
    trial = select.fit_threshold(s[h].tolist(), a[h].tolist(), precision)
    fitted = select.fit_threshold(scores, agrees, precision)
    return {
        "rule": "calibrated",
        **fitted,
        "measure": measure,
        "level": level,
        "split": split,
        "n": len(s),
        "agreeing": _share(a),
        **_above(fitted["threshold"], s, a),
        "held_out": _above(trial["threshold"], s[~h], a[~h]),
    }


def write_recipe(path: Path, result: dict[str, Any]) -> None:
    """A recipe whose ``[selection]`` is the fitted rule; without a threshold it keeps nothing."""
    lines = [
        f"# fitted on split {result['split']}: {result['n']} references, "
        f"{result['measure']} >= {result['level']} counts as agreement",
        "[selection]",
        'rule = "calibrated"',
        f"precision = {result['precision']}",
    ]
    if result["threshold"] is not None:
        lines.append(f"threshold = {result['threshold']}")
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


def _above(threshold: float | None, s: np.ndarray, a: np.ndarray) -> dict[str, float | None]:
    above = s >= threshold if threshold is not None else np.zeros(len(s), dtype=bool)
    return {"kept": _share(above), "reached": _share(a[above])}


def _share(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None
