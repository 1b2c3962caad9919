"""Generators: what answers. ``load_generator(kind, model, adapter)`` gives one of them.

Place in the picture: Prompt → **generator.generate** → Answer. The protocol is
:class:`mmedrag.records.Generator`; a third party's class is named
``package.module:Class``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmedrag.records import Generator, resolve_object

GENERATORS = {
    "hf": "mmedrag.answering.generators.hf:HFGenerator",
    "openai": "mmedrag.answering.generators.openai:OpenAIGenerator",
    "scripted": "mmedrag.answering.generators.scripted:ScriptedGenerator",
}
EXTRAS = {"openai": "openai"}


def load_generator(
    kind: str, model: str | Path | None = None, adapter: str | Path | None = None, **options: Any
) -> Generator:
    """The generator of this kind over ``model`` (a folder, a hub id, a served model's name).

    Raises:
        UserError: unknown kind, missing package, model that cannot be loaded.
    """
    built = resolve_object(kind, GENERATORS, "generator", EXTRAS)(model, adapter=adapter, **options)
    return built  # type: ignore[no-any-return]
