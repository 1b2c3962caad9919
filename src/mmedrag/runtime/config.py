"""Typed settings: class defaults ← TOML recipe ← ``--set key=value`` ← options of a command.

Place in the picture: the edge of everything. A recipe is one TOML file with a table per
command or training (``[retriever]``, ``[domain]``, ``[selection]``, ``[dpo]``, ``[run]``, ...).
The class that describes a table lives beside the code that uses it and says of each key, once,
its name, type, default, range and meaning (:func:`setting`): recipes, options, ``--settings`` and
docs/cli.md are made from that. :func:`settings` checks a table against its class, so a mistyped
key is an error that lists the known ones. Loads nothing heavy: ``--help`` needs this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from mmedrag.records import UserError

T = TypeVar("T")
Recipe = dict[str, dict[str, Any]]

# a bound of :func:`setting`, as pydantic names it -> is a value within, and how an error says so
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (lambda value, bound: value >= bound, "at least"),
    "gt": (lambda value, bound: value > bound, "above"),
    "le": (lambda value, bound: value <= bound, "at most"),
}

# Table names a recipe may hold: the trainings and stages, then the commands' own options.
TABLES = (
    "retriever",
    "domain",
    "selection",
    "dpo",
    "run",
    "generator",
    "prompts",
    "pairs",
    "phantom",
    "eval",
    "report",
    "demo",
    "ablation",
    "sweep",
    "serve",
    "ask",
    "retrieve",
    "index",
    "import",
    "repro",
    "model",
    "data",
)


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    flag: str | None = None,
) -> Any:
    """A field of a settings class: its default (``dict``: made anew), meaning and range.

    Args:
        help: one or two sentences, shown by ``--help``, ``--settings`` and docs/cli.md.
        metavar: what stands for the value in a command's help; by default its type.
        flag: the option, where it is not spelled as the field: ``--kind`` for ``kinds``.

    Example::

        @dataclass(frozen=True)
        class RunSettings(Settings):
            limit: int | None = setting(None, "At most so many examples.", minimum=1)
    """
    bounds = {"ge": minimum, "gt": above, "le": maximum}
    # pydantic reads the metadata of a dataclass field as arguments of its own Field
    metadata: dict[str, Any] = {k: v for k, v in bounds.items() if v is not None}
    metadata |= {"description": help, "json_schema_extra": {"metavar": metavar, "flag": flag}}
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of settings classes: an instance made in Python is checked as one from a recipe is.

    Attributes:
        table: the recipe table that the class describes.
    """

    table: ClassVar[str]

    def __post_init__(self) -> None:
        kinds = hints(type(self))  # type: ignore[arg-type]
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            expected = None if value is None else _expected(value, kinds[field.name], field)
            if expected:
                raise UserError(f"{self.table}: {field.name}: got {value!r}, expected {expected}")


def _expected(value: Any, kind: Any, field: dataclasses.Field[Any]) -> str | None:
    """What a value should have been; None when it is so."""
    for name, (within, words) in BOUNDS.items():
        bound = field.metadata.get(name)
        if bound is not None and not (isinstance(value, (int, float)) and within(value, bound)):
            return f"{words} {bound}"
    allowed, given = choices(kind), value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(allowed) if allowed and not set(given) <= set(allowed) else None


@cache
def hints(cls: type) -> dict[str, Any]:
    """Field name → resolved type."""
    return get_type_hints(cls)


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a type allows: of a Literal, also inside ``| None`` and ``tuple[...]``."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next((found for part in get_args(kind) if (found := choices(part))), ())


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    from importlib.resources import files

    folder = files("mmedrag") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def load(recipe: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """The tables of a recipe (a shipped name or a file) with ``table.key=value`` laid over.

    Raises:
        UserError: no such recipe, bad TOML, an unknown table, or a malformed override.
    """
    tables: Recipe = {} if recipe is None else _read(recipe)
    # Another rule starts without the recipe's parameters, which belong to the recipe's rule.
    for override in sorted(overrides, key=lambda o: not o.startswith("selection.rule=")):
        key, equals, value = override.partition("=")
        table, dot, field = key.strip().partition(".")
        if not (equals and dot and table and field):
            raise UserError(f"--set {override}: expected table.key=value, such as dpo.beta=0.1")
        _known(table, f"--set {override}")
        parsed = parse_value(value.strip())
        if (table, field) == ("selection", "rule"):
            tables["selection"] = over(tables.get("selection", {}), {"rule": parsed})
        else:
            tables.setdefault(table, {})[field] = parsed
    return tables


def over(selection: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``more`` over a ``[selection]`` table; another rule drops the old one's parameters."""
    rules = (selection.get("rule"), more.get("rule"))
    return dict(more) if None not in rules and rules[0] != rules[1] else {**selection, **more}


def parse_value(text: str) -> Any:
    """A TOML value (number, true, list, quoted string); anything else is the string itself."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def settings(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """``cls`` (a dataclass or pydantic model) filled from a table and validated.

    Args:
        cls: class whose fields are the allowed keys; absent keys take its defaults.
        table: key → value as read from TOML or the command line.
        where: what to name in an error, such as ``"[dpo]"``.
    """
    from pydantic import TypeAdapter, ValidationError

    from mmedrag.runtime.files import explain

    known = field_names(cls)
    for key in table:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}, expected one of {', '.join(known)}")
    try:
        return TypeAdapter(cls).validate_python(dict(table))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None


def field_names(cls: type) -> list[str]:
    """Field names of a dataclass or pydantic model, in declared order."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if field.init]
    return list(cls.model_fields)  # type: ignore[attr-defined]


def as_dict(value: Any) -> Any:
    """Settings as plain JSON data, for the resolved copy that a run folder keeps."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): as_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [as_dict(item) for item in items]
    return str(value) if isinstance(value, Path) else value


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict; errors name the file."""
    import tomllib

    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _read(recipe: str | Path) -> Recipe:
    from importlib.resources import files

    path = Path(recipe)
    if path.suffix != ".toml":
        if str(recipe) not in recipe_names():
            names = ", ".join(recipe_names())
            raise UserError(f"--config {recipe}: expected a .toml file or one of {names}")
        path = Path(str(files("mmedrag") / "recipes" / f"{recipe}.toml"))
    tables = read_toml(path)
    for name, table in tables.items():
        _known(name, str(path))
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} stands outside a table, expected [table] before it")
    return tables


def _known(table: str, where: str) -> None:
    if table not in TABLES:
        raise UserError(f"{where}: unknown table [{table}], expected one of {', '.join(TABLES)}")
