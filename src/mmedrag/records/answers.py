"""Reading answers: free text → yes / no / unclear, and whether that is right.

Place in the picture: Trace ─ **read** ─ metrics, reliance, pairs, abstention, controls. A closed
answer is read once, by the pipeline's last stage, and everything after it uses that label
(:func:`label_of`, :func:`verdict`). Two parsers, both reported:

- ``parse_released``: the released system's, quirks included (hedges and non-answers count as
  yes; "without" and "absent" are not seen as no). Source: the released generator of preference
  data, and CARES ``eval_yesno.py``, from which the published numbers come.
- ``parse_strict``: says ``unclear`` when the text does not settle the question.

What a model thinks aloud before it answers is no answer: both parsers read what comes after it
(:func:`without_reasoning`), and the last stage keeps the whole reply beside it (``Answer.raw``).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Literal

from mmedrag.records.records import Answer, Label, Trace

Verdict = Literal["right", "wrong", "unclear"]


def read_text(text: str | None, question: str | None = None) -> Label:
    """The strict reading of a closed answer's text; nothing said is unclear."""
    said = without_reasoning(text or "")
    return parse_strict(said, question) if said.strip() else "unclear"


def read_target(text: str | None, question: str | None = None) -> Literal["yes", "no"]:
    """The truth of a closed question: strict reading, else the released parser's default."""
    label = read_text(text, question)
    return parse_released(text or "") if label == "unclear" else label


def read_answer(trace: Trace) -> None:
    """Set the label of a closed question's answer: the one place where an answer is read. Of a
    reply that reasons first, ``text`` becomes what follows and ``raw`` is the whole."""
    if trace.answer is None:
        return
    separate(trace.answer)
    if trace.answer_type == "closed":
        trace.answer.label = read_text(trace.answer.text, trace.question)


def separate(answer: Answer) -> Answer:
    """Move a reply that holds reasoning to ``raw``, and leave the answer alone in ``text``."""
    final = without_reasoning(answer.text)
    if final != answer.text:
        answer.raw, answer.text = answer.text, final
    return answer


def without_reasoning(text: str) -> str:
    """The answer in a reply that may reason first: unchanged where it does not, "" where the
    answer never came."""
    start, end = answer_span(text)
    return text[start:end]


def answer_span(text: str) -> tuple[int, int]:
    """Where in a reply its answer begins and ends.

    Known are ``<think>`` and its like, ``[THINK]`` (Magistral) and ``◁think▷`` (Kimi-VL). The
    answer follows the last closing tag, which may be alone (the chat template opened it); behind
    an opening tag that is never closed there is none. Of ``<answer>…</answer>``, ``<CONCLUSION>``
    (LLaVA-CoT) and boxes (GLM-V) the inside counts.
    """
    if not _TAG.search(text):
        return 0, len(text)
    start, end = max((tag.end() for tag in _CLOSE.finditer(text)), default=0), len(text)
    again = _OPEN.search(text, start)
    if again:
        end = again.start() if start else 0
    for marked in _ANSWER.finditer(text, start, end):
        start, end = marked.span(1)
    said = text[start:end]
    start += len(said) - len(said.lstrip())
    return start, start + len(said.strip())


def opens_reasoning(text: str) -> bool:
    """Whether a tag in the text begins reasoning."""
    return _OPEN.search(text) is not None


def closes_reasoning(text: str) -> bool:
    """Whether a tag in the text ends reasoning."""
    return _CLOSE.search(text) is not None


def left_open(prompt: str) -> str:
    """The reasoning tag that a rendered prompt ends in, which the reply then lacks; else ""."""
    found = _LEFT_OPEN.search(prompt)
    return found[0] if found else ""


def label_of(trace: Trace) -> Label:
    """What a closed answer says: the label that was set when it was given (read now where a trace
    of another program has none); a row without an answer is unclear."""
    if trace.error or trace.answer is None:
        return "unclear"
    return trace.answer.label or read_text(trace.answer.text, trace.question)


def target_of(trace: Trace) -> Literal["yes", "no"]:
    """The truth of a trace's closed question."""
    return read_target(trace.target, trace.question)


def verdict(trace: Trace) -> Verdict:
    """Whether the answer to a closed question is right. Pairs leave unclear ones out; rates count
    them as wrong, else a system would gain by not answering what is hard."""
    label = label_of(trace)
    return "unclear" if label == "unclear" else "right" if label == target_of(trace) else "wrong"


def is_right(trace: Trace) -> bool:
    return verdict(trace) == "right"


_MODES = "think|thinking|thoughts?|reasoning|seed:think"
_OPENS = rf"<(?:{_MODES})>|\[THINK\]|◁think▷"
_CLOSES = rf"</(?:{_MODES})>|\[/THINK\]|◁/think▷"
_BOXES = (
    r"<(?:answer|conclusion)>|<\|begin_of_box\|>",
    r"</(?:answer|conclusion)>|<\|end_of_box\|>",
)
_OPEN, _CLOSE = (re.compile(tags, re.IGNORECASE) for tags in (_OPENS, _CLOSES))
_ANSWER = re.compile(rf"(?:{_BOXES[0]})(.*?)(?:{_BOXES[1]}|$)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(rf"{_OPENS}|{_CLOSES}|{_BOXES[0]}", re.IGNORECASE)
_LEFT_OPEN = re.compile(rf"(?:{_OPENS})\s*$", re.IGNORECASE)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans({c: " " for c in string.punctuation})


def normalise(text: str) -> str:
    """Lower case, no punctuation or articles, single spaces (SQuAD v1.1 normalisation, with
    punctuation as a break so that "left-sided" meets "left sided")."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(text: str, target: str) -> float:
    """Harmonic mean of token precision and recall (Rajpurkar et al. 2016); 1 if both empty."""
    a, b = normalise(text).split(), normalise(target).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def parse_released(text: str) -> Literal["yes", "no"]:
    """Cut at the first ".", drop ",", split on whitespace; a token No/no/not → no, else yes."""
    words = without_reasoning(text).split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_strict(text: str, question: str | None = None) -> Label:
    """``yes``, ``no`` or ``unclear``.

    A leading yes or no decides, unless the same breath takes it back ("yes and no", "no
    information"). Otherwise every clause is read for itself: hedges make the answer unclear,
    "no / not / without / absent / free of / negative for" deny, "there is / shows / present"
    affirm; clauses that disagree are unclear. A statement of normality answers only when
    ``question`` is known: yes to "is it normal?", no to "is there a disease?".
    """
    body = _clean(without_reasoning(text))
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
