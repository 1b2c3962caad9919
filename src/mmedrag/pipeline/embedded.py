"""The data folder and the indexes of the embedded system, built where they are used.

Place in the picture: beside ``system``: what is searched where no index is named. Weights ship in
``mmedrag.embedded``; the benchmark they are of is drawn on first use and kept in the cache folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmedrag.embedded import BENCHMARK, EMBEDDED, REAL, available, path
from mmedrag.records import UserError
from mmedrag.runtime import cache_folder, sha256_of

log = logging.getLogger(__name__)
DOMAINS = ("radiology", "ophthalmology", "pathology")


# The benchmark behind the embedded index: its patients are alike enough that a similar case's
# report is mostly right. No training used this seed.
CORPUS: dict[str, Any] = {"studies": 500, "seed": 2026, "similarity": 0.9}


def data_folder() -> Path:
    """The benchmark that the embedded index is made of; drawn once, then reused."""
    from mmedrag import __version__
    from mmedrag.phantom import build_benchmark

    name = "-".join(str(value) for value in CORPUS.values())
    out = cache_folder() / f"phantom-{__version__}-{name}"
    if not (out / "examples.jsonl").exists():
        log.info("drawing the embedded system's studies, once: %s", out)
        build_benchmark(out, twins="image", **CORPUS)
    return out


def index_folders() -> dict[str, Path]:
    """One index per domain, by that domain's own encoder, over :func:`data_folder`'s training
    studies. Built on first use and kept in the cache folder, beside a hash of the weights."""
    return {domain: _index(domain, f"retriever-{domain}") for domain in DOMAINS}


def generic_index() -> Path:
    """One index over all domains by the generic encoder: naive retrieval, for comparison."""
    return _index(None, "encoder")


def of_benchmark(index: str | Path) -> bool:
    """Whether an index holds the benchmark's pictures alone, by an embedded encoder."""
    from mmedrag.retrieval import Filter, IndexFolder
    from mmedrag.retrieval.stores import read_manifest

    try:
        encoder = read_manifest(Path(index)).get("encoder") or {}
        if not str(encoder.get("spec")).startswith(EMBEDDED):
            return False
        return bool(IndexFolder.open(index).mask(Filter(source=[BENCHMARK])).all())
    except (UserError, OSError):
        return False  # whoever opens it to search says what is wrong


def real_domain_model() -> str | None:
    """The shipped domain model for real pictures; None where this installation has none."""
    return f"{EMBEDDED}:{REAL}" if REAL in available() else None


def _index(domain: str | None, name: str) -> Path:
    from mmedrag.retrieval import build_index
    from mmedrag.runtime import DataFolder

    data, digest = data_folder(), _fingerprint(path(name))
    folder = data.parent / f"index-{data.name}-{domain or 'generic'}-{digest}"
    if not (folder / "manifest.json").exists():
        log.info("building an embedded index, once: %s", folder)
        build_index([DataFolder(data)], folder, domain=domain, encoder=f"embedded:{name}")
    return folder


def _fingerprint(weights: Path) -> str:
    weighing = (f for f in weights.iterdir() if f.suffix in (".safetensors", ".json"))
    return sha256_of(weights, weighing)[:12]
