"""Options of multiple-choice questions, in the forms of public sets, as plain texts.

Place in the picture: under every importer that reads questions. Read are a field of options (a
list, an object by letter, an object of labels and texts, a text such as ``A: lung, B: liver``), one
field an option (``Choice A``, ``option_b``, ``opa``, ``A``), and options inside the question. The
answer becomes the text of the right option.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmedrag.data.common import answer_type
from mmedrag.data.rows import literal
from mmedrag.records import UserError

FIELDS = ("options", "choices", "candidates", "answer_choices", "mc_options", "multiple_choices")
RIGHT = ("answer_label", "answer_idx", "answer_index", "answer_key", "correct_option")
_COLUMN = re.compile(
    r"(?:choice|option|opt|candidate)[ _.-]?([a-j])|op([a-e])|(?:choice|option)[ _.-]?(\d)"
)
_MARK = re.compile(r"(?<![^\s,;(\[])\(?([A-J])\s?[.):：]\s*")
_ASKS_AGAIN = re.compile(r"\s*(?:please )?(?:answer|choose|select|respond|give|pick)\b", re.I)
_HEAD = re.compile(r"\s*(?:answer )?(?:options|choices)\s*:?\s*$", re.I)
_LETTER = re.compile(r"\(?([A-Za-z]|\d{1,2})\)?\s*(?:[.):：]\s*(\S.*)?)?", re.DOTALL)
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Choice:
    """What a question offers: its options, the right one's text, and the question without them.

    ``used`` are the fields of the row that said so. ``doubt`` says why a letter for an answer
    could not be read as an option.
    """

    question: str
    answer: str | None
    options: list[str] = field(default_factory=list)
    used: frozenset[str] = frozenset()
    doubt: str | None = None

    @property
    def yes_no(self) -> bool:
        """Are the options the two answers of a closed question?"""
        return {_same(option) for option in self.options} == {"yes", "no"}

    def answer_type(self, given: Any) -> tuple[str, dict[str, Any]]:
        """As :func:`mmedrag.data.common.answer_type`; one of several options is an open answer."""
        kept, original = answer_type(given, self.answer)
        if kept == "closed" and self.options and not self.yes_no:
            return "open", {"answer_type": given} if given else {}
        return kept, original


def choice_of(row: Mapping[str, Any], question: str, answer: str | None) -> Choice:
    """The options of a row's question, and its answer as the text of one of them.

    Raises:
        UserError: options that cannot be understood, or an answer that is none of them.
    """
    names = {str(key).strip().casefold(): str(key) for key in reversed(list(row))}
    found = _from_field(row, names) or _from_columns(row, names)
    if found is None:
        return _inside(question, answer)
    labels, options, used = found
    options = _bare(labels, options)
    if not all(options):
        raise UserError(f"options: one of {len(options)} is empty, expected texts")
    right = next((row[names[k]] for k in RIGHT if k in names and row[names[k]] is not None), None)
    return Choice(
        _without(question, options, row, used),
        _right(labels, options, answer, right),
        options,
        frozenset(used),
    )


def _from_field(
    row: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[Sequence[str], list[str], list[str]] | None:
    key = next((names[k] for k in FIELDS if k in names and row[names[k]] not in (None, "")), None)
    if key is None or row[key] in ([], {}):
        return None
    labels, options = _listed(key, row[key])
    if len(options) < 2:
        raise UserError(f"{key}: got {row[key]!r:.80}, expected at least two options")
    return labels, options, [key]


def _listed(key: str, value: Any) -> tuple[Sequence[str], list[str]]:
    """(labels, texts) of one field of options."""
    bad = UserError(f"{key}: got {value!r:.80}, expected a list of options or an object by letter")
    if isinstance(value, str):
        return _in_text(value.strip(), key, bad)
    if isinstance(value, Mapping):
        by = {str(k).casefold(): v for k, v in value.items()}
        texts, labels = by.get("text", by.get("texts")), by.get("label", by.get("labels"))
        if isinstance(texts, list):
            value = texts
            if not isinstance(labels, list) or len(labels) != len(texts):
                labels = list(_letters(texts))
            return [str(label) for label in labels], [_plain(text, bad) for text in texts]
        kept = {str(k): v for k, v in value.items() if v is not None}  # Arrow fills all keys
        return list(kept), [_plain(text, bad) for text in kept.values()]
    if not isinstance(value, list):
        raise bad
    if all(isinstance(item, Mapping) for item in value):
        pairs = []
        for item in value:
            low = {str(k).casefold(): v for k, v in item.items()}
            name = next((low[k] for k in ("key", "label", "letter", "id") if k in low), None)
            text = next((low[k] for k in ("value", "text", "content", "option") if k in low), None)
            pairs.append((name, _plain(text, bad)))
        own = all(name is not None for name, _ in pairs)
        return (
            [str(name) for name, _ in pairs] if own else _letters(pairs),
            [text for _, text in pairs],
        )
    return _letters(value), [_plain(item, bad) for item in value]


def _letters(items: Sequence[Any]) -> Sequence[str]:
    if len(items) > len(LETTERS):
        return [str(number) for number in range(1, len(items) + 1)]
    return LETTERS[: len(items)]


def _plain(value: Any, bad: UserError) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise bad
    return str(value).strip()


def _in_text(text: str, key: str, bad: UserError) -> tuple[Sequence[str], list[str]]:
    """Options written into one text: JSON, a Python list, lettered, or one a line."""
    if isinstance(found := literal(text), (list, dict)):
        return _listed(key, found)
    lettered = _lettered(text)
    if lettered and not lettered[0].strip("[( "):
        return LETTERS[: len(lettered[1])], lettered[1]
    for separator in ("\n", "|", ";"):
        parts = [part.strip() for part in text.split(separator) if part.strip()]
        if len(parts) > 1:
            return _letters(parts), parts
    raise bad


def _lettered(text: str) -> tuple[str, list[str]] | None:
    """(what stands before, the options) of a text with ``A. … B. …`` in order."""
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if mark[1] == "A" and len(marks) == 1:  # the first was the end of a word: hepatitis A.
            marks = [mark]
        elif LETTERS[len(marks) :].startswith(mark[1]):
            marks.append(mark)
    if len(marks) < 2:
        return None
    before, rest = text[: marks[0].start()], ""
    if all(text[: mark.start()].rstrip(" \t").endswith("\n") for mark in marks[1:]):
        # one a line: what follows the last one's line is none of them
        cut = marks[-1].end()
        tail, _, rest = text[cut:].partition("\n")
        text = text[:cut] + tail
        before += "" if _ASKS_AGAIN.match(rest) else rest
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    parts = [
        text[mark.end() : end].strip().rstrip(",;").strip()
        for mark, end in zip(marks, ends, strict=True)
    ]
    if before.rstrip().endswith(("[", "(")):
        before, parts[-1] = before.rstrip()[:-1], parts[-1].rstrip("])").strip()
    return (before, parts) if all(parts) else None


def _from_columns(
    row: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[Sequence[str], list[str], list[str]] | None:
    """One field an option; trailing ones may be empty."""
    columns: dict[str, str] = {}
    for low, key in names.items():
        if found := _COLUMN.fullmatch(low):
            columns[(found[1] or found[2] or found[3]).upper()] = key
    if len(columns) < 2:  # a table with columns A, B, C, D
        columns = {k: k for k in LETTERS if k in row}
    labels = sorted(columns)
    starts = {"A": LETTERS, "0": "0123456789", "1": "123456789"}.get(labels[0] if labels else "")
    if len(labels) < 2 or starts is None or "".join(labels) != starts[: len(labels)]:
        return None
    values = [row[columns[label]] for label in labels]
    texts = ["" if v is None or v != v or v == "nan" else str(v).strip() for v in values]
    while texts and not texts[-1]:
        texts.pop()
    if not texts:
        return None
    if len(texts) < 2:
        raise UserError(f"{columns[labels[0]]}: the only option, expected at least two")
    return labels[: len(texts)], texts, [columns[label] for label in labels]


def _bare(labels: Sequence[str], options: list[str]) -> list[str]:
    """Options without their own letter, where each begins with it."""
    marks = [re.compile(rf"\(?{re.escape(label)}\)?\s?[.):：]\s*", re.I) for label in labels]
    found = [mark.match(option) for mark, option in zip(marks, options, strict=True)]
    if all(found):
        return [o[m.end() :].strip() for o, m in zip(options, found, strict=True) if m]
    return options


def _right(labels: Sequence[str], options: list[str], answer: str | None, label: Any) -> str | None:
    """The text of the right option."""
    given = [str(v) for v in (answer, label) if v is not None and str(v).strip()]
    if not given:
        return None
    at = [_index(labels, options, one) for one in given]
    known = {options[i] for i in at if i is not None}
    if not known:
        raise UserError(f"answer: {given[0]!r:.60} is none of the {len(options)} options")
    if len(known) > 1:
        raise UserError(f"answer: {given[0]!r:.40} and {given[1]!r:.40} are different options")
    return known.pop()


def _index(labels: Sequence[str], options: list[str], given: str) -> int | None:
    """Which option ``given`` is: by its text, by its letter, or by its number from 0."""
    texts = [_same(option) for option in options]
    if _same(given) in texts:
        return texts.index(_same(given))
    found = _LETTER.fullmatch(given.strip())
    if found is None:
        return None
    low = [label.casefold() for label in labels]
    if found[1].casefold() in low:
        at = low.index(found[1].casefold())
        return at if found[2] is None or _same(found[2]) == texts[at] else None
    number = found[1].isdigit() and found[2] is None and int(found[1])
    return number if number is not False and number < len(options) else None


def _same(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(". ")


def _inside(question: str, answer: str | None) -> Choice:
    """Options written into the question, where the answer is one of them."""
    letter = bool(answer and re.fullmatch(r"\(?[A-J]\)?[.):]?", answer.strip()))
    found = _lettered(question)
    if found and answer:
        before, options = found
        at = _index(LETTERS[: len(options)], options, answer)
        if at is not None and before.strip():
            return Choice(_HEAD.sub("", before.strip()) or before.strip(), options[at], options)
    return Choice(
        question,
        answer,
        doubt=f"answer {answer!r} may be an option, but the row has none" if letter else None,
    )


def _without(
    question: str, options: Sequence[str], row: Mapping[str, Any], used: Sequence[str]
) -> str:
    """The question without the options that its own field repeats."""
    inside = _lettered(question)
    if inside and [_same(o) for o in inside[1]] == [_same(o) for o in options]:
        return _HEAD.sub("", inside[0].strip()) or question
    for key in used:
        text = row[key]
        if isinstance(text, str) and len(used) == 1:
            for tail in (f"[{text}]", f"({text})", text):
                if question.rstrip().endswith(tail):
                    return question.rstrip()[: -len(tail)].rstrip()
    return question
