"""The wheel holds what the package reads at run time, and the docs are those of the commands."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = {".toml", ".json", ".safetensors", ".jinja", ".html", ".css", ".js", ".yaml", ".md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from this checkout."""
    pytest.importorskip("hatchling", reason="hatchling (extra dev) builds the wheel")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not a source checkout: nothing to build")
    out = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build as b; print(b.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return set(zipfile.ZipFile(next(out.glob("*.whl"))).namelist())


def test_every_data_file_is_in_the_wheel(wheel: set[str]) -> None:
    source = ROOT / "src"
    needed = {
        path.relative_to(source).as_posix()
        for path in (source / "mmedrag").rglob("*")
        if path.suffix in DATA and "__pycache__" not in path.parts
    }
    assert {"mmedrag/recipes/default.toml", "mmedrag/answering/prompt_sets.toml"} <= needed
    assert needed <= wheel


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    outside = {n for n in wheel if not n.startswith(("mmedrag/", "mmedrag-"))}
    assert not outside
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_pins_fit_the_ranges() -> None:
    """constraints.txt pins every direct requirement that is installed, within its range."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    assert not any("+" in version or "/" in version for version in pins.values())
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    unpinned = []
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    for group, wanted in groups.items():
        for text in wanted:
            need = Requirement(text)
            version = pins.get(need.name.lower().replace("_", "-"))
            if version is None:
                unpinned.append((group, need.name))
            else:
                assert need.specifier.contains(version), f"{text} against {version}"
    assert {group for group, _ in unpinned} <= {"clinical"}


def test_command_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmedrag.cli.docs", "--check", str(ROOT / "docs" / "cli.md")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "bench", "repro", "docs"):
        assert any(line.startswith(target) for line in shown.stdout.splitlines())
