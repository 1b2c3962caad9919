"""Recipes, overrides and typed settings: unknown keys fail, errors name the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from mmedrag.records.records import UserError
from mmedrag.runtime import config


@dataclass(frozen=True)
class Some:
    rate: float = 0.1
    names: tuple[str, ...] = ()
    path: Path | None = None


class Model(BaseModel):
    count: int = 1


def test_overrides_lie_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[dpo]\nbeta = 0.1\nepochs = 3\n[run]\nnoise = 'blank'\n")
    found = config.load(recipe, ["dpo.beta=0.5", "run.limit = 7", "selection.rule=fixed_k"])
    assert found == {
        "dpo": {"beta": 0.5, "epochs": 3},
        "run": {"noise": "blank", "limit": 7},
        "selection": {"rule": "fixed_k"},
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-7", 3e-7),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"7"', "7"),
        ("a b", "a b"),
        ("", ""),
        ("2026-01-02x", "2026-01-02x"),
    ],
)
def test_values_are_toml_or_text(text: str, value: object) -> None:
    assert config.parse_value(text) == value


def test_another_rule_starts_without_the_old_parameters() -> None:
    changed = ["selection.k=3", "selection.rule=fixed_k"]
    assert config.load("released", changed)["selection"] == {"rule": "fixed_k", "k": 3}
    kept = config.load("released", ["selection.rule=top1_ratio", "selection.k=2"])["selection"]
    assert kept == {"rule": "top1_ratio", "threshold": 1.5, "k": 2}
    assert config.load(None, changed)["selection"] == {"rule": "fixed_k", "k": 3}


@pytest.mark.parametrize("wrong", ["dpo.beta", "beta=1", ".beta=1", "dpo.=1", "nothing.beta=1"])
def test_bad_overrides(wrong: str) -> None:
    with pytest.raises(UserError, match="--set"):
        config.load(None, [wrong])


def test_bad_recipes(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    with pytest.raises(UserError, match="cannot be read"):
        config.load(file)
    file.write_text("[dpo\n")
    with pytest.raises(UserError, match="r.toml: not valid TOML"):
        config.load(file)
    file.write_text("[dop]\n")
    with pytest.raises(UserError, match=r"unknown table \[dop\], expected one of"):
        config.load(file)
    file.write_text("dpo = 3\n")
    with pytest.raises(UserError, match="outside a table"):
        config.load(file)
    with pytest.raises(UserError, match="expected a .toml file or one of default"):
        config.load("papper")


def test_settings_are_typed_and_closed() -> None:
    assert config.settings(Some, {"rate": 1, "names": ["a"], "path": "x"}, "[s]") == Some(
        1.0, ("a",), Path("x")
    )
    assert config.settings(Model, {}, "[m]").count == 1
    with pytest.raises(UserError, match=r"\[s\]: unknown key 'ratte', expected one of rate, names"):
        config.settings(Some, {"ratte": 1}, "[s]")
    with pytest.raises(UserError, match=r"\[s\]: rate: .*number"):
        config.settings(Some, {"rate": "fast"}, "[s]")
    with pytest.raises(UserError, match=r"\[m\]: unknown key 'x'"):
        config.settings(Model, {"x": 1}, "[m]")


def test_resolved_copy_is_plain_data() -> None:
    assert config.as_dict({"s": Some(path=Path("a/b")), "m": Model(), "l": {3, 1}}) == {
        "s": {"rate": 0.1, "names": [], "path": "a/b"},
        "m": {"count": 1},
        "l": [1, 3],
    }


@dataclass(frozen=True)
class Ranged(config.Settings):
    table = "ranged"

    count: int | None = config.setting(None, "How many.", minimum=1, maximum=9)
    rate: float = config.setting(0.1, "How fast.", above=0)
    kinds: tuple[Literal["a", "b"], ...] = config.setting(("a",), "Which.")
    more: Mapping[str, int] = config.setting(dict, "Others.")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"count": 0}, "count: got 0, expected at least 1"),
        ({"count": 10}, "count: got 10, expected at most 9"),
        ({"count": "3"}, "count: got '3', expected at least 1"),
        ({"rate": 0}, "rate: got 0, expected above 0"),
        ({"rate": float("nan")}, "rate: got nan, expected above 0"),
        ({"kinds": ("a", "c")}, r"kinds: got \('a', 'c'\), expected a, b"),
    ],
)
def test_settings_made_in_python_are_checked_too(given: dict, expected: str) -> None:
    with pytest.raises(UserError, match=f"ranged: {expected}"):
        Ranged(**given)


def test_a_recipe_is_checked_against_the_ranges() -> None:
    made = config.settings(Ranged, {"count": "3", "kinds": ["b"]}, "[r]")
    assert made == Ranged(3, 0.1, ("b",), {})
    assert made.more is not Ranged().more
    for wrong in ({"count": 0}, {"count": 10}, {"rate": 0.0}, {"kinds": ["c"]}):
        with pytest.raises(UserError, match=rf"\[r\]: {next(iter(wrong))}"):
            config.settings(Ranged, wrong, "[r]")
