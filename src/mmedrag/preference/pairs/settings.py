"""How preference pairs are made (recipe table ``[pairs]``), importable without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmedrag.records import PAPER_KINDS, NoiseKind, PairKind, Task
from mmedrag.runtime import Settings, setting

Mode = Literal["paper", "released"]


@dataclass(frozen=True)
class PairSettings(Settings):
    """How pairs are made; see :mod:`mmedrag.preference.pairs.construct`."""

    table = "pairs"

    mode: Mode = setting("paper", "Construction rules.")
    kinds: tuple[PairKind, ...] = setting(
        PAPER_KINDS,
        "cross_modal, resist, copy, stage1, unaided. Repeatable.",
        metavar="KIND",
        flag="--kind",
    )
    noise: NoiseKind = setting(
        "gaussian_clip",
        "How images are degraded: gaussian_clip, additive, blank, other_patient or "
        "shuffle_patches.",
        metavar="KIND",
    )
    noise_params: Mapping[str, Any] = setting(dict, "Parameters of the noise.")
    split: str | None = setting("val", "Examples to take.")
    task: Task | None = setting(None, "Only this task.")
    limit: int | None = setting(None, "At most so many examples.", minimum=1)
    prompts: Literal["with_references", "own"] = setting(
        "with_references",
        "Prompt of both sides: the one with references (as released), or each side's own.",
    )
    balance_seed: int = setting(42, "Seed of sampling cross_modal pairs down (mode released).")
    drawn: tuple[PairKind, ...] = setting(
        (), "Kinds whose answers are drawn by p(yes).", metavar="KIND"
    )
    even_answers: bool = setting(
        False, "Draw pairs so that the answer does not tell whether references were right."
    )
    chunk: int = setting(128, "Rows that are worked on, and resumed, together.", minimum=1)
