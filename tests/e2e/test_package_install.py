"""The wheel in clean environments, with and without each extra (slow: each installs torch).

Packages come from pip's configured index. The steps are those of the Dockerfile.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a source checkout"),
]
IMPORTS = {  # extra → what it is for can be imported
    "": "mmedrag.pipeline, mmedrag.train_dpo, mmedrag.evaluate",
    "serve": "mmedrag.serve.app, uvicorn, openai",
    "dicom": "pydicom, dicomanonymizer, openjpeg",
    "clip": "open_clip, timm, torchvision",
    "ocr": "rapidocr, onnxruntime",
    "train": "trl, datasets",
    "scale": "tensorboard",
    "postgres": "psycopg, pgvector",
    "clinical": "radeval",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_every_extra_is_installed_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(IMPORTS) == {"", *project["optional-dependencies"]} - {"dev"}


@pytest.mark.parametrize("extra", IMPORTS)
def test_a_clean_environment(wheel: Path, extra: str, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python, mmedrag = environment / "bin" / "python", environment / "bin" / "mmedrag"
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wanted], check=True
    )
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([python, "-c", f"import {IMPORTS[extra]}"], check=True, cwd=tmp_path)
    data, out = tmp_path / "data", tmp_path / "run"
    small = ("--studies", "4", "--domain", "radiology", "--size", "32")
    subprocess.run([mmedrag, "data", "phantom", data, *small], check=True, cwd=tmp_path)
    scripted = ("--domain", "radiology", "--set", "generator.kind=scripted", "--split", "test")
    subprocess.run([mmedrag, "run", data, "--out", out, *scripted], check=True, cwd=tmp_path)
    asked = subprocess.run(
        [mmedrag, "serve", "key", "x", "--file", tmp_path / "keys"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    if extra == "serve":
        assert asked.returncode == 0, asked.stderr
    else:
        assert asked.returncode == 2 and "mmedrag[serve]" in asked.stderr
    shutil.rmtree(environment)  # two gigabytes each
