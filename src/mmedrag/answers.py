"""Answer parsing: free text → yes / no / unclear.

Place in the picture: Trace ─ **answers.parse** ─ metrics. Two parsers, both reported:

- ``parse_released``: the released system's, quirks included (SPEC B8: hedges and non-answers
  count as yes; "without" and "absent" are not seen as no). Source: the released generator of
  preference data, and CARES ``eval_yesno.py``, from which the published numbers come.
- ``parse_strict``: says ``unclear`` when the text does not settle the question.
"""

from __future__ import annotations

import re
from typing import Literal

from mmedrag.types import Label


def parse_released(text: str) -> Literal["yes", "no"]:
    """Cut at the first ".", drop ",", split on whitespace; a token No/no/not → no, else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_strict(text: str, question: str | None = None) -> Label:
    """``yes``, ``no`` or ``unclear``.

    A leading yes or no decides, unless the same breath takes it back ("yes and no", "no
    information"). Otherwise every sentence is read for itself: hedges make the answer unclear,
    "no / not / without / absent / free of / negative" deny, "there is / shows / present"
    affirm; sentences that disagree are unclear. A statement of normality answers only when
    ``question`` is known: yes to "is it normal?", no to "is there a disease?".
    """
    body = _clean(text)
    if not body:
        return "unclear"
    lead = _LEAD.match(body)
    if lead and not _TAKEN_BACK.match(body):
        return "yes" if lead.group("yes") else "no"
    labels = {_sentence(part, question) for part in _SENTENCES.split(body)} - {None}
    return labels.pop() or "unclear" if len(labels) == 1 else "unclear"


def _clean(text: str) -> str:
    body = " ".join(text.lower().replace("’", "'").replace("*", "").replace("_", " ").split())
    return _PREFIX.sub("", body)


def _sentence(part: str, question: str | None) -> Label | None:
    """What one clause says; None when it says nothing about yes or no."""
    part = part.strip(" -:\"'()[]")
    if not part:
        return None
    lead = _LEAD.match(part)
    if lead and not _TAKEN_BACK.match(part):
        return "yes" if lead.group("yes") else "no"
    if _HEDGE.search(part):
        return "unclear"
    denied = len(_DENY.findall(_DOUBLE.sub(" affirmed ", part)))
    affirmed = bool(_AFFIRM.search(part)) or bool(_DOUBLE.search(part))
    normal = bool(_NORMAL.search(part))
    if normal or _ABNORMAL.search(part):
        return _normality(normal and not denied, question)
    if denied:
        return "unclear" if _MIXED.search(part) else "no"
    return "yes" if affirmed else None


def _normality(normal: bool, question: str | None) -> Label:
    if question is None:
        return "unclear"
    asked = _clean(question)
    asks_normal = bool(_NORMAL.search(asked)) and not _ABNORMAL.search(asked)
    return "yes" if normal == asks_normal else "no"


_PREFIX = re.compile(
    r"^(?:[-–—•#>\"'(\[\s]|\d+[.)]\s|(?:the )?(?:final |short |correct )?(?:answer|response)(?: is)?\s*:?\s"
    r"|assistant\s*:\s*|(?:based on|according to|from|in) [^,]{3,80}, (?=yes\b|no\b)|option\s*:\s*)+"
)
_SENTENCES = re.compile(r"(?<=[.!?;])\s+|\n|,? (?:but|however|although|whereas)\b,? ?")
_LEAD = re.compile(
    r"(?P<yes>(?:yes|yeah|yep|correct|true|affirmative|indeed|certainly|definitely|absolutely"
    r"|positive|present)\b(?! of\b)|(?:it|they|there|he|she|this|that) (?:is|are|does|do|has|have"
    r"|can|was)(?=[.!]|$))"
    r"|(?P<no>(?:no|nope|false|incorrect|negative|none|neither|never|not (?:at all|present|seen"
    r"|visible|evident|indicated|identified|observed|detected|found|really)|absent)\b"
    r"|(?:it|they|there|he|she|this|that) (?:is|are|does|do|has|have|can|was)"
    r"(?: not|n't)(?=[.!]|$))"
)
_TAKEN_BACK = re.compile(
    r"(?:yes|no)\s*(?:/|or|and|\||and/or)\s*(?:yes|no)\b"
    r"|no (?:doubt|information|data|report|image|context|answer|way to|details?|mention|comment|idea"
    r"|definitive answer|conclusion|clear answer|question|(?:definite |firm )?conclusions?)\b"
    r"|(?:yes|no)[,.]? (?:it )?(?:cannot|can't|could not) be (?:determined|said|assessed|excluded)"
    r"|not (?:sure|certain|clear|possible|enough|applicable|available|known)\b"
    r"|(?:correct|true|present|positive|negative|false|incorrect) (?!findings? )\w+ (?:is|are|was)\b"
)
_HEDGE = re.compile(
    r"\b(?:unclear|uncertain|unsure|unknown|undetermined|indeterminate|inconclusive|equivocal"
    r"|not (?:sure|certain|clear|possible|enough|applicable|available|known|definitive|specified"
    r"|mentioned|provided|stated|fully visible|well seen|well visuali[sz]ed|excluded|ruled out)"
    r"|(?:can|could|may|might|would)(?:not|n't| not) (?:be )?(?:determin|tell|say|said|assess"
    r"|evaluat|confirm|exclud|rule[ds]? out|answer|provid|see the|know|diagnos|conclu|verif|judg)\w*"
    r"|can't be sure|unable to|difficult to|hard to|impossible to"
    r"|insufficient|may|might|could be|possibl[ey]|possibility|perhaps|maybe|probabl[ey]|likely"
    r"|appears? to suggest|suspicious for|suspected|suspicion|questionable|cannot exclude|versus|vs"
    r"|depends?|would need|further (?:evaluation|imaging|testing|examination|information|assessment)"
    r"|more (?:information|context|details?)|as an ai|i am (?:sorry|not)|i'm (?:sorry|not)|sorry"
    r"|n/a|limited (?:view|evaluation)|low confidence|no (?:information|mention|comment|way to))\b"
)
_DENY = re.compile(
    r"\b(?:no|not|without|absent|absence|lacks?|lacking|negative for|free (?:of|from)|none|neither"
    r"|nor|never|denies|excluded|ruled out|unremarkable for|devoid|nothing|cannot|resolved"
    r"|rather than)\b|n't\b"
)
_DOUBLE = re.compile(
    r"\b(?:not|never|n't|no) (?:without|absent|free (?:of|from)|negative for|(?:an? )?absence of)\b"
    r"|n't (?:absent|without)\b|\bno doubt\b"
)
_AFFIRM = re.compile(
    r"\b(?:there (?:is|are|was|were|appears? to be|seems? to be)|there's|shows?|showing|demonstrates?|reveals?"
    r"|displays?|exhibits?|depicts?|indicates?|indicated|consistent with|compatible with|presents? with"
    r"|(?:is|are|was|were) (?:\w+ ){0,2}(?:present|seen|visible|evident|noted|identified|observed"
    r"|detected|found|apparent|visuali[sz]ed|enlarged|elevated|increased|diagnosed|affected|confirmed)"
    r"|can be (?:seen|identified|observed|appreciated|visuali[sz]ed)|(?:has|have) (?:been|an?)"
    r"|contains?|suffers?|evidence of|signs of|presence of|diagnosed with|had)\b"
    r"|^(?:present|seen|visible|evident|confirmed)\b"
)
_MIXED = re.compile(
    r"\bthere (?:is|are|was|were)(?! (?:no|not|never|an? absence|absence|also no|a lack))"
    r"(?!n't)\b.*\b(?:without|and no|with no|not|no)\b"
)
_NORMAL = re.compile(
    r"(?<!ab)(?<!not )\b(?:normal|unremarkable|within normal limits|intact|clear|healthy"
    r"|unaffected|preserved|stable)\b"
)
_ABNORMAL = re.compile(r"\b(?:abnormal(?:it(?:y|ies))?|not (?:normal|clear|intact|healthy))\b")
