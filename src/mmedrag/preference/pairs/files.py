"""Preference pairs on disk: the native folder.

Place in the picture: pairs ─► files ─► ``dpo``. ``PAIRS/pairs.jsonl`` holds the rows,
``PAIRS/config.json`` how they were made and, relative to PAIRS, the DATA folder that image paths
start from. Other trainers' formats: ``export``; released rows: ``data.formats.released_pairs``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmedrag.records import Pair, PairSet, UserError
from mmedrag.runtime import read_jsonl, write_jsonl


def write_pairs(found: PairSet, out: Path, data: Path, settings: dict[str, Any]) -> Path:
    """Write a PAIRS folder; ``settings`` says how the pairs were made. Returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "pairs.jsonl", found.pairs)
    config = {
        "data": os.path.relpath(data.resolve(), out.resolve()),
        "settings": settings,
        "counts": found.counts,
    }
    part = out / "config.json.part"
    part.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, out / "config.json")
    return out


def read_pairs(path: str | Path, data: str | Path | None = None) -> list[Pair]:
    """Read a PAIRS folder (or a ``pairs.jsonl``); ``data`` overrides the recorded DATA folder."""
    path = Path(path)
    file = path / "pairs.jsonl" if path.is_dir() else path
    config = file.with_name("config.json")
    if data is not None:
        root = Path(data)
    elif config.exists():
        try:
            root = file.parent / json.loads(config.read_text(encoding="utf-8"))["data"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{config}: expected an object with 'data'") from None
    else:
        root = file.parent
    pairs = list(read_jsonl(file, Pair))
    seen: set[str] = set()
    for number, pair in enumerate(pairs, 1):
        if pair.id in seen:
            raise UserError(f"{file}:{number}: id: {pair.id!r} stands twice, expected unique")
        seen.add(pair.id)
        pair.root = root
        pair.model_fields_set.discard("root")
    return pairs
