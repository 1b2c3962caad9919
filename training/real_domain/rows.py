"""Which pictures the real domain model is fitted on, and which it is judged by only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmedrag.domain import labelled_rows
from mmedrag.records import Row, UserError
from mmedrag.runtime import DataFolder

PERMITTED = ("CC0-1.0", "MIT", "CC-BY-3.0", "CC-BY-4.0")


def picture_licence(row: Row) -> str:
    """The licence of the picture, where a row tells it apart from that of its annotation."""
    return (row.licence or "").partition(" (image)")[0]


def rows_to_fit(data: Sequence[DataFolder]) -> tuple[list[Row], np.ndarray]:
    """All rows with a picture, a domain and a source; and which of them, bool [n], are under a
    permissive licence. No fit ever sees the others.

    Raises:
        UserError: a domain without a permitted picture, or fewer than two domains.
    """
    rows = [row for row in labelled_rows(data) if row.source]
    use = np.array([picture_licence(row) in PERMITTED for row in rows], dtype=bool)
    domains = {str(row.domain) for row, permitted in zip(rows, use, strict=True) if permitted}
    if len(domains) < 2 or domains != {str(row.domain) for row in rows}:
        raise UserError(
            f"real_domain: pictures under {', '.join(PERMITTED)} are of domains {sorted(domains)}, "
            "expected some of every domain and two domains or more"
        )
    return rows, use
