"""Which answers become pairs: drawn from the model's p(yes), and evened so that none tells.

Place in the picture: traces ─► *draw* ─► pairs ─► *even* ─► train_dpo.

**Draws**, for pairs of kind ``unaided`` and of others when asked for: closed answers as if the
model had been asked again. Preferring a right draw over a wrong one is the on-policy pair of
iterative preference tuning (Pang et al. 2024). Likelier answers alone make pairs only where both
conditions disagree, the one always right and the other always wrong: they teach to contradict.
With draws a question comes up in proportion to how unsure the model is, sure agreement seldom, and
neither side of it is favoured.

**Even answers**: where retrieved reports are silent about what is there, most ``resist`` pairs say
yes and most ``copy`` pairs no. A model can then gain on both by saying yes more often, and never
learns when references are to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmedrag.records import Pair, Trace, read_text
from mmedrag.runtime import named_random

OTHER = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes", "YES": "NO", "NO": "YES"}


def can_draw(trace: Trace) -> bool:
    """A closed question answered by one word, whose probability is known."""
    answer = trace.answer
    return bool(
        trace.answer_type == "closed"
        and answer
        and answer.p_yes is not None
        and answer.text.strip(" .") in OTHER
    )


def draw_answer(trace: Trace, seed: str) -> Trace:
    """The trace with yes or no drawn by its ``p_yes``; spelled as the model spelled its answer."""
    answer = trace.answer
    assert answer and answer.p_yes is not None  # can_draw
    draw = named_random(seed, trace.example_id).random()
    side = "yes" if draw < answer.p_yes else "no"
    word = answer.text.strip(" .")
    text = answer.text if word.lower() == side else answer.text.replace(word, OTHER[word])
    return trace.model_copy(
        update={"answer": answer.model_copy(update={"text": text, "label": side})}
    )


EVEN = ("copy", "resist")


def even_answers(pairs: Sequence[Pair], labels: Mapping[str, str] | None = None) -> list[Pair]:
    """Keep as many ``copy`` as ``resist`` pairs of every chosen answer, and as many yes as no.

    Counted over questions, domain by domain; pairs of reports and of other kinds all stay. The
    first of each are kept, in the given order: shuffle before. Where there is but one of the two
    kinds, only yes and no are evened.

    Args:
        labels: pair id → what its chosen answer says, read with the question; without it the text
            alone is read.
    """
    chosen = {pair.id: _chosen(pair, labels or {}) for pair in pairs}
    kinds = [kind for kind in EVEN if any(pair.kind == kind for pair in pairs)]
    cells: dict[tuple[str, str | None, str], int] = {}
    for pair in pairs:
        if _counts(pair):
            cell = _cell(pair, chosen)
            cells[cell] = cells.get(cell, 0) + 1

    def room(domain: str | None, answer: str) -> int:
        answers = ("yes", "no") if answer in ("yes", "no") else (answer,)
        return min(cells.get((kind, domain, a), 0) for kind in kinds for a in answers)

    kept, taken = [], dict.fromkeys(cells, 0)
    for pair in pairs:
        if _counts(pair):
            cell = _cell(pair, chosen)
            taken[cell] += 1
            if taken[cell] > room(*cell[1:]):
                continue
        kept.append(pair)
    return kept


def _counts(pair: Pair) -> bool:
    return pair.kind in EVEN and pair.meta.get("task") == "vqa"


def _cell(pair: Pair, chosen: Mapping[str, str]) -> tuple[str, str | None, str]:
    return pair.kind, pair.meta.get("domain"), chosen[pair.id]


def _chosen(pair: Pair, labels: Mapping[str, str]) -> str:
    side = labels.get(pair.id) or read_text(pair.chosen.text)
    return side if side in ("yes", "no") else pair.chosen.text.lower()
