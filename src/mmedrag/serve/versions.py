"""Which parts answered: names, and hashes of what decides an answer.

Place in the picture: beside every answer and in every line of the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedrag.embedded import located
from mmedrag.pipeline import Pipeline, System
from mmedrag.records import Indexed


def weights(system: System) -> dict[str, Path]:
    """part → its folder or file, where it is on this machine (a hub id is not)."""
    named = {
        "domain": system.domain.model,
        "model": system.generator.get("model"),
        "adapter": system.generator.get("adapter"),
        **{f"adapter-{name}": part.adapter for name, part in system.domains.items()},
    }
    found = {part: located(str(name)) for part, name in named.items() if name}
    return {part: path for part, path in found.items() if path.exists()}


def describe(pipeline: Pipeline, weights: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Versions of the parts: package, model, prompt set, encoder and content of each index.

    Args:
        weights: part → folder, hashed once; names alone do not say which weights answered.
    """
    from mmedrag import __version__
    from mmedrag.runtime import sha256

    indexes = {}
    for name, retriever in sorted(pipeline.retrievers.items()):
        if isinstance(retriever, Indexed):
            manifest = sha256(retriever.index.path / "manifest.json")[:16]
            indexes[name] = {"index": manifest, "encoder": retriever.encoder.fingerprint[:16]}
    generator = pipeline.generator
    return {
        "mmedrag": __version__,
        "model": generator.name if generator else None,
        "adapters": {name: g.name for name, g in sorted(pipeline.adapters.items())},
        "prompts": Path(pipeline.templates.name).stem,
        "rule": None if pipeline.rule is None else pipeline.rule.rule,
        "indexes": indexes,
        "weights": {part: sha256(path)[:16] for part, path in sorted((weights or {}).items())},
    }
