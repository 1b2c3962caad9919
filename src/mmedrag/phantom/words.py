"""What a domain says, from the table beside its drawing (``chest.toml`` beside ``chest.py``).

Place in the picture: a drawing module calls :func:`read_domain` when it is imported, which
:func:`mmedrag.phantom.grammar.load_domain` does for the domains that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Formatter

from mmedrag.phantom.grammar import AttributeSpec, DomainSpec, FindingSpec, Render
from mmedrag.records import UserError
from mmedrag.runtime import config, read_toml


@dataclass(frozen=True)
class Words:
    """The fields of a table; those of :class:`DomainSpec` that are words."""

    name: str
    modality: str
    both: str
    normal: tuple[str, ...]
    sides: dict[str, tuple[str, str]]
    attributes: tuple[AttributeSpec, ...]
    findings: tuple[FindingSpec, ...]


def read_domain(
    table: str | Path, render: Render, grain: float = 10.0, visibility: float = 1.0
) -> DomainSpec:
    """The domain of a TOML table (a file of this package, or a path), and how it is drawn.

    Raises:
        UserError: an unreadable table, a missing, unknown or empty field, a side that is not
            there, a name twice, or a slot that a sentence's finding cannot fill.
    """
    path = Path(str(files("mmedrag.phantom"))) / table
    words = config.settings(Words, read_toml(path), str(path))
    if words.both not in words.sides:
        known = ", ".join(words.sides)
        raise UserError(f"{path}: both: {words.both!r} is no side, expected one of {known}")
    if not words.normal:
        raise UserError(f"{path}: normal: is empty, expected at least one sentence")
    names = [a.name for a in words.attributes] + [f.name for f in words.findings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: the name {name!r} stands twice")
    for attribute in words.attributes:
        for value, sentences in attribute.values.items():
            if not sentences:
                raise UserError(f"{path}: {attribute.name}.{value}: is empty, expected a sentence")
    for finding in words.findings:
        _check_slots(path, finding)
    return DomainSpec(**vars(words), render=render, grain=grain, visibility=visibility)


def _check_slots(path: Path, spec: FindingSpec) -> None:
    slots = {"noun"} | ({"side", "at"} if spec.sided else set())
    slots |= ({"grade"} if spec.grades else set()) | ({"count", "s"} if spec.most else set())
    for field in ("positive", "negative", "hedged", "questions"):
        if not getattr(spec, field):
            raise UserError(f"{path}: {spec.name}.{field}: is empty, expected a sentence")
        for template in getattr(spec, field):
            where = f"{path}: {spec.name}.{field}: {template!r}"
            try:
                used = {slot for _, slot, _, _ in Formatter().parse(template) if slot is not None}
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            if unknown := sorted(used - slots):
                known = ", ".join(sorted(slots))
                raise UserError(f"{where}: slot {unknown[0]!r} is unknown, expected one of {known}")
