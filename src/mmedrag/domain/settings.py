"""Settings of ``train domain`` (recipe table ``[domain]``), importable without an engine."""

from __future__ import annotations

from dataclasses import dataclass

from mmedrag.runtime import Settings, setting


@dataclass(frozen=True)
class DomainTraining(Settings):
    """How domain identification is fitted; *known* and *unknown* are what its score tells apart."""

    table = "domain"

    per_domain: int = setting(
        1000, "At most so many training pictures per domain, drawn by the seed.", minimum=1
    )
    variants: int = setting(2, "Varied copies of each training picture (known).", minimum=0)
    swaps: int = setting(
        3, "Channel-swapped copies of each coloured training picture (unknown).", minimum=0
    )
    outliers: int = setting(2500, "Drawn pictures (unknown).", minimum=0)
    keep: float = setting(
        0.99,
        "Share of validation pictures that the threshold must keep as known.",
        minimum=0,
        maximum=1,
    )
    strength: float = setting(0.05, "Inverse L2 weight of the head.", above=0)
    trees: int = setting(300, "Boosted trees of the unknown score.", minimum=1)
    depth: int = setting(4, "Depth of these trees.", minimum=1)
    statistics: bool = setting(True, "Use the plain picture statistics beside the encoder.")
    fine_tune: int = setting(
        0,
        "Train the encoder's picture side too, so many epochs; it is saved in OUT/encoder.",
        minimum=0,
        metavar="EPOCHS",
    )
    fine_tune_lr: float = setting(1e-5, "Learning rate of the fine-tuning.", above=0)
    seed: int = setting(0, "Seed of all draws.")
