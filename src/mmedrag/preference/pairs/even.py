"""Pairs whose answer gives nothing away.

Place in the picture: pairs ─► *even_answers* ─► ``dpo``. Where retrieved reports are silent about
what is there, most ``resist`` pairs say yes and most ``copy`` pairs no. A model can then gain on
both by saying yes more often, and never learns when references are to be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmedrag.records import Pair, parse_strict

EVEN = ("copy", "resist")


def even_answers(pairs: Sequence[Pair]) -> list[Pair]:
    """Keep as many ``copy`` as ``resist`` pairs of every chosen answer, and as many yes as no.

    Counted over questions, domain by domain; pairs of reports and of other kinds all stay. The
    first of each are kept, in the given order: shuffle before. Where there is but one of the two
    kinds, only yes and no are evened.
    """
    kinds = [kind for kind in EVEN if any(pair.kind == kind for pair in pairs)]
    cells: dict[tuple[str, str | None, str], int] = {}
    for pair in pairs:
        if _counts(pair):
            cells[_cell(pair)] = cells.get(_cell(pair), 0) + 1

    def room(domain: str | None, answer: str) -> int:
        answers = ("yes", "no") if answer in ("yes", "no") else (answer,)
        return min(cells.get((kind, domain, a), 0) for kind in kinds for a in answers)

    kept, taken = [], dict.fromkeys(cells, 0)
    for pair in pairs:
        if _counts(pair):
            cell = _cell(pair)
            taken[cell] += 1
            if taken[cell] > room(*cell[1:]):
                continue
        kept.append(pair)
    return kept


def _counts(pair: Pair) -> bool:
    return pair.kind in EVEN and pair.meta.get("task") == "vqa"


def _cell(pair: Pair) -> tuple[str, str | None, str]:
    side = parse_strict(pair.chosen.text)
    answer = side if side in ("yes", "no") else pair.chosen.text.lower()
    return pair.kind, pair.meta.get("domain"), answer
