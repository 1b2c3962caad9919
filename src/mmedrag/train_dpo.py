"""RAG-PT tuning: two-image, two-prompt DPO of one adapter (work in progress: signature only)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedrag.dpo_settings import DpoTraining, Reference
from mmedrag.types import Pair

__all__ = ["DpoTraining", "train_dpo"]


def train_dpo(
    pairs: Sequence[Pair],
    model: str | Path,
    out: str | Path,
    settings: DpoTraining | None = None,
    *,
    init_adapter: str | Path | None = None,
    reference: Reference = "base",
    resume: bool = True,
    cache: str | Path | None = None,
    prepare_only: bool = False,
) -> dict[str, Any]:
    """Tune an adapter on preference pairs; returns what was done, as plain data."""
    raise NotImplementedError
