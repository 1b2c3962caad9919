"""Long texts as windows of whole sentences, so that nothing is cut silently.

The released retriever keeps the first 77 tokens of a report and drops the rest (R1 of
docs/differences.md).
Here a text over the context becomes windows whose unit embeddings are averaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# after the end of a sentence, or at a line break; "1.5 cm" and "e.g. a" style dots stay inside
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9(])|\n+")


def sentences(text: str) -> list[str]:
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def windows(text: str, length: Callable[[str], int], context: int) -> list[str]:
    """Cut ``text`` into the fewest greedy runs of whole sentences of at most ``context`` tokens.

    ``length`` counts tokens with the special ones. A sentence that is too long by itself is cut
    between words; a single word that is too long stays whole (the encoder then truncates and
    counts it). Joined by spaces, the windows give back every word of the text in order.
    """
    out: list[str] = []
    current = ""
    for piece in _pieces(text, length, context):
        joined = f"{current} {piece}" if current else piece
        if current and length(joined) > context:
            out.append(current)
            joined = piece
        current = joined
    return [*out, current] if current else out


def _pieces(text: str, length: Callable[[str], int], context: int) -> Iterator[str]:
    for sentence in sentences(text):
        if length(sentence) <= context:
            yield sentence
            continue
        words, start = sentence.split(), 0
        while start < len(words):
            low, high = start + 1, len(words)  # the longest run of words that fits, by bisection
            while low < high:
                middle = (low + high + 1) // 2
                fits = length(" ".join(words[start:middle])) <= context
                low, high = (middle, high) if fits else (low, middle - 1)
            yield " ".join(words[start:low])
            start = low
