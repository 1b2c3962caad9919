"""Closed answers drawn from the model's own p(yes), as if it had been asked again.

Place in the picture: traces ─► *draw* ─► pairs of kind ``unaided``, and of others when asked for.
Preferring a right draw over a wrong one is the on-policy pair of iterative preference tuning (Pang
et al. 2024). Likelier answers alone make pairs only where both conditions disagree, the one always
right and the other always wrong: they teach to contradict. With draws a question comes up in
proportion to how unsure the model is, sure agreement seldom, and neither side of it is favoured.
"""

from __future__ import annotations

import random

from mmedrag.records import Trace

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
    draw = random.Random(f"{seed}/{trace.example_id}").random()
    side = "yes" if draw < answer.p_yes else "no"
    word = answer.text.strip(" .")
    text = answer.text if word.lower() == side else answer.text.replace(word, OTHER[word])
    return trace.model_copy(
        update={"answer": answer.model_copy(update={"text": text, "label": side})}
    )
