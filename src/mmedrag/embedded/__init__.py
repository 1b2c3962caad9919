"""The small system that ships with the package: weights, and an index built where it is used.

Every folder is an ordinary Hugging Face one, loaded through the same code as a 7B checkpoint.
Weights, thresholds and calibrations come from ``data phantom`` alone (``make tiny`` rebuilds
them); on real images the answers mean nothing, and the system says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmedrag.types import UserError

NAMES = (
    "domain", "encoder", "retriever-radiology", "retriever-ophthalmology", "retriever-pathology",
    "vlm", "adapter", "adapter-cross_modal", "adapter-copy", "adapter-resist",
    "adapter-cross_modal+copy", "adapter-cross_modal+resist", "adapter-copy+resist",
)  # fmt: skip
DOMAINS = ("radiology", "ophthalmology", "pathology")
# The benchmark behind the embedded index: its patients are alike enough that a similar case's
# report is mostly right. No training used this seed.
CORPUS: dict[str, Any] = {"studies": 500, "seed": 2026, "similarity": 0.9}


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


def cache_folder() -> Path:
    """Where what can be rebuilt is kept: $MMEDRAG_CACHE, or the user's cache folder."""
    chosen = os.environ.get("MMEDRAG_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "mmedrag"


def data_folder() -> Path:
    """The benchmark that the embedded index is made of; drawn once, then reused."""
    from mmedrag import __version__
    from mmedrag.phantom.build import build

    name = "-".join(str(value) for value in CORPUS.values())
    out = cache_folder() / f"phantom-{__version__}-{name}"
    if not (out / "examples.jsonl").exists():
        build(out, twins="image", **CORPUS)
    return out


def index_folders() -> dict[str, Path]:
    """One index per domain, by that domain's own encoder, over :func:`data_folder`'s training
    studies. Built on first use and kept in the cache folder, beside a hash of the weights."""
    return {domain: _index(domain, f"retriever-{domain}") for domain in DOMAINS}


def generic_index() -> Path:
    """One index over all domains by the generic encoder: naive retrieval, for comparison."""
    return _index(None, "encoder")


def _index(domain: str | None, name: str) -> Path:
    from mmedrag.index_write import build_index
    from mmedrag.types import DataFolder

    data, digest = data_folder(), _fingerprint(path(name))
    folder = data.parent / f"index-{data.name}-{domain or 'generic'}-{digest}"
    if not (folder / "manifest.json").exists():
        build_index([DataFolder(data)], folder, domain=domain, encoder=f"embedded:{name}")
    return folder


def _fingerprint(weights: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(weights.glob("*")):
        if file.suffix in (".safetensors", ".json"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]
