"""Every ``mmedrag`` command line in README and docs is one that the program accepts."""

from __future__ import annotations

import shlex

import click
import pytest

from docs_tools import documented
from mmedrag.cli.main import cli

# also of the lines that e2e/test_documented_lines.py does not run
LINES = [(x.page, x.text) for x in documented() if x.text.startswith("mmedrag ") and not x.inline]


def parse(words: list[str]) -> click.Command:
    """Walk to the command and parse its options and arguments; nothing is run."""
    command: click.Command = cli
    path = "mmedrag"
    while isinstance(command, click.Group):
        name = words[0] if words else ""
        inner = command.get_command(click.Context(command), name)
        if inner is None and getattr(command, "default", ""):
            inner = command.get_command(click.Context(command), command.default)  # type: ignore[attr-defined]
        elif inner is not None:
            words = words[1:]
        assert inner is not None, f"{path}: no command {name!r}"
        command, path = inner, f"{path} {name}"
    context = click.Context(command, info_name=path)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    assert not rest, f"{path}: more arguments than it takes: {rest}"
    if not values.get("help"):
        for param in command.params:
            if param.required and not values.get(str(param.name)):
                raise click.MissingParameter(ctx=context, param=param)
    return command


def test_there_are_commands_to_check() -> None:
    assert any(name == "README.md" for name, _ in LINES)


@pytest.mark.parametrize(
    ("page", "line"), LINES, ids=[f"{p}:{i}" for i, (p, _) in enumerate(LINES)]
)
def test_documented_command_is_accepted(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words != ["--help"]:
        assert parse(words).name


def test_a_wrong_command_is_seen() -> None:
    for wrong in ("run DATA", "run DATA --out R --nope", "index bild D", "eval"):
        with pytest.raises((click.ClickException, AssertionError)):
            parse(shlex.split(wrong))
