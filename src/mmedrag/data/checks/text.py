"""What a check can tell from text alone: identity in it, texts that break off, odd answers.

The rules are strict on purpose: a finding should be true when a person looks at it.
"""

from __future__ import annotations

import re
from collections import Counter

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
)
_NAME = r"(?:[A-Z]['’])?[A-Z][a-z]+(?:-[A-Z]?[a-z]+)?"
# what stands for a name that was taken out
_HIDDEN = r"(?i:(?:un|de-?)?identified|redacted|anonym\w*|removed|name|person|patient)\b"
IDENTITY: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "date",
        re.compile(
            r"\b(?:0?[1-9]|[12]\d|3[01])([./-])(?:0?[1-9]|[12]\d|3[01])\1(?:19|20)\d\d\b"
            r"|\b(?:19|20)\d\d([./-])(?:0[1-9]|1[0-2])\2(?:0[1-9]|[12]\d|3[01])\b"
            rf"|\b(?:\d{{1,2}}(?:st|nd|rd|th)?\s+)?{_MONTH}\.?\s+(?:\d{{1,2}}(?:st|nd|rd|th)?,?\s+)?"
            r"(?:19|20)\d\d\b",
            re.IGNORECASE,
        ),
    ),
    (
        "name",
        re.compile(
            rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Doctor)\b\.?\s+(?!{_HIDDEN})(?:{_NAME}|[A-Z]\.\s*{_NAME})"
            rf"|\b(?i:patient(?:'s)? name|name of (?:the )?patient|referring physician|dictated by"
            rf"|signed by|radiologist)\s*:\s*(?:{_NAME})"
        ),
    ),
    (
        "id",
        re.compile(
            r"\b(?:MRN|SSN|NHS|accession|medical record|patient id|hospital number|case no)\b"
            r"\.?\s*(?:number|no|nr|#)?\s*[:#.]?\s*"
            r"(?![A-Z]\d{5}\b)[A-Z]{0,4}-?\d{4,}"  # not the accession of a gene or a protein
            r"|\b\d{3}-\d{2}-\d{4}\b",
            re.IGNORECASE,
        ),
    ),
    (
        "contact",
        re.compile(
            r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b|\(\d{3}\)\s?\d{3}-\d{4}\b"
            r"|\b(?:tel|phone|fax)\.?\s*:?\s*\+?\d[\d ()/-]{6,}\d",
            re.IGNORECASE,
        ),
    ),
)


_MAYBE = re.compile(
    r"\d{3}|\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Doctor)\b|@|(?i:name|physician|dictated|signed|radiologist\s*:)"
)


def identity(text: str) -> list[tuple[str, str]]:
    """(kind, the words) of what looks like a date, a name, an id or an address."""
    found: list[tuple[str, str]] = []
    if not _MAYBE.search(text):  # cheap: most texts hold nothing of the kind
        return found
    for kind, pattern in IDENTITY:
        if match := pattern.search(text):
            found.append((kind, match.group(0)))
    return found


_STOP = re.compile(r"[.!?;:。)\]\"'”’%*]\s*$")
_OPEN_END = re.compile(
    r"(?:[,(\[/=]|[a-z]-|\b(?:the|an?|of|and|or|with|without|in|on|to|by|for|from|at|as|is|are"
    r"|was|were|be|been|has|have|had|which|that|this|these|into|between|during|than|via|including"
    r"|such|due|both|its|their|not|may|can|showing|shows))\s*$"
)
_WORD = re.compile(r"[a-z]{4,24}")
_INFLECTED = re.compile(r"(?:e?s|e?d|ing|al(?:ly)?|ic(?:al)?|ly|ous|ity|ations?|like|y)\Z")


def stops(text: str) -> bool:
    """The text ends as a sentence does."""
    return bool(_STOP.search(text))


def breaks_off(text: str) -> str | None:
    """Why a text is cut in the middle, as far as the text itself shows; None if it does not."""
    body = text.rstrip()
    if not body or stops(body):
        return None
    if _OPEN_END.search(body):
        return f"ends with {body[-20:]!r}"
    if body.count("(") > body.count(")") and len(body) - body.rindex("(") < 200:
        return "ends inside brackets"
    return None


def last_word(text: str) -> str | None:
    """A last word without a full stop, which may be the beginning of another word."""
    body = text.rstrip()
    match = re.search(r"(?:^|\s)([a-z]{4,24})$", body)
    return match.group(1) if match and not stops(body) else None


class Words:
    """The words of all texts: tells whether a last word is only a part of one.

    Memory is that of the vocabulary, not of the texts: rare words are dropped now and then.
    """

    def __init__(self, limit: int = 300_000) -> None:
        self._seen: Counter[str] = Counter()
        self._limit = limit
        self._heads: dict[str, list[str]] | None = None

    def add(self, text: str) -> None:
        self._seen.update(_WORD.findall(text.lower()))
        if len(self._seen) > self._limit:
            self._seen = Counter({w: n for w, n in self._seen.items() if n > 1})
        self._heads = None

    def half(self, word: str, here: int = 1) -> str | None:
        """A common word of which ``word`` is the beginning, not the singular.

        ``word`` itself must not have been seen elsewhere than here (``here`` times).
        """
        if self._seen[word] > here:
            return None
        if self._heads is None:
            self._heads = {}
            for other, count in sorted(self._seen.items()):
                if count >= 3:
                    self._heads.setdefault(other[:4], []).append(other)
        longer = [o for o in self._heads.get(word[:4], []) if o.startswith(word) and o != word]
        if not longer or any(_INFLECTED.fullmatch(o[len(word) :]) for o in longer):
            return None
        return longer[0]


_SPACE = re.compile(r"\s+")


def normal(text: str) -> str:
    """For comparing texts: without case, punctuation at the ends, and odd spacing."""
    return _SPACE.sub(" ", text).strip(" .:;,?!").lower()


def repeats_question(question: str, answer: str) -> bool:
    """The answer holds the whole question (of four words or more)."""
    asked = normal(question.replace("<image>", " ")).rstrip("?").strip()
    return len(asked.split()) >= 4 and asked in normal(answer)


def asks(answer: str, closed: bool) -> bool:
    """The answer is a question; that to a closed question must not even hold one."""
    return answer.rstrip().endswith("?") or (closed and "?" in answer)


_ITSELF = re.compile(r"[?)]\W*\b(?:yes|no)\W*$", re.IGNORECASE)


def answers_itself(question: str) -> bool:
    """The question goes on after its mark with yes or no: "Is it large? - No"."""
    return bool(_ITSELF.search(question))
