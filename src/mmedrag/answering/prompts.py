"""Prompt templates: what the model is asked, with or without retrieved references.

Place in the picture: Selection → **prompts.render** → Prompt. Three sets ship
(``prompt_sets.toml``): ``default`` (short, the model's own chat template), ``llava_med``
(``mistral_instruct``, as LLaVA-Med documents) and ``released`` (byte for byte what the released
MMed-RAG sent, ``vicuna_v1``). Every prompt carries its template id ``set/name@hash8``.

Two rules hold for every set. A reference cannot break out of its place: role markers, special
tokens and ``<image>`` inside it are neutralised. And references are budgeted to the model's
context: whole references are dropped, last first, and recorded; nothing is cut in the middle.
"""

from __future__ import annotations

import hashlib
import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mmedrag.records import UNKNOWN, Generator, Hit, Measuring, Prompt, Request, Trace, UserError

SETS = ("default", "llava_med", "released")
NEW_TOKENS = {"vqa_closed": 16, "vqa_open": 48, "report": 256}  # room kept for the answer

# What a chat format may take for control text. Angle and square brackets become round ones, a
# role's colon becomes a dash: still readable, no longer a token or a turn.
_TOKENS = re.compile(
    r"<(\|[^<>|\n]{1,40}\|)>"
    r"|<(/?(?:s|pad|unk|bos|eos|mask|video|audio|(?:start|end)_of_turn|\w{0,24}image\w{0,24}"
    r"|im_(?:start|end|patch)|\w{0,24}_token))>"
    r"|\[(/?(?:INST|IMG|IMG_BREAK|IMG_END|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS))\]"
    r"|<<(/?SYS)>>",
    re.IGNORECASE,
)
_ROLES = re.compile(
    r"\b(USER|ASSISTANT)(\s*):|(?:(?<=###)|(?<=### )|^)(SYSTEM|HUMAN)(\s*):", re.I | re.M
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def neutralise(text: str, markers: Sequence[str] = ()) -> str:
    """``text`` without anything that a chat format reads as control; harmless text unchanged."""
    text = _CONTROL.sub("", text)
    text = _TOKENS.sub(lambda m: "(" + next(g for g in m.groups() if g) + ")", text)
    text = _ROLES.sub(lambda m: f"{m[1] or m[2]} -", text)
    for marker in markers:
        text = text.replace(marker, marker.rstrip(":") + " -")
    return text


@cache
def load_set(name: str) -> Mapping[str, Any]:
    """The named set, or the one set in a TOML file of the user's.

    Raises:
        UserError: unknown name, unreadable file, or a template that does not name its place.
    """
    if name in SETS:
        path, key = Path(__file__).with_name("prompt_sets.toml"), name
    elif name.endswith(".toml"):
        path, key = Path(name), Path(name).stem
    else:
        raise UserError(
            f"prompts: set {name!r} is not known, expected {', '.join(SETS)} or a .toml file"
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: prompt set cannot be read: {error}") from None
    if key not in tables or "templates" not in tables[key]:
        raise UserError(f"{path}: expected a table [{key}] with [{key}.templates]")
    chosen = tables[key]
    for needed in ("vqa_closed", "vqa_open", "report"):
        for template in (needed, needed + "+refs"):
            if template not in chosen["templates"]:
                raise UserError(f"{path}: [{key}.templates]: {template!r} is missing")
    for template, text in chosen["templates"].items():
        if template.startswith("vqa") and "{Q}" not in text:
            raise UserError(f"{path}: {template}: no {{Q}} for the question")
        if template.endswith("+refs") and "{R}" not in text:
            raise UserError(f"{path}: {template}: no {{R}} for the references")
    if chosen.get("style") == "raw" and "{U}" not in chosen.get("conversation", ""):
        raise UserError(f"{path}: [{key}]: style 'raw' needs a conversation with {{U}}")
    return chosen


_YES_NO = {"yes", "no"}


def fill(template: str, **values: object) -> str:
    """``template`` with each ``{name}`` replaced once; braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: str(values[m[1]]) if m[1] in values else m[0], template)


def prompt_length(prompt: Prompt, trace: Trace, generator: Generator, views: int = 1) -> int:
    """Tokens of the model's input: with the trace's own pictures, where the generator measures
    them, else with ``views`` of the model's size."""
    if isinstance(generator, Measuring) and trace.example is not None:
        images, noise = tuple(trace.example.images), trace.condition.noise
        return generator.count_request(Request(prompt=prompt, images=images, noise=noise))
    return generator.count_tokens(prompt, views if trace.image else 0)


@dataclass
class TemplateSet:
    """A prompt set. ``render`` is pure but for the generator's token count."""

    name: str = "default"
    new_tokens: Mapping[str, int] = field(default_factory=lambda: dict(NEW_TOKENS))

    def __post_init__(self) -> None:
        load_set(self.name)  # a wrong name fails here, before any work

    def render(
        self, trace: Trace, references: Sequence[Hit], generator: Generator | None
    ) -> Prompt:
        """The prompt of ``trace`` with as many of ``references`` (best first) as fit."""
        kept = [hit for hit in references if hit.text.strip()]
        empty = [hit.id for hit in references if not hit.text.strip()]
        dropped: list[str] = []
        prompt = self._text(trace, kept)
        if generator is not None:
            thinking = min(getattr(generator, "reasoning_tokens", 0), generator.context // 2)
            room = generator.context - self.new_tokens[kind(trace)] - thinking
            while kept and prompt_length(prompt, trace, generator) > room:
                dropped.insert(0, kept.pop().id)
                prompt = self._text(trace, kept)
        prompt.dropped = dropped + empty
        return prompt

    def template(self, trace: Trace, references: bool) -> str:
        """The name of the template that serves this trace, the most special one that exists."""
        base, suffix = kind(trace), "+refs" if references else ""
        domain = trace.domain.label if trace.domain else UNKNOWN
        mimic = ["_mimic"] if "mimic" in (trace.source or "").lower() else []
        bases = ["vqa_choice", base] if _offered(trace) and base == "vqa_open" else [base]
        names = [
            name
            for b in bases
            for name in [*(f"{b}_{domain}{m}{suffix}" for m in [*mimic, ""]), b + suffix]
        ]
        return next(name for name in names if name in load_set(self.name)["templates"])

    def _text(self, trace: Trace, references: Sequence[Hit]) -> Prompt:
        chosen = load_set(self.name)
        name = self.template(trace, bool(references))
        template = chosen["templates"][name]
        item = chosen.get("items", {}).get(name, chosen["item"])
        conversation = chosen.get("conversation", "{U}")
        collapse, markers = chosen.get("collapse", True), chosen.get("markers", ())
        if isinstance(collapse, list):
            collapse = name in collapse
        listed = "".join(
            fill(item, i=i, r=_reference(hit.text, collapse, markers))
            for i, hit in enumerate(references, 1)
        )
        asked, options = _question(trace.question), _options(trace)
        if options and "{O}" not in template:  # a template that knows no options loses none
            asked = f"{asked}\n{options}"
        turn = fill(template, Q=asked, O=options, R=listed, k=len(references))
        parts = "\0".join([template, item if references else "", conversation])
        digest = hashlib.sha256(parts.encode()).hexdigest()[:8]
        return Prompt(
            template=f"{Path(self.name).stem}/{name}@{digest}",
            text=fill(conversation, U=turn.strip()),
            style=chosen.get("style", "chat"),
            references=[hit.id for hit in references],
        )


def kind(trace: Trace) -> str:
    """``vqa_closed``, ``vqa_open`` or ``report``."""
    if trace.task == "report":
        return "report"
    return "vqa_closed" if trace.answer_type == "closed" else "vqa_open"


def _offered(trace: Trace) -> list[str]:
    """The options to show: yes and no of a closed question stand in its template."""
    options = trace.options or []
    told = trace.answer_type == "closed" and {o.strip().casefold() for o in options} <= _YES_NO
    return [] if told else options


def _options(trace: Trace) -> str:
    """One option a line, lettered; without control text."""
    shown = [" ".join(neutralise(option).split()) for option in _offered(trace)]
    marks = string.ascii_uppercase if len(shown) <= 26 else range(1, len(shown) + 1)
    return "\n".join(f"{mark}. {text}" for mark, text in zip(marks, shown, strict=False))


def _reference(text: str, collapse: bool, markers: Sequence[str]) -> str:
    text = neutralise(text, markers)
    return " ".join(text.split()) if collapse else text


def _question(text: str | None) -> str:
    """The question without ``<image>`` (released rows end in one) and without control text."""
    return neutralise((text or "").replace("<image>", "")).strip()
