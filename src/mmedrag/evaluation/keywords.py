"""A crude labeller of any report: a finding's words, and whether their clause denies them.

Place in the picture: where no ground truth is known, agreement (``agreement``) reads a case's own
report and its reference with this. It knows the words of ``findings.toml``, negations in front of
them (NegEx: Chapman et al. 2001) and a few behind them; doubt counts as present. Its own errors
move an agreement by about 0.03: it is made for orders of size, not for single reports.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mmedrag.records import UserError
from mmedrag.runtime import explain

Keywords = Mapping[str, Mapping[str, list[str]]]  # domain -> finding -> phrases

_CLAUSE = re.compile(
    r"[.;:!?](?:\s|$)|,?\s(?:but|however|although|though|except|whereas|with stable)\s", re.I
)
_IDLE = re.compile(  # words of denial that deny a change, not a finding
    r"\b(?:no|not|without)\s+(?:\w+\s+){0,2}(?:change|changed|increase|decrease|improvement)\b"
    r"|\bcannot\s+(?:be\s+)?(?:exclude|excluded)\b|\bnot\s+(?:exclude|excluded|only|certain)\b",
    re.I,
)
_BEFORE = re.compile(
    r"\b(?:no|not|without|absent|absence of|negative for|free of|clear of|denies|never|nor"
    r"|neither|rather than|resolution of|resolved|removal of|removed)\b",
    re.I,
)
_BEHIND = re.compile(
    r"^[^,]*?\b(?:(?:is|are|was|were|has been|have been|has|have)\s+(?:\w+ly\s+)?(?:not|no|absent"
    r"|excluded|resolved|removed|unlikely|ruled out)|not (?:seen|identified|present|evident)"
    r"|absent)\b",
    re.I,
)


def load_keywords(more: str | Path | None = None) -> Keywords:
    """The findings that are looked for, with those of a user's own file (same form) put in.

    Raises:
        UserError: the file is missing, no TOML, or holds anything but lists of phrases.
    """
    shipped = tomllib.loads(
        resources.files("mmedrag.evaluation").joinpath("findings.toml").read_text("utf-8")
    )
    if more is None:
        return shipped
    try:
        own = TypeAdapter(dict[str, dict[str, list[str]]]).validate_python(
            tomllib.loads(Path(more).read_text("utf-8")), strict=True
        )
    except ValidationError as error:
        raise UserError(f"{more}: {explain(error)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{more}: {error}, expected TOML: [domain], finding = [phrases]") from None
    return {
        domain: {**shipped.get(domain, {}), **own.get(domain, {})} for domain in {**shipped, **own}
    }


def findings_of(keywords: Keywords, domain: str | None) -> dict[str, list[str]]:
    """The findings of a domain; those of all where the domain is not known."""
    if domain in keywords:
        return dict(keywords[domain or ""])
    merged: dict[str, list[str]] = {}
    for findings in keywords.values():
        for name, phrases in findings.items():
            merged[name] = [*merged.get(name, []), *phrases]
    return merged


def present(text: str, findings: Mapping[str, list[str]]) -> set[str]:
    """The findings that a report states as present, doubt included."""
    clauses = [_IDLE.sub(" ", part) for part in _CLAUSE.split(" ".join(text.split())) if part]
    return {
        name
        for name, phrases in findings.items()
        if any(_affirmed(clause, tuple(phrases)) for clause in clauses)
    }


def _affirmed(clause: str, phrases: tuple[str, ...]) -> bool:
    """Is one of the phrases in the clause, denied neither in front nor behind?"""
    return any(
        not _BEFORE.search(clause, 0, found.start()) and not _BEHIND.search(clause[found.end() :])
        for found in _pattern(phrases).finditer(clause)
    )


@lru_cache(maxsize=1024)
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    named = [" ".join(phrase.split()) for phrase in phrases if phrase.strip(" *")]
    words = [re.escape(phrase).replace(r"\*", r"\w*") for phrase in named]
    return re.compile(rf"\b(?:{'|'.join(words)})\b" if words else r"(?!)", re.I)
