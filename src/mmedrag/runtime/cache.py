"""The cache folder: what can be rebuilt from the package or from a model, and nothing else.

Place in the picture: where the embedded benchmark and its indexes, the features and reference
log-probabilities of a tuning, and WordNet are kept. Nothing about a picture that was asked about is
kept here: a retriever keeps query embeddings only in a folder that its caller names.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*below: str) -> Path:
    """``$MMEDRAG_CACHE``, else ``mmedrag`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    chosen = os.environ.get("MMEDRAG_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(chosen) if chosen else base / "mmedrag").joinpath(*below)
