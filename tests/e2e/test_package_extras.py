"""Without an extra: the rest works, and what needs it says in one line what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from extras_tools import PACKAGES, commands

# In place of a bare environment: Python's path finder does not see the named packages.
BLOCK = """
import os, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    blocked = set(os.environ["BLOCKED"].split())

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in cls.blocked
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run `mmedrag` where no package of any extra can be imported."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "PYTHONPATH": str(folder), "BLOCKED": " ".join(PACKAGES.values())}

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mmedrag.cli.main", *map(str, args)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    hidden = "import importlib.util as u; print([n for n in %r.split() if u.find_spec(n)])"
    shown = subprocess.run(
        [sys.executable, "-c", hidden % environment["BLOCKED"]],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "[]\n"
    return run


@pytest.fixture(scope="module")
def data(bare: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DATA folder, drawn without any extra."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    args = ("--studies", 4, "--domain", "radiology", "--size", 32)
    done = bare("data", "phantom", folder, *args)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_extra_of_the_package_is_looked_at() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a source checkout")
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert set(extras) - {"dev"} == set(PACKAGES)


@pytest.fixture(scope="module")
def answered(bare: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, made without any extra."""
    out = tmp_path_factory.mktemp("run") / "run"
    system = ("--domain", "radiology", "--set", "generator.kind=scripted")
    done = bare("run", data, "--out", out, *system, "--split", "test")
    assert done.returncode == 0, done.stderr
    return out


def test_the_core_works_without_any_extra(bare: Run, answered: Path, tmp_path: Path) -> None:
    done = bare("eval", answered, "--out", tmp_path / "eval", "--resamples", 100)
    assert done.returncode == 0, done.stderr
    made = bare("report", answered, "--out", tmp_path / "report.html")
    assert made.returncode == 0, made.stderr


def test_commands_say_which_extra_to_install(
    bare: Run, data: Path, answered: Path, tmp_path: Path
) -> None:
    for extra, lines in commands(data, answered, tmp_path).items():
        for line in lines:
            done = bare(*line)
            said = done.stdout + done.stderr
            assert f"mmedrag[{extra}]" in said, (line, said)
            assert "Traceback" not in said and "internal error" not in said, (line, said)
            # 2: nothing is done; 1: every file is refused; 0: all but these metrics is there
            expected = {"dicom": (1, 2), "clinical": (0,)}.get(extra, (2,))
            assert done.returncode in expected, (line, said)
            if done.returncode == 2:
                assert done.stderr.splitlines()[-1].startswith("error: ") and not done.stdout
