"""Imports go from later layers to earlier ones only, and layer A never loads torch.

A: no torch, no network · B: torch, engines, servers · C: composes · D: edge. A new module has to
be put into the table; a folder stands for all of its modules.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmedrag

LAYERS = {
    "A": """types protocols answers prompts select config runs conditions images images_alike dicom
        memory controls metrics metrics_stats metrics_text reliance arms compare scoring subgroups
        pairs pairs_draw pairs_even pairs_export pairs_heldout pairs_import pairs_io pairs_judge
        metrics_clinical
        repro_checks dpo_settings retriever_settings retrieval_metrics datasets phantom embedded""",
    "B": """encoders generators stores losses losses_contrastive embeddings domain domain_features
        domain_outliers checkpoints convert_source convert_tensors world""",
    "C": """index index_write retriever pipeline run run_worker retrieve evaluate pairs_run system
        train_dpo dpo_cache dpo_card dpo_collator dpo_encode dpo_policy dpo_prepare dpo_trainer
        ablation convert train_domain domain_fit domain_tune train_retriever contrastive
        domain_eval retrieval_eval calibrate""",
    "D": "cli report serve repro demo ask tiny",
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "open_clip",
    "timm",
    "torchvision",
    "pandas",
    "faiss",
    "openai",
    "fastapi",
    "gradio",
    "uvicorn",
}
ROOT = Path(mmedrag.__file__).parent


def modules() -> list[tuple[str, Path]]:
    """(name below mmedrag, file) of every module."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found.append((name, path))
    return found


def layer_of(name: str) -> str:
    return LAYER[name.split(".")[0]]


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports at top level (also inside try and if, but for typing)."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def test_every_module_has_a_layer() -> None:
    missing = sorted({name.split(".")[0] for name, _ in modules()} - set(LAYER))
    assert not missing, f"put into the table of layers: {missing}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_go_down(name: str, path: Path) -> None:
    own = layer_of(name)
    for found in imports(path):
        package, _, rest = found.partition(".")
        if package == "mmedrag":
            target = rest.split(".")[0]
            if target in LAYER:
                assert LAYER[target] <= own, f"{name} (layer {own}) imports {found}"
        elif own == "A":
            assert package not in HEAVY, f"{name} is in layer A and imports {found}"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import pandas\n"
        "try:\n    import torch.nn\nexcept ImportError:\n    from mmedrag import cli\n"
        "class C:\n    import faiss\n    def f(self):\n        import timm\n"
    )
    assert sorted(imports(file)) == ["faiss", "mmedrag.cli", "torch.nn", "typing.TYPE_CHECKING"]


def test_layer_a_loads_without_torch() -> None:
    names = [
        name for name, _ in modules() if layer_of(name) == "A" and not name.endswith("__main__")
    ]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module("mmedrag." + name)
print(sorted(m for m in {sorted(HEAVY)!r} if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
