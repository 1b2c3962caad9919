"""What a run is asked for: rows and condition (``[run]``), and the flags that name a system.

Place in the picture: before the pipeline. Read by the command line for its options, so nothing
heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedrag.records import NoiseKind, ReferenceMode, Task
from mmedrag.runtime import Settings, setting


@dataclass(frozen=True)
class RunSettings(Settings):
    """What is run of a data folder, and under which condition (recipe table ``[run]``).

    ``references`` and ``noise`` as in :class:`mmedrag.records.ConditionSpec`; rows are chosen in
    file order.
    """

    table = "run"

    references: ReferenceMode = setting(
        "selected",
        "none, all, selected, shuffled, random, contradicting, own or shown.",
        metavar="MODE",
    )
    noise: NoiseKind | None = setting(
        None, "gaussian_clip, additive, blank, other_patient or shuffle_patches.", metavar="KIND"
    )
    noise_params: Mapping[str, Any] = setting(dict, "Parameters of the noise.")
    split: str | None = setting(None, "Only examples of this split.")
    task: Task | None = setting(None, "Only this task.")
    domain: str | None = setting(
        None, "Only examples whose data states this domain.", flag="--only-domain"
    )
    ids: tuple[str, ...] = setting((), "Repeatable or comma-separated; @FILE: one a line.")
    limit: int | None = setting(None, "At most so many examples.", minimum=1)
    shard: str | None = setting(
        None, "Only the i-th of n parts; put together by run merge.", metavar="I/N"
    )
    chunk: int = setting(128, "Rows that are worked on, and resumed, together.", minimum=1)


@dataclass
class Flags:
    """The command line's part of a system; None and () mean not given."""

    system: Path | None = setting(None, "System file (TOML) that names the parts.", metavar="FILE")
    domain: str | None = setting(None, "Identify the domain, or fix it.", metavar="auto|NAME")
    domain_model: str | None = setting(None, "Domain identification model.", metavar="DIR")
    domain_encoder: str | None = setting(
        None, "Encoder of the domain model, where it is one of your own.", metavar="DIR|SPEC"
    )
    model: str | None = setting(None, "Model that answers.", metavar="DIR|ID")
    adapter: str | None = setting(None, "Adapter on the model; none: without.", metavar="DIR")
    index: Sequence[str] = setting((), "Repeatable, one per domain.", metavar="DIR")
    retriever: str | None = setting(
        None, "Encoder of the --index, where it is one of your own.", metavar="DIR|SPEC"
    )
    rule: str | None = setting(
        None, "Selection rule; parameters: --set selection.K=V.", metavar="NAME"
    )
