"""The small system that ships with the package: weights, and an index built where it is used.

Every folder is an ordinary Hugging Face one, loaded through the same code as a 7B checkpoint.
Weights, thresholds and calibrations come from ``data phantom`` alone (``make tiny`` rebuilds
them); on real images the answers mean nothing, and the system says so.
"""

from __future__ import annotations

from pathlib import Path

from mmedrag.records import UserError

EMBEDDED = "embedded"
NAMES = (
    "domain",
    "encoder",
    "retriever-radiology",
    "retriever-ophthalmology",
    "retriever-pathology",
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


def _adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def located(name: str) -> Path:
    """The path behind a name; ``embedded:vlm`` is a model that ships with the package."""
    prefix, colon, part = name.partition(":")
    return path(part) if prefix == EMBEDDED and colon else Path(name)
