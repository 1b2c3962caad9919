"""Options of a command from the fields of a settings class, and the list of all its settings.

A field (:func:`mmedrag.runtime.setting`) says name, type, default, range and meaning once. The
option only carries what was typed to the settings class, which checks it as it checks a recipe, so
that ``--limit 0`` and ``[run] limit = 0`` fail alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

from mmedrag.runtime import config

F = TypeVar("F", bound=Callable[..., Any])
NAMES = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


class SettingOption(click.Option):
    """The option of one field; what was typed reaches the settings class unconverted.

    Attributes:
        owner, field: the settings class, and the field's name in it.
    """

    def __init__(self, owner: type, field: Field[Any]) -> None:
        self.owner, self.field = owner, field.name
        kind, several = one_of(config.hints(owner)[field.name])
        default = field.default
        flag = extra(field, "flag") or f"--{field.name.replace('_', '-')}"
        if kind is bool and default:
            flag = f"{flag}/--no-{flag[2:]}"
        super().__init__(
            [flag],
            type=click_type(kind, field),
            is_flag=kind is bool,
            multiple=several,
            default=default,
            show_default=default not in (None, ()),
            help=field.metadata["description"],
            metavar=extra(field, "metavar"),
        )

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        if isinstance(value, str) and isinstance(self.type, NUMBERS):
            return config.parse_value(value)  # a number as a recipe has it; else the text
        return () if value is None and self.multiple else value


NUMBERS = (click.types.IntParamType, click.types.FloatParamType)


def options_of(owner: type, *names: str) -> Callable[[F], F]:
    """Add the options of these fields (all by default) to a command; the command finds their
    values in ``call.settings(owner)``."""
    by_name = {field.name: field for field in fields(owner)}

    def add(function: F) -> F:
        for name in reversed(names or tuple(by_name)):
            option = SettingOption(owner, by_name[name])
            function.__dict__.setdefault("__click_params__", []).append(option)
        return function

    return add


def given(ctx: click.Context) -> dict[type, dict[str, Any]]:
    """Settings class → field → value, of what was typed or a recipe says, taken out of the
    parameters that the command's function gets."""
    found: dict[type, dict[str, Any]] = {}
    for param in ctx.command.params:
        if isinstance(param, SettingOption):
            name = str(param.name)
            value, source = ctx.params.pop(name), ctx.get_parameter_source(name)
            if source is not click.core.ParameterSource.DEFAULT:
                found.setdefault(param.owner, {})[param.field] = value
    return found


def extra(field: Field[Any], name: str) -> str | None:
    """What a field says for the command line alone."""
    return field.metadata["json_schema_extra"][name]


def one_of(kind: Any) -> tuple[Any, bool]:
    """The type of one value, and whether a field takes several: ``int | None`` → int, False."""
    if get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind):
        return one_of(next(part for part in get_args(kind) if part is not type(None)))
    if get_origin(kind) in (tuple, Sequence):
        return get_args(kind)[0], True
    return kind, False


def click_type(kind: Any, field: Field[Any]) -> click.ParamType:
    """What ``--help`` shows for a field."""
    low, above, high = (field.metadata.get(bound) for bound in ("ge", "gt", "le"))
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind in (int, float):
        if (low, above, high) == (None, None, None):
            return click.INT if kind is int else click.FLOAT
        ranged: Any = click.IntRange if kind is int else click.FloatRange
        return ranged(above if low is None else low, high, min_open=above is not None)
    if kind is Path:
        return click.Path(path_type=Path)
    return click.BOOL if kind is bool else click.STRING


def page(command: click.Command, owner: type, formatter: click.HelpFormatter) -> None:
    """Write every setting of a command's table: key, type, meaning, default and range."""
    title = f"Keys of [{owner.table}] in a recipe, and of --set"  # type: ignore[attr-defined]
    with formatter.section(title):
        formatter.write_dl(list(rows(command, owner)))


def rows(command: click.Command, owner: type) -> Iterator[tuple[str, str]]:
    """(key and type, meaning with default and range) of every setting."""
    own = {p.field: p for p in command.params if isinstance(p, SettingOption) and p.owner is owner}
    taken = {str(p.name) for p in command.params} - {str(p.name) for p in own.values()}
    for field in fields(owner):
        option = own.get(field.name) if field.name in taken else None
        key = option.name if option else field.name
        bounds = [
            f"{words} {field.metadata[name]:g}"
            for name, (_, words) in config.BOUNDS.items()
            if name in field.metadata
        ]
        default = [] if field.default in (None, ()) else shown(field.default)
        notes = "; ".join([*default, *bounds])
        text = field.metadata["description"]
        kind = extra(field, "metavar") or type_name(config.hints(owner)[field.name])
        yield f"{key} {kind}", f"{text}  [{notes}]" if notes else text


def shown(default: Any) -> list[str]:
    """A default in a list's words; nothing for a table, which begins empty."""
    if isinstance(default, bool):
        return [f"default: {str(default).lower()}"]
    if isinstance(default, tuple):
        return [f"default: {', '.join(default)}"]
    if isinstance(default, float):
        return [f"default: {default:g}"]
    return [f"default: {default}"] if isinstance(default, (str, int)) else []


def type_name(kind: Any) -> str:
    """A type for people."""
    kind, several = one_of(kind)
    if get_origin(kind) is Literal:
        name = "|".join(get_args(kind))
    else:
        name = "TABLE" if get_origin(kind) is Mapping else NAMES.get(kind, "TEXT")
    return f"LIST of {name}" if several else name
