"""The words that fields and settings may take, and the one error that users see.

Place in the picture: below the records. Imports nothing, so that the command line can show every
setting with its choices at once.
"""

from __future__ import annotations

from typing import Literal

UNKNOWN = "unknown"  # the reserved domain label: no retriever, prompt without references
Task = Literal["vqa", "report"]
Split = Literal["train", "val", "test"]
AnswerType = Literal["closed", "open"]
Label = Literal["yes", "no", "unclear"]
NoiseKind = Literal["gaussian_clip", "additive", "blank", "other_patient", "shuffle_patches"]
ReferenceMode = Literal[
    "none", "all", "selected", "shuffled", "random", "contradicting", "own", "shown"
]
PairKind = Literal["cross_modal", "copy", "resist", "stage1", "unaided"]
PAPER_KINDS: tuple[PairKind, ...] = ("cross_modal", "resist", "copy")  # order as released: a, b, c


class UserError(Exception):
    """Bad input or usage. The message is one line: what, where, expected. Exit code 2."""
