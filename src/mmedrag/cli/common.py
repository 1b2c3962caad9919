"""What every command shares: its common options, one JSON result, one-line errors.

Imports click alone, so that ``--help`` answers at once; the library is imported inside the
commands. Exit codes: 0 done, 1 a check failed or some rows were rejected, 2 usage or
unreadable input.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mmedrag.cli import options

if TYPE_CHECKING:
    from mmedrag.runtime import Progress

T = TypeVar("T")

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
ANY = click.Path(path_type=Path)


class Call:
    """One invocation: the common options, and how its result leaves the process.

    Attributes:
        given: settings class → field → value, of the command's options that were given.
    """

    def __init__(
        self,
        table: str,
        recipe: dict[str, dict[str, Any]],
        options: dict[str, Any],
        given: Mapping[type, dict[str, Any]] | None = None,
    ):
        self.table, self.recipe, self.given = table, recipe, given or {}
        self.json: bool = options["json_"]
        self.seed: int = options["seed"]
        self.seed_given: bool = options.get("seed_given", False)
        self.out = sys.stdout  # what libraries print goes to stderr (see Command.invoke)

    def settings(self, cls: type[T], **changes: Any) -> T:
        """Settings of ``cls``: the command's recipe table, then its options, then ``changes``
        that are not None. ``--seed`` counts where the class has one and the user gave one."""
        from mmedrag.runtime import config

        known = config.field_names(cls)
        seed = {"seed": self.seed} if self.seed_given and "seed" in known else {}
        more = {key: value for key, value in changes.items() if value is not None}
        values = {**self.rest(), **seed, **self.given.get(cls, {}), **more}
        return config.settings(cls, values, f"[{self.table}]")

    def rest(self) -> dict[str, Any]:
        """What the command's own recipe table holds besides its options."""
        return dict(self.recipe.get(self.table, {}))

    def names(self, values: Iterable[str]) -> list[str]:
        """Ids from repeated options: comma-separated, or ``@FILE`` with one a line."""
        found: list[str] = []
        for value in values:
            if value.startswith("@"):
                text = Path(value[1:]).read_text(encoding="utf-8")
                found += [line.strip() for line in text.splitlines() if line.strip()]
            else:
                found += [part.strip() for part in value.split(",") if part.strip()]
        return found

    def system(self, references: bool = True, interactive: bool = False) -> Any:
        """The system that flags, recipe and system file name (see ``mmedrag.pipeline``)."""
        from mmedrag.pipeline import Flags, resolve_system
        from mmedrag.runtime import config

        flags = config.settings(Flags, self.given.get(Flags, {}), "options")
        return resolve_system(flags, self.recipe, references, interactive)

    def finish(self, result: Mapping[str, Any], text: str | None = None, ok: bool = True) -> None:
        """Print the one result and leave with 0, or with 1 when ``ok`` is false."""
        from mmedrag.runtime import launch

        if self.json:
            text = json.dumps(plain(result), ensure_ascii=False, indent=2, allow_nan=False)
        if launch.rank() == 0:  # the others of a launch have the same result
            click.echo(lines(result) if text is None else text, file=self.out)
        if not ok:
            raise SystemExit(1)

    def progress(self, what: str) -> Progress:
        """A callback ``(done, total)`` that draws a bar on a terminal, else logs now and then."""
        from mmedrag.runtime import Progress

        return Progress(what)

    def progresses(self) -> Callable[[str, int, int], None]:
        """A callback ``(what, done, total)`` with a bar for each ``what``."""
        bars: dict[str, Progress] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = self.progress(what)
            bars[what](done, total)

        return progress


class Command(click.Command):
    """A command with the common options; its recipe table gives defaults to its own options.

    The commands of a noun may share a table; a key that none of them knows is an error.

    Attributes:
        settings: the class that the table fills, and that checks its keys.
        shares: a class of other commands whose keys stand in the same table.
        open_table: keys go to what the command calls, which checks them.
    """

    table = ""
    settings: type | None = None
    shares: type | None = None
    open_table = False
    group: click.Group | None = None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asked, _, _ = self.make_parser(ctx).parse_args(list(args))
        if not ctx.resilient_parsing and not {"help", "settings"} & set(asked):
            changes = list(asked.get("set_") or ())
            if asked.get("rule"):
                changes.append(f"selection.rule={asked['rule']}")
            recipe = load_recipe(asked.get("config"), changes, self.table)
            own = recipe.get(self.table, {})
            names = {str(p.name) for p in self.params if not self._is_setting(p)}
            several = {p.name for p in self.params if getattr(p, "multiple", False)}
            ctx.default_map = {key: own.pop(key) for key in list(own) if key in names}
            for key in several & {k for k, v in ctx.default_map.items() if isinstance(v, str)}:
                ctx.default_map[key] = [ctx.default_map[key]]
            if self.settings is None and not self.open_table:
                self._check(ctx, own)
            ctx.obj = recipe
        return super().parse_args(ctx, args)

    def _is_setting(self, param: click.Parameter) -> bool:
        """Does the parameter's name, as a key of the table, reach the settings class by itself?"""
        found = isinstance(param, options.SettingOption) and param.owner is self.settings
        return found and param.name == param.field  # type: ignore[attr-defined]

    def _check(self, ctx: click.Context, own: Mapping[str, Any]) -> None:
        """Refuse a key that no command of this table knows."""
        others = self.group.commands.values() if self.group else []
        sharing = [self, *(o for o in others if getattr(o, "table", None) == self.table)]
        known = {str(p.name) for command in sharing for p in command.params}
        for command in sharing:
            if isinstance(command, Command):
                known |= self._keys(command.settings) | self._keys(command.shares)
        unknown = sorted(set(own) - known)
        if unknown and not any(getattr(command, "open_table", False) for command in sharing):
            raise click.UsageError(f"[{self.table}]: unknown key {unknown[0]}", ctx)

    @staticmethod
    def _keys(cls: type | None) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)} if cls else set()  # type: ignore[arg-type]

    def invoke(self, ctx: click.Context) -> Any:
        common = {
            key: ctx.params.pop(key) for key in ("json_", "seed", "config", "set_", "verbose")
        }
        quiet = "INFO" if os.environ.get("RANK", "0") == "0" else "ERROR"  # one tells of all
        logging.getLogger("mmedrag").setLevel("DEBUG" if common["verbose"] else quiet)
        source = ctx.get_parameter_source("seed")
        common["seed_given"] = source is not click.core.ParameterSource.DEFAULT
        ctx.params["call"] = Call(self.table, ctx.obj or {}, common, options.given(ctx))
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def load_recipe(config: str | None, overrides: Iterable[str], table: str) -> dict[str, Any]:
    """Recipe tables; a key of ``--set`` without a table belongs to the command's own."""
    if config is None and not overrides:
        return {}
    from mmedrag.runtime import config as settings

    full = []
    for override in overrides:
        key = override.partition("=")[0]
        full.append(override if "." in key else f"{table}.{override}")
    return settings.load(config, full)


