"""The wheel in clean environments, with and without each extra (slow: each installs torch).

Packages come from pip's configured index. The steps are those of the Dockerfile. With ``-s`` it
tells how large each environment is and how long its installation took.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from extras_tools import PACKAGES, commands

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a source checkout"),
]
IMPORTS = {  # extra → what it is for can be imported
    "": "mmedrag.pipeline.pipeline, mmedrag.preference.dpo.train, mmedrag.evaluation.evaluate_runs",
    "serve": "mmedrag.serve.app, uvicorn, prometheus_client",
    "openai": "openai",
    "dicom": "pydicom, dicomanonymizer, openjpeg",
    # beside a torch without CUDA, torchvision needs the package's own help
    "clip": "mmedrag.runtime.torchvision_shim as t; t.ready(); import open_clip, timm",
    "ocr": "rapidocr, onnxruntime",
    "train": "accelerate",
    "scale": "tensorboard",
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


def installed(wheel: Path, extra: str, environment: Path) -> None:
    """A new environment with the wheel, sound by pip's own check."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [environment / "bin" / "python", "-m", "pip"]
    wanted = f"{wheel}[{extra}]" if extra else str(wheel)
    subprocess.run([*pip, "install", "-q", "-c", ROOT / "constraints.txt", wanted], check=True)
    seconds = time.monotonic() - start
    subprocess.run([*pip, "check"], check=True)
    size = sum(f.stat().st_size for f in environment.rglob("*") if f.is_file()) / 2**20
    print(f"\n{extra or 'no extra'}: {size:,.0f} MiB installed in {seconds:.0f} s")


@pytest.mark.parametrize("extra", IMPORTS)
def test_a_clean_environment(wheel: Path, extra: str, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    installed(wheel, extra, environment)
    python, mmedrag = environment / "bin" / "python", environment / "bin" / "mmedrag"

    def run(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 or not check, (words, done.stderr)
        return done

    run(python, "-c", f"import {IMPORTS[extra]}")
    data, out = tmp_path / "data", tmp_path / "run"
    run(mmedrag, "data", "phantom", data, "--studies", 4, "--domain", "radiology", "--size", 32)
    scripted = ("--domain", "radiology", "--set", "generator.kind=scripted", "--split", "test")
    run(mmedrag, "run", data, "--out", out, *scripted)
    find = "import importlib.util as u; print(*[n for n in %r.split() if not u.find_spec(n)])"
    absent = run(python, "-c", find % " ".join(PACKAGES.values())).stdout.split()
    assert not set(absent) & set(PACKAGES.get(extra, "").split())
    assert extra or set(absent) == set(" ".join(PACKAGES.values()).split())
    for other, lines in commands(data, out, tmp_path).items():
        if set(PACKAGES[other].split()) <= set(absent):
            said = run(mmedrag, *lines[-1], check=False)
            assert f"mmedrag[{other}]" in said.stdout + said.stderr, (lines[-1], said)
    if extra == "serve":
        run(mmedrag, "serve", "key", "x", "--file", tmp_path / "new-keys")
    shutil.rmtree(environment)  # two gigabytes each
