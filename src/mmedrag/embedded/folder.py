"""Folders of the small models that ship, and the folder for what can be built again.

Every folder is an ordinary Hugging Face one, loaded through the same code as a 7B checkpoint.
Weights, thresholds and calibrations come from ``data phantom`` alone (``make tiny`` rebuilds
them); on real images the answers mean nothing, and the system says so. One is of real pictures:
``domain-real`` (``training.real_domain``; its card names the sources).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmedrag.records import UserError

EMBEDDED = "embedded"
BENCHMARK = "phantom"  # the ``source`` of the pictures that the embedded models were trained on
REAL = "domain-real"  # the domain model that was fitted on real pictures
NAMES = (
    "domain",
    REAL,
    "encoder",
    "retriever-radiology",
    "retriever-ophthalmology",
    "retriever-pathology",
    "retriever-released",
    "retriever-strong",
    "vlm",
    "adapter",
    "adapter-cross_modal",
    "adapter-copy",
    "adapter-resist",
    "adapter-cross_modal+copy",
    "adapter-cross_modal+resist",
    "adapter-copy+resist",
)


def path(name: str) -> Path:
    """The folder of an embedded model.

    Raises:
        UserError: no such model in this installation.
    """
    found = Path(__file__).parent / name
    if name not in NAMES or not (found / "config.json").exists() and not _adapter(found):
        raise UserError(f"embedded: no model {name!r}, expected one of {', '.join(available())}")
    return found


def available() -> list[str]:
    """Names of the embedded models that this installation holds."""
    here = Path(__file__).parent
    return [n for n in NAMES if (here / n / "config.json").exists() or _adapter(here / n)]


def foreign(specs: Iterable[str | None], sources: Iterable[str | None] = ("",)) -> str | None:
    """What to say where embedded parts meet pictures that are not the benchmark's, or None.

    Args:
        specs: names of encoders and models, as users give them.
        sources: ``source`` of the pictures' rows.
    """
    named = {spec for spec in specs if spec and spec.partition(":")[0] == EMBEDDED}
    mine = sorted(named - {f"{EMBEDDED}:{REAL}"})
    others = {source for source in sources if source != BENCHMARK}
    if not mine or not others:
        return None
    return (
        f"{', '.join(mine)}: trained on drawn benchmark pictures only; on other pictures what it "
        "finds and answers means nothing"
    )


def retriever_of(domain: str | None) -> str:
    """The encoder that serves a domain: its own where one ships, else the one for all domains."""
    own = f"retriever-{domain}"
    return f"{EMBEDDED}:{own}" if own in available() else EMBEDDED


def _adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def located(name: str) -> Path:
    """The path behind a name; ``embedded:vlm`` is a model that ships with the package."""
    prefix, colon, part = name.partition(":")
    return path(part) if prefix == EMBEDDED and colon else Path(name)
