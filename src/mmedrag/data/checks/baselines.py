"""What closed questions give away without an image: the baselines beside every accuracy.

Labels are read with the released parser, so that the figures stand beside published ones.
"""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Baseline:
    """Accuracies in 0..1 on the closed questions of one source and split."""

    source: str
    split: str
    n: int
    yes: float  # share of yes answers = accuracy of always-yes
    no: float
    f1_yes: float  # of always-yes
    question_only: float  # majority of the *other* rows that ask the same (leave-one-out)
    train_prior: float | None  # majority of the training rows that ask the same, if there are any

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def baselines(db: sqlite3.Connection) -> list[Baseline]:
    """From the table ``closed(source, split, question, label)``; memory stays flat."""
    found = []
    db.execute("CREATE INDEX IF NOT EXISTS by_question ON closed (source, split, question)")
    sums = db.execute(
        "SELECT source, split, SUM(label), COUNT(*) FROM closed GROUP BY source, split "
        "ORDER BY source, split"
    ).fetchall()
    for source, split, yes, total in sums:
        majority = 2 * yes > total
        right = 0
        for ones, count in db.execute(
            "SELECT SUM(label), COUNT(*) FROM closed WHERE source = ? AND split = ? "
            "GROUP BY question",
            (source, split),
        ):
            right += _others(ones, count - ones, majority)
        found.append(
            Baseline(
                source,
                split,
                total,
                yes / total,
                1 - yes / total,
                2 * yes / (total + yes),
                right / total,
                _train_prior(db, source, split, majority),
            )
        )
    return found


def _others(yes: int, no: int, majority: bool) -> int:
    """Right answers within one question when each row asks the others."""
    right = 0
    for count, mine, other, label in ((yes, yes - 1, no, True), (no, no - 1, yes, False)):
        if count and (mine > other or (mine == other and majority == label)):
            right += count
    return right


def _train_prior(db: sqlite3.Connection, source: str, split: str, majority: bool) -> float | None:
    if split == "train":
        return None
    trained = db.execute(
        "SELECT AVG(label) FROM closed WHERE source = ? AND split = 'train'", (source,)
    ).fetchone()[0]
    if trained is None:
        return None
    right = total = 0
    for ones, count, prior in db.execute(
        "SELECT SUM(c.label), COUNT(*), MAX(t.prior) FROM closed c LEFT JOIN (SELECT question, "
        "AVG(label) AS prior FROM closed WHERE source = ? AND split = 'train' GROUP BY question) t "
        "ON t.question = c.question WHERE c.source = ? AND c.split = ? GROUP BY c.question",
        (source, source, split),
    ):
        says_yes = (prior if prior is not None and prior != 0.5 else trained) > 0.5
        right += ones if says_yes else count - ones
        total += count
    return right / total if total else None
