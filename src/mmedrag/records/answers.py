"""Answer parsing: free text → yes / no / unclear.

Place in the picture: Trace ─ **answers.parse** ─ metrics. Two parsers, both reported:

- ``parse_released``: the released system's, quirks included (hedges and non-answers count as
  yes; "without" and "absent" are not seen as no). Source: the released generator of preference
  data, and CARES ``eval_yesno.py``, from which the published numbers come.
- ``parse_strict``: says ``unclear`` when the text does not settle the question.
"""

from __future__ import annotations

import re
from typing import Literal

from mmedrag.records.records import Label


def parse_released(text: str) -> Literal["yes", "no"]:
    """Cut at the first ".", drop ",", split on whitespace; a token No/no/not → no, else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_strict(text: str, question: str | None = None) -> Label:
    """``yes``, ``no`` or ``unclear``.

    A leading yes or no decides, unless the same breath takes it back ("yes and no", "no
    information"). Otherwise every clause is read for itself: hedges make the answer unclear,
    "no / not / without / absent / free of / negative for" deny, "there is / shows / present"
    affirm; clauses that disagree are unclear. A statement of normality answers only when
    ``question`` is known: yes to "is it normal?", no to "is there a disease?".
    """
    body = _clean(text)
    if _BOTH.match(body):
        return "unclear"
    lead = _lead(body)
    if lead is not None:
        return lead
    final = _FINAL.search(body)
    if final:
        return "yes" if final[1] == "yes" else "no"
    labels = {_clause(part, question) for part in _CLAUSES.split(body)} - {None}
    return labels.pop() or "unclear" if len(labels) == 1 else "unclear"


def _clean(text: str) -> str:
    plain = text.lower().replace("’", "'").replace("*", "").replace("_", " ")
    return _PREFIX.sub("", " ".join(plain.split()))


def _lead(part: str) -> Label | None:
    if _TAKEN_BACK.match(part):
        return None
    return "yes" if _LEAD_YES.match(part) else "no" if _LEAD_NO.match(part) else None


def _clause(part: str, question: str | None) -> Label | None:
    """What one clause says; None when it says nothing about yes or no."""
    part = part.strip(" -:\"'()[]")
    lead = _lead(part)
    if lead is not None:
        return lead
    if _HEDGE.search(part):
        return "unclear"
    denied = bool(_DENY.search(_DOUBLE.sub(" ", part)))
    normal = bool(_NORMAL.search(part))
    if normal or _ABNORMAL.search(part):
        return _normality(normal and not denied, question)
    if denied:
        return "unclear" if _MIXED.search(part) else "no"
    return "yes" if _AFFIRM.search(part) or _DOUBLE.search(part) else None


def _normality(normal: bool, question: str | None) -> Label:
    if question is None:
        return "unclear"
    asked = _clean(question)
    asks_normal = bool(_NORMAL.search(asked)) and not _ABNORMAL.search(asked)
    return "yes" if normal == asks_normal else "no"


def _any(phrases: str, start: str = r"\b", end: str = r"(?!\w)") -> re.Pattern[str]:
    """One pattern out of phrases set apart by `` | `` (a bare | stays an inner alternative)."""
    alternatives = "|".join(phrase.strip() for phrase in " ".join(phrases.split()).split(" | "))
    return re.compile(f"{start}(?:{alternatives}){end}")


_IT = r"(?:it|they|there|he|she|this|that) (?:is|are|does|do|has|have|can|was)"
_SEEN = r"(?:seen|visible|evident|identified|observed|detected|found|present|indicated|noted)"

_PREFIX = _any(
    r"""[-–—•#>"'(\[\s] | \d+[.)]\s
    | (?:the )?(?:final |short |correct )?(?:answer|response|option)(?: is)?\s*:?\s
    | assistant\s*:\s* | (?:based on|according to|from|in) [^,]{3,80}, (?=(?:yes|no)\b)""",
    start="^(?:",
    end=")+",
)
_CLAUSES = re.compile(r"(?<=[.!?;])\s+|,? (?:but|however|although|whereas)\b,? ?")
_BOTH = _any(r"(?:yes|no)\s*(?:/|\||\b(?:or|and|and/or)\b)?\s*(?:yes|no)", start="^")
_FINAL = re.compile(r"\banswer (?:is|would be|should be|must be):? (yes|no)\b(?! (?:or|and)\b)")
_LEAD_YES = _any(
    rf"""yes | yeah | yep | correct | true | affirmative | indeed | certainly | definitely
    | absolutely | positive | present(?! of) | {_IT}(?=[.!]|$)""",
    start="",
)
_LEAD_NO = _any(
    rf"""no | nope | false | incorrect | negative | none | neither | never | absent
    | not (?:at all|really|{_SEEN}) | {_IT}(?: not|n't)(?=[.!]|$)""",
    start="",
)
_TAKEN_BACK = _any(
    r"""no (?:doubt|information|data|report|image|context|answer|way to|details?|mention|comment)
    | no (?:idea|question|(?:definite |definitive |firm |clear )?(?:conclusions?|answer))
    | (?:correct|true|present|positive|negative|false|incorrect) (?!findings? )\w+ (?:is|are|was)
    | yes'\w+ | yesterday""",
    start="",
)
_HEDGE = _any(
    r"""unclear | uncertain | unsure | unknown | undetermined | indeterminate | inconclusive
    | equivocal | insufficient | may | might | could be | possibl[ey] | possibility | perhaps
    | maybe | probabl[ey] | likely | suspicious for | suspected | suspicion | questionable
    | not (?:sure|certain|clear|possible|enough|applicable|available|known|definitive|specified)
    | not (?:mentioned|provided|stated|fully visible|excluded|ruled out|well (?:seen|visuali[sz]ed))
    | not (?:mention|say|state|specify|tell|comment|describe whether|provide|know) | n/a
    | (?:can|could|would)(?:not|n't|'t| not) (?:be )?(?:determin|tell|say|said|assess|see the)\w*
    | (?:can|could|would)(?:not|n't|'t| not) (?:be )?(?:evaluat|confirm|exclud|answer|provid)\w*
    | (?:can|could|would)(?:not|n't|'t| not) (?:be )?(?:know|diagnos|conclu|verif|judg|rule[ds]?)\w*
    | unable to | difficult to | hard to | impossible to | versus | vs | depends?
    | would (?:need|be needed) | limited (?:view|evaluation) | no (?:information|mention|comment)
    | further (?:evaluation|imaging|testing|examination|information|assessment)
    | more (?:information|context|details?) | as an ai | (?:i am|i'm) (?:sorry|not) | sorry"""
)
_DENY = _any(
    r"""no | not | without | absent | absence | lacks? | lacking | negative for | free (?:of|from)
    | none | neither | nor | never | denies | excluded | ruled out | devoid | nothing | cannot
    | resolved | \w+n't"""
)
_DOUBLE = _any(
    r"""(?:not|never|no|\w+n't) (?:without|absent|free (?:of|from)|negative for|(?:an )?absence of)
    | no doubt"""
)
_AFFIRM = _any(
    rf"""there (?:is|are|was|were|appears? to be|seems? to be) | there's | shows? | showing
    | demonstrates? | reveals? | displays? | exhibits? | depicts? | indicates? | indicated
    | consistent with | compatible with | presents? with | contains? | suffers? | evidence of
    | signs of | presence of | diagnosed with | had | (?:has|have) (?:been|an?)
    | (?:is|are|was|were) (?:\w+ ){{0,2}}(?:{_SEEN}|apparent|visuali[sz]ed|enlarged|elevated)
    | (?:is|are|was|were) (?:\w+ ){{0,2}}(?:increased|diagnosed|affected|confirmed)
    | can be (?:seen|identified|observed|appreciated|visuali[sz]ed)"""
)
_MIXED = re.compile(
    r"\bthere (?:is|are|was|were)(?!n't| (?:no|not|never|also no|an? (?:absence|lack)|absence)\b)"
    r".*\b(?:without|not|no)\b"
)
_NORMAL = _any(
    r"""(?<!not )(?:normal|unremarkable|within normal limits|intact|clear|healthy)
    | unaffected | preserved | stable"""
)
_ABNORMAL = _any(r"abnormal(?:it(?:y|ies))? | not (?:normal|clear|intact|healthy)")
