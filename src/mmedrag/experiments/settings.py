"""The rows of an ablation (recipe table ``[ablation]``), importable without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmedrag.runtime import Settings, setting


@dataclass(frozen=True)
class AblationSettings(Settings):
    """Which rows an ablation has, and on how much of the data they are run."""

    table = "ablation"

    split: str = setting("test", "Split of the examples.")
    studies: int = setting(0, "The first so many of each domain; 0: all.", minimum=0)
    k: int = setting(
        4, "References that naive retrieval uses and selection chooses from.", minimum=1
    )
    beams: int = setting(4, "Beams of the row with beam search.", minimum=1)
    generic: str | None = setting(
        None, "Index over all domains, for naive retrieval.", metavar="DIR"
    )
    generic_retriever: str | None = setting(
        None, "The generic index's encoder, where that is one of your own.", metavar="SPEC"
    )
    adapters: Mapping[str, str | dict[str, str]] = setting(
        dict,
        "Set of pairs (cross_modal, copy, resist, two of them as copy+resist, or all) and its "
        "adapter folder, or a table of one for each domain; without all, the system's own adapter "
        "is the full method.",
    )
    pairwise: bool = setting(True, "Also the rows of two sets of pairs.")
