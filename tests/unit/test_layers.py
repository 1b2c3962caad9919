"""The house: packages import one way, through faces, and light ones never load torch.

``ROOMS`` is the order of docs/architecture.md: a package imports only from packages before it. What
a package holds is found, not listed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmedrag

ROOMS = """records embedded runtime images phantom models retrieval data answering domain pipeline
    evaluation preference report serve experiments cli""".split()
HEAVY = {
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "open_clip", "timm"),
    *("torchvision", "pandas", "faiss", "openai", "fastapi", "uvicorn"),
}
# the parts whose modules may load an engine when they are imported; all others must not
ENGINES = """answering.generators domain.tune models preference.dpo retrieval.encoders
    retrieval.loss retrieval.train retrieval.trainer runtime.processes runtime.training
    serve""".split()
ROOT = Path(mmedrag.__file__).parent


def modules() -> dict[str, Path]:
    """Name below mmedrag → file, of every module; a package is its ``__init__``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def room(name: str) -> str:
    return name.split(".")[0]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything a file imports from mmedrag, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if room(alias.name) == "mmedrag":
                    yield alias.name.partition(".")[2], ""
        elif isinstance(node, ast.ImportFrom) and room(node.module or "") == "mmedrag":
            for alias in node.names:
                yield str(node.module).partition(".")[2], alias.name


def test_the_root_holds_nothing_that_works() -> None:
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert rooms == set(ROOMS), f"a package without its place in ROOMS: {rooms ^ set(ROOMS)}"


@pytest.mark.parametrize("package", sorted(PACKAGES - {""}))
def test_a_face_is_short_and_says_what_the_package_is_for(package: str) -> None:
    text = MODULES[package].read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= 30 and ast.get_docstring(tree)
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.Import, ast.Assign}, f"{package}: a face that works"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_and_through_faces(name: str) -> None:
    own = room(name)
    for module, what in imports(MODULES[name]):
        target = module or what
        if room(target) not in ROOMS or own in ("", "__main__") or room(target) == own:
            continue
        assert ROOMS.index(room(target)) < ROOMS.index(own), f"{name} imports {target} above it"
        assert target in PACKAGES, f"{name} imports {target}.{what} past the face of its package"


def test_the_check_sees_what_it_is_for(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import mmedrag.cli.main\n"
        "try:\n    import torch\nexcept ImportError:\n    from mmedrag import cli\n"
        "class C:\n    def f(self):\n        from mmedrag.data.rows import Row as R\n"
    )
    assert list(imports(file)) == [("cli.main", ""), ("", "cli"), ("data.rows", "Row")]


def test_light_modules_load_without_an_engine() -> None:
    light = [
        name
        for name in MODULES
        if "__main__" not in name and not any(f"{name}.".startswith(f"{e}.") for e in ENGINES)
    ]
    code = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(("mmedrag." + name).rstrip("."))
    if loaded := sorted(m for m in {sorted(HEAVY)!r} if m in sys.modules):
        sys.exit(f"{{name}} loads {{loaded}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_exported_name_is_there() -> None:
    """A face's stub is what type checkers see; the package must hold the same."""
    code = f"""
import importlib
for name in {sorted(PACKAGES - {""})!r}:
    package = importlib.import_module("mmedrag." + name)
    for exported in getattr(package, "__all__", ()):
        getattr(package, exported)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
