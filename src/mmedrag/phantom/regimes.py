"""Regimes: how good similar cases are as references, fixed once for all (``regimes.toml``).

Place in the picture: ``settings`` asks it what a regime fixes, ``build`` writes what it aims at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from mmedrag.records import UserError

RegimeName = Literal["uniform", "released", "strong"]
Table = Mapping[str, Mapping[str, float]]  # domain -> finding -> number


@dataclass(frozen=True)
class Regime:
    """A table of ``regimes.toml``.

    Attributes:
        about: one sentence, shown wherever the regime is.
        agreement: domain -> finding -> what the top-1 reference's agreement aims at.
        similarity, redraw, appearance: what the regime fixes of the knobs; None: nothing.
        retriever: the shipped encoder that the agreement is of; ``{domain}`` stands for the
            domain's name.
    """

    about: str
    retriever: str
    agreement: Table = field(default_factory=dict)
    similarity: Table = field(default_factory=dict)
    redraw: float | None = None
    appearance: Mapping[str, Sequence[str]] = field(default_factory=dict)


@lru_cache(maxsize=8)
def load_regime(name: str) -> Regime:
    """The regime of a name; UserError when there is none."""
    from mmedrag.runtime import config, read_toml

    path = Path(str(files("mmedrag.phantom"))) / "regimes.toml"
    table = read_toml(path)
    if name not in table:
        raise UserError(f"phantom: no regime {name!r}, expected one of {', '.join(table)}")
    return config.settings(Regime, table[name], f"{path} [{name}]")


def regime_retriever(name: str, domain: str) -> str:
    """The encoder (as ``index build --retriever`` takes it) that a regime's agreement is of."""
    return load_regime(name).retriever.format(domain=domain)


def measured(name: str) -> dict[str, Any] | None:
    """What was measured of a regime, and on what (``bench/regimes.py`` wrote it); None: nothing."""
    from mmedrag.runtime import read_json

    path = Path(str(files("mmedrag.phantom"))) / "regimes.json"
    found: dict[str, Any] | None = read_json(path)["regimes"].get(name) if path.exists() else None
    return found
