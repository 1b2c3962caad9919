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
    attainable: str | None = setting(
        None,
        "What a fuser reaches on these questions (JSON of `python -m training.fusion`), shown "
        "beside the rows.",
        metavar="FILE",
    )


@dataclass(frozen=True)
class SweepSettings(Settings):
    """Which points a sweep has, and how much of the benchmark each is measured on."""

    table = "sweep"

    points: tuple[str, ...] = setting(
        ("0", "0.3", "0.5", "0.7", "0.85", "1"),
        "Similarity of the benchmark's patients (0 to 1), or the name of a regime. Repeatable.",
        flag="--point",
        metavar="NUMBER|NAME",
    )
    seeds: int = setting(3, "Benchmarks of each point.", minimum=1)
    first_seed: int = setting(5001, "Seed of the first; no shipped model was trained on these.")
    studies: int = setting(
        400, "Studies of each domain, seed and point; 60 % can be retrieved.", minimum=8
    )
    asked: int = setting(
        25,
        "So many of the split's studies of each domain and seed are asked about; 0: all.",
        minimum=0,
    )
    domains: tuple[str, ...] = setting(
        ("radiology", "ophthalmology", "pathology"), "Domains of the benchmark."
    )
    split: str = setting("test", "Split of the questions.")
    k: int = setting(
        4, "References that naive retrieval uses and selection chooses from.", minimum=1
    )
    workers: int = setting(1, "Processes that draw the pictures.", minimum=1)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)
