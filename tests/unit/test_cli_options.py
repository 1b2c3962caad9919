"""Options and settings are one: a field says name, type, default, range and meaning once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import click
import pytest
from test_cli_shape import HEAVY, LEAVES

from mmedrag.cli.common import Command, command
from mmedrag.cli.main import main
from mmedrag.cli.options import SettingOption, options_of
from mmedrag.runtime import Settings, setting

WITH_SETTINGS = [(p, c) for p, c in LEAVES if isinstance(c, Command) and c.settings]


@dataclass(frozen=True)
class Some(Settings):
    table = "run"

    how_many: int | None = setting(None, "How many.", minimum=1, maximum=9)
    rate: float = setting(0.5, "How fast.", above=0)
    mode: Literal["slow", "fast"] = setting("slow", "Which way.")
    words: tuple[str, ...] = setting(("a",), "Some words.", metavar="WORD", flag="--word")
    loud: bool = setting(False, "Say more.")
    tidy: bool = setting(True, "Clean up.")
    file: Path | None = setting(None, "Where.", metavar="FILE")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Some]:
    """What a command with the options of ``Some`` gets, as ``mmedrag run``."""
    found: list[Some] = []

    @command("run", settings=Some)
    @options_of(Some)
    def noun(call) -> None:  # type: ignore[no-untyped-def]
        found.append(call.settings(Some))

    monkeypatch.setattr("mmedrag.cli.run.noun", noun)
    return found


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    assert isinstance(done.value.code, int)
    return done.value.code


def test_an_option_is_its_field(seen: list[Some], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "--how-many INTEGER RANGE How many. [1<=x<=9]",
        "--rate FLOAT RANGE How fast. [default: 0.5; x>0]",
        "--mode [slow|fast] Which way. [default: slow]",
        "--word WORD Some words. [default: a]",
        "--loud Say more.",
        "--tidy / --no-tidy Clean up. [default: tidy]",
        "--file FILE Where.",
    ):
        assert text in shown


def test_what_is_typed_reaches_the_class(seen: list[Some], tmp_path: Path) -> None:
    assert call("run") == 0
    assert seen.pop() == Some()
    typed = "--how-many 3 --rate 2 --mode fast --word b --word c --loud --no-tidy --file x"
    assert call("run", *typed.split()) == 0
    every = Some(3, 2.0, "fast", ("b", "c"), True, False, Path("x"))
    assert seen.pop() == every
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[run]\nhow_many = 3\nrate = 2\nmode = "fast"\nwords = ["b", "c"]\nloud = true\n'
        'tidy = false\nfile = "x"\n'
    )
    assert call("run", "--config", recipe) == 0
    assert seen.pop() == every
    assert call("run", "--config", recipe, "--set", "rate=3", "--set", "how_many=4") == 0
    assert (seen[-1].rate, seen.pop().how_many) == (3.0, 4)
    assert call("run", "--config", recipe, "--set", "rate=3", "--rate", "4") == 0
    assert seen.pop().rate == 4.0
    assert call("run", "--set", 'word=["d"]') == 0  # an option's name is a key too
    assert seen.pop().words == ("d",)


@pytest.mark.parametrize(
    ("option", "key", "value", "shown"),
    [
        ("--how-many", "how_many", "0", "how_many: "),
        ("--how-many", "how_many", "x", "how_many: "),
        ("--how-many", "how_many", "10", "how_many: "),
        ("--rate", "rate", "0", "rate: "),
        ("--rate", "rate", "nan", "rate: "),
        ("--mode", "mode", "medium", "mode: "),
    ],
)
def test_an_option_fails_as_a_recipe_does(
    seen: list[Some],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    key: str,
    value: str,
    shown: str,
) -> None:
    text = value if value[0].isdigit() or value == "nan" else f'"{value}"'
    (tmp_path / "r.toml").write_text(f"[run]\n{key} = {text}\n")
    said = []
    for args in ([option, value], ["--set", f"{key}={value}"], ["--config", tmp_path / "r.toml"]):
        assert call("run", *args) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] == said[2]
    assert said[0].startswith(f"error: [run]: {shown}") and said[0].count("\n") == 1
    assert not seen


def test_the_real_commands_fail_alike(
    capsys: pytest.CaptureFixture[str], small_data: Path, tmp_path: Path
) -> None:
    said = []
    for args in (["--limit", "0"], ["--set", "limit=0"]):
        assert call("run", small_data, "--out", tmp_path / "r", *args) == 2
        said.append(capsys.readouterr().err)
    wanted = "error: [run]: limit: Input should be greater than or equal to 1, got 0\n"
    assert said == [wanted, wanted]


@pytest.mark.parametrize(
    ("path", "command"), WITH_SETTINGS, ids=[" ".join(path) for path, _ in WITH_SETTINGS]
)
def test_settings_lists_the_whole_table(
    path: tuple[str, ...], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*path, "--settings") == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "]
    assert command.settings is not None
    options = {p.field: p.name for p in command.params if isinstance(p, SettingOption)}
    for field, key in zip(fields(command.settings), keys, strict=True):
        assert key in (field.name, options.get(field.name))
        assert field.metadata["description"].split()[0] in " ".join(lines)
    assert lines[0] == f"Keys of [{command.table}] in a recipe, and of --set:"


def test_every_listed_key_is_accepted() -> None:
    """A key that another option of the command claims is listed by its option's name."""
    for _, one in WITH_SETTINGS:
        own = {p.name: p for p in one.params if isinstance(p, SettingOption)}
        for field in fields(one.settings):  # type: ignore[arg-type]
            param = next((p for p in one.params if p.name == field.name), None)
            clash = param is not None and getattr(param, "owner", None) is not one.settings
            if clash and field.name != "seed":  # --seed is every command's
                assert any(getattr(p, "field", "") == field.name for p in own.values())


def test_settings_are_listed_without_anything_heavy() -> None:
    code = f"""
import sys
from mmedrag.cli.main import main
for path in {[list(path) for path, _ in WITH_SETTINGS]!r}:
    try:
        main([*path, "--settings"])
    except SystemExit as done:
        assert done.code == 0, path
print(sorted(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_old_recipe_keys_still_load(small_data: Path, tmp_path: Path) -> None:
    """Of ``run``: ``domain`` is the system's option, ``only_domain`` chooses rows."""
    context = click.Context(dict(LEAVES)[("run", "batch")])
    batch = context.command
    recipe = tmp_path / "r.toml"
    recipe.write_text('[run]\ndomain = "radiology"\nonly_domain = "ophthalmology"\nchunk = 4\n')
    batch.parse_args(context, [str(small_data), "--out", "r", "--config", str(recipe)])
    assert context.params["domain"] == "radiology"
    assert context.params["only_domain"] == "ophthalmology"
    assert context.obj["run"] == {"chunk": 4}
