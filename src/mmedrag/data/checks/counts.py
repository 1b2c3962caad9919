"""``data stats``: how much of what is in a DATA folder, and what chance gives on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmedrag.data.checks.check import check
from mmedrag.records import Record, UserError
from mmedrag.runtime import DataFolder, read_jsonl


def stats(path: str | Path) -> dict[str, Any]:
    """Counts by table, split, domain, source and task; patients, images, text lengths, baselines.

    Raises:
        UserError: no data folder, or a row that cannot be read (with file and line).
    """
    folder = DataFolder(path)
    tables: dict[str, list[Any]] = {"examples": folder.examples(), "corpus": folder.corpus()}
    if not any(tables.values()):
        raise UserError(f"{path}: no rows in examples.jsonl or corpus.jsonl")
    counted = {name: _counts(rows) for name, rows in tables.items() if rows}
    everything = [row for rows in tables.values() for row in rows]
    patients = {r.patient for r in everything if r.patient}
    named = {str(p) for r in everything for p in r.images}
    rejected = Path(path) / "rejected.jsonl"
    return {
        "path": str(path),
        "tables": counted,
        "patients": len(patients),
        "images": len(named),
        "text_only": sum(not r.image for r in everything),
        "truth": len(folder.truth()),
        "rejected": sum(1 for _ in read_jsonl(rejected, Record)) if rejected.exists() else 0,
        "baselines": [b.to_dict() for b in check([path], images=False).baselines],
    }


def _counts(rows: list[Any]) -> dict[str, Any]:
    """Of one table: {field: {value: rows}} and word counts of its texts."""
    fields = ("split", "domain", "source", "task", "answer_type", "licence")
    found: dict[str, Any] = {"rows": len(rows)}
    for name in fields:
        values = Counter(str(v) for r in rows if (v := getattr(r, name, None)) is not None)
        if values:
            found[name] = dict(sorted(values.items()))
    texts = [t for r in rows if (t := getattr(r, "text", None) or getattr(r, "answer", None))]
    lengths = sorted(len(text.split()) for text in texts)
    if lengths:
        found["words"] = {
            "median": lengths[len(lengths) // 2],
            "p95": lengths[int(len(lengths) * 0.95)],
            "max": lengths[-1],
        }
    return found