def command(
    name: str,
    table: str | None = None,
    settings: type | None = None,
    group: click.Group | None = None,
    *,
    shares: type | None = None,
    open_table: bool = False,
) -> Callable[[Callable[..., None]], Command]:
    """Declare a command (of a noun's group); see :class:`Command` for its recipe table."""

    def declare(function: Callable[..., None]) -> Command:
        for option in reversed((*COMMON, LIST) if settings else COMMON):
            function = option(function)
        made = click.command(name, cls=Command)(function)
        made.table, made.settings, made.group = table or name, settings, group
        made.shares, made.open_table = shares, open_table
        if group is not None:
            group.add_command(made)
        return made

    return declare


def settings_page(command: Command, ctx: click.Context) -> str:
    """Every setting of a command's table, as ``--settings`` prints it."""
    assert command.settings is not None
    formatter = ctx.make_formatter()
    options.page(command, command.settings, formatter)
    return formatter.getvalue().rstrip("\n")


def _list(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        assert isinstance(ctx.command, Command)
        click.echo(settings_page(ctx.command, ctx))
        ctx.exit()


class DefaultGroup(click.Group):
    """A noun that is a command itself: ``run DATA`` means ``run batch DATA``.

    A data folder that is named like a subcommand is written ``./merge``.
    """

    default = ""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [self.default, *args]
        return super().parse_args(ctx, args)


COMMON = (
    click.option("--json", "json_", is_flag=True, help="One JSON result on stdout."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of all draws."),
    click.option("--config", metavar="RECIPE", help="A .toml recipe, or default|paper|released."),
    click.option("--set", "set_", metavar="KEY=VALUE", multiple=True, help="Change one setting."),
    click.option("-v", "--verbose", is_flag=True, help="Log debug messages to stderr."),
)


LIST = click.option(
    "--settings",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="List every setting with type, default and meaning, and exit.",
)


def with_system(function: Callable[..., None]) -> Callable[..., None]:
    """Add the flags that name a system; ``call.system()`` reads them."""
    from mmedrag.pipeline import Flags

    return options.options_of(Flags)(function)


def caution(specs: Iterable[str | None], sources: Iterable[str | None]) -> None:
    """Warn once where embedded parts meet pictures that are not the benchmark's."""
    from mmedrag.embedded import foreign

    if said := foreign(specs, sources):
        logging.getLogger("mmedrag").warning(said)


def count(rows: Sequence[Any], what: str, data: Iterable[Any]) -> None:
    """Say how many rows a command is about, before it loads a model.

    Raises:
        UserError: there are none; what the data folders hold instead is said.
    """
    from mmedrag.records import UserError
    from mmedrag.runtime import counted

    if not rows:
        there = counted(row for one in data for row in [*one.corpus(), *one.examples()])
        raise UserError(f"no {what}; there are: {there}")
    logging.getLogger("mmedrag").info("%d %s", len(rows), what)


def plain(value: Any) -> Any:
    """A result as plain JSON data (paths as text, records and dataclasses as objects)."""
    from mmedrag.runtime import as_dict

    return as_dict(value)


def lines(result: Mapping[str, Any]) -> str:
    """A result for people: ``key: value`` a line, nested objects indented below their key."""
    return "\n".join(_lines(plain(result), ""))


def _lines(value: Mapping[str, Any], indent: str) -> list[str]:
    found = []
    for key, item in value.items():
        flat = not isinstance(item, (dict, list)) or not any(
            isinstance(i, (dict, list)) for i in (item.values() if isinstance(item, dict) else item)
        )
        if isinstance(item, dict) and not flat:
            found += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        elif isinstance(item, list) and not flat:
            rows = [json.dumps(row, ensure_ascii=False) for row in item]
            found += [f"{indent}{key}:", *(f"{indent}  {row}" for row in rows)]
        elif isinstance(item, dict):
            pairs = ", ".join(f"{k} {_short(v)}" for k, v in item.items())
            found.append(f"{indent}{key}: {pairs}")
        elif isinstance(item, list):
            found.append(f"{indent}{key}: {', '.join(map(_short, item))}")
        else:
            found.append(f"{indent}{key}: {_short(item)}")
    return found


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
