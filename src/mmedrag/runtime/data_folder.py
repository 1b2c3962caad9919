"""A DATA folder of the contract, read and checked row by row.

Place in the picture: where every command gets its examples, corpus and ground truth from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mmedrag.records import Example, Reference, Row, Truth, UserError
from mmedrag.runtime.files import R, read_jsonl


class DataFolder:
    """A DATA folder (docs/data.md): examples.jsonl, corpus.jsonl, truth.jsonl, images/."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such data folder, expected a folder with examples.jsonl")

    def _rows(self, name: str, record: type[R]) -> list[R]:
        path = self.path / name
        if not path.exists():
            return []
        rows, seen = [], set()
        for number, row in enumerate(read_jsonl(path, record), 1):
            if hasattr(row, "root"):
                row.root = self.path
                row.model_fields_set.discard("root")
            key = getattr(row, "id", None)
            if key is not None:
                if key in seen:
                    raise UserError(f"{path}:{number}: id: {key!r} stands twice, expected unique")
                seen.add(key)
            rows.append(row)
        return rows

    def examples(self, split: str | None = None, task: str | None = None) -> list[Example]:
        rows = self._rows("examples.jsonl", Example)
        return [r for r in rows if split in (None, r.split) and task in (None, r.task)]

    def corpus(self, split: str | None = None, domain: str | None = None) -> list[Reference]:
        rows = self._rows("corpus.jsonl", Reference)
        return [r for r in rows if split in (None, r.split) and domain in (None, r.domain)]

    def truth(self) -> dict[str, Truth]:
        """Ground truth by study id (benchmark data only; empty otherwise)."""
        return {row.study: row for row in self._rows("truth.jsonl", Truth)}


def counted(rows: Iterable[Row]) -> str:
    """How many rows there are of each split and domain, in words."""
    per = Counter(f"split {r.split}, domain {r.domain or 'not stated'}" for r in rows)
    return "; ".join(f"{n} of {which}" for which, n in sorted(per.items())) or "none at all"
